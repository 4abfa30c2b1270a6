"""What a run's problems were: fingerprints, sources, and the hub's commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.data_hub import SHA, FolderHub

from selfroute.config import Choice
from selfroute.errors import RunError, TaskError
from selfroute.records import check_problems, known_data, write_json
from selfroute.tasks import make_task
from selfroute.tasks.provenance import fingerprint, pinned, provenance, task_of
from selfroute.types import Problem

FIXTURES = Path(__file__).parents[2] / "fixtures/maths"
MATHS = Choice(name="maths", dataset="gsm8k", data_dir=str(FIXTURES), revision=None)


def test_a_fingerprint_is_of_ids_questions_references_and_their_order() -> None:
    one = Problem("a-1", "One?", {"answers": ("1",), "spread": {2, 3}})
    two = Problem("a-2", "Two?", {"answers": ("2",)})
    known = fingerprint([one, two])
    assert known["problems"] == 2
    assert fingerprint([one, replace(two)]) == known
    for changed in (
        [two, one],
        [one],
        [one, replace(two, id="a-3")],
        [one, replace(two, question="Two ?")],
        [one, replace(two, reference={"answers": ("3",)})],
    ):
        assert fingerprint(changed)["sha256"] != known["sha256"]


def test_provenance_names_the_files_and_each_split_that_there_is() -> None:
    found = provenance(make_task(MATHS), "train", "calibration", "test")
    assert found["sources"] == [{"file": str(FIXTURES / "gsm8k" / name)} for name in ("train.jsonl", "test.jsonl")]
    assert found["test"]["problems"] == 2
    assert found == provenance(make_task(MATHS), "train", "calibration", "test")
    only_tests = Choice(name="maths", dataset="aime24", data_dir=str(FIXTURES))
    assert set(provenance(make_task(only_tests), "test", "train")) == {"sources", "test"}
    with pytest.raises(TaskError, match="holds test problems only"):
        provenance(make_task(only_tests), "train", "test")
    generated = provenance(make_task(Choice(name="addition", test=5)), "test")
    assert generated["sources"] == []
    assert generated["test"]["problems"] == 5


def test_a_run_reads_its_commit_again_unless_another_revision_is_asked_for() -> None:
    known = {"sources": [{"hub": "openai/gsm8k", "asked": None, "commit": SHA}]}
    assert pinned(MATHS, known).settings == {**MATHS.settings, "revision": SHA}
    newer = Choice(**{**MATHS.model_dump(), "revision": "v2"})
    for task, data in (
        (newer, known),
        (MATHS, {}),
        (MATHS, {"sources": [{"file": "x.jsonl"}]}),
        (MATHS, {"sources": [*known["sources"], {"hub": "another", "asked": None, "commit": SHA}]}),
        (MATHS, {"sources": [{**known["sources"][0], "commit": None}]}),
        (Choice(name="addition", test=5), known),
    ):
        assert pinned(task, data) == task
    assert pinned(newer, {"sources": [{**known["sources"][0], "asked": "v2"}]}).settings["revision"] == SHA


@pytest.mark.parametrize(
    ("key", "named"),
    [("path", "gsm8k"), ("path", "../maths/gsm8k"), ("path", "gsm8k/test.jsonl"), ("data_dir", "maths")],
)
def test_a_run_reads_its_files_again_from_another_folder(
    key: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = FIXTURES.parent if key == "data_dir" else FIXTURES
    monkeypatch.chdir(there)
    task = Choice(name="maths", dataset="gsm8k", **{key: named})
    data = provenance(make_task(task), "train")
    assert pinned(task, data) is task
    write_json(tmp_path / "run.json", {"config": {}, "data": data})
    monkeypatch.chdir(tmp_path)
    assert pinned(task, data).settings[key] == str((there / named).resolve())
    assert fingerprint(task_of(tmp_path, task, "train").load("train")) == data["train"]
    gone = {"sources": [{"file": str(tmp_path / named / "gone.jsonl")}]}
    assert pinned(task, gone) is task


def test_a_split_that_has_changed_is_refused_with_a_way_out(tmp_path: Path) -> None:
    data = provenance(make_task(MATHS), "train", "test")
    write_json(tmp_path / "run.json", {"config": {}, "data": data})
    assert known_data(tmp_path) == json.loads(json.dumps(data))
    check_problems(tmp_path, data, data, "")
    check_problems(tmp_path, data, {"calibration": {"problems": 1, "sha256": "new"}}, "")
    check_problems(tmp_path, {}, data, "")
    task_of(tmp_path, MATHS, "test")
    fewer = Choice(**{**MATHS.model_dump(), "test": 1})
    with pytest.raises(RunError, match=r"other test problems \(2, now 1\) from .*/train.jsonl, .*test.jsonl: bring"):
        task_of(tmp_path, fewer, "test")


READ = """
import json, sys
from selfroute.config import Choice
from selfroute.tasks import make_task
from selfroute.tasks.provenance import pinned, provenance
task = Choice(name="maths", dataset="amc23", revision=sys.argv[1] if len(sys.argv) > 1 else None)
data = provenance(make_task(task), "test")
print(json.dumps([data["sources"], provenance(make_task(pinned(task, data)), "test")["sources"]]))
"""


def read(*args: str, home: Path, code: int = 0, **environment: str) -> str:
    """What is read in a process of its own, since the hub's address is read once."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *args], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_hubs_commit_is_found_out_read_and_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "hub/zwhe99/amc23"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"question": "What is 1+1?", "answer": "2.0"}\n')
    mirror = {"hub": "zwhe99/amc23", "asked": None, "commit": SHA}
    with FolderHub(tmp_path / "hub") as hub:
        first, again = json.loads(read(home=tmp_path / "home", HF_ENDPOINT=hub.url))
        assert first == [mirror]
        # By its commit a mirror is found too; no other data set has it.
        assert again == [{**mirror, "asked": SHA}]
        assert f"datasets/zwhe99/amc23/resolve/{SHA}/test.jsonl" in hub.asked
    # Without a network the cache knows its commit, and gives no other one.
    first, again = json.loads(read(home=tmp_path / "home", HF_HUB_OFFLINE="1"))
    assert (first, again) == ([mirror], [{**mirror, "asked": SHA}])
    refused = read("f" * 40, home=tmp_path / "home", HF_HUB_OFFLINE="1", code=1)
    assert f"zwhe99/amc23 (config default, split test, revision {'f' * 40}): ValueError: the cache holds" in refused
