"""A task of one's own, from nothing to an evaluation, without a word of selfroute's source."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfroute.errors import TaskError
from selfroute.evaluate.run import read_outcomes
from selfroute.tasks.starter import write_starter
from tests.commands import selfroute
from tests.programs import taco, write_rows

ADD = "print(sum(map(int, input().split())))"


@pytest.mark.slow
def test_a_new_task_is_tested_checked_trained_on_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "custom path=FILE" in selfroute("tasks")
    said = selfroute("tasks", "new", "mine")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.jsonl", "mine.py", "mine.toml", "test_mine.py"]
    assert "  selfroute train mine.toml steps=2 --out runs/mine" in said.splitlines()
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout
    assert "Add the numbers 303 and 960." in selfroute("tasks", "show", "mine.toml")
    assert selfroute("tasks", "check", "mine.toml") == "checking 6 problems\nall 6 problems pass\n"
    assert (
        selfroute("tasks", "check", "mine.toml", "verifier=number", "test=2")
        == "checking 2 problems\nall 2 problems pass\n"
    )
    assert '"verifier": "mine:verify"' in selfroute("train", "mine.toml", "--dry-run")
    selfroute("train", "mine.toml", "steps=2", "problems_per_step=4", "num_responses=2")
    selfroute("evaluate", "runs/mine")
    [records] = Path("runs/mine").rglob("records.jsonl")
    outcomes = read_outcomes(records)
    assert len(outcomes) == 6
    # The starter's own words.
    assert all(outcome.cloud_reason.startswith("it is ") for outcome in outcomes)


def test_what_was_not_checked_is_told(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"q": f"Name the number {n}.", "p": f"{n}"} for n in range(60)]))
    check = ("tasks", "check", "custom", f"path={file}", "verifier=regex", "columns.question=q", "columns.pattern=p")
    with pytest.raises(TaskError, match=r"none of the \d+ problems has an answer to try: give them one"):
        selfroute(*check)
    rows = [taco(f"Add ({n}).", ["1 2\n"], ["3\n"], solutions=[ADD] if n % 2 else []) for n in range(60)]
    said = selfroute("tasks", "check", "code", f"path={write_rows(tmp_path / 'rows.jsonl', rows)}").splitlines()
    assert re.fullmatch(r"\d+ of \d+ problems have no answer to try", said[1])
    assert re.fullmatch(r"all \d+ problems pass", said[2])


def test_a_new_task_goes_into_a_folder_and_over_no_file(tmp_path: Path) -> None:
    said = selfroute("tasks", "new", "my_sums", "--out", tmp_path / "a folder")
    assert f"  cd '{tmp_path / 'a folder'}'" in said.splitlines()
    before = {file: file.read_text() for file in (tmp_path / "a folder").iterdir()}
    assert not any("NAME" in text for text in before.values())
    (tmp_path / "a folder/my_sums.jsonl").unlink()
    with pytest.raises(TaskError, match=r"my_sums\.py, .*test_my_sums\.py: already there, and left alone"):
        write_starter("my_sums", tmp_path / "a folder")
    assert not (tmp_path / "a folder/my_sums.jsonl").exists()
    for name, fault in (
        ("my-sums", "cannot be the name of a Python file"),
        ("../up", "cannot be the name of a Python file"),
        ("class", "cannot be the name of a Python file"),
        ("json", "there is a Python module json already"),
        ("selfroute", "there is a Python module selfroute already"),
    ):
        with pytest.raises(TaskError, match=fault):
            write_starter(name, tmp_path / "other")
    assert not (tmp_path / "other").exists()
