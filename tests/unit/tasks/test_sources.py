from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from tests.data_hub import FolderHub

from selfroute.errors import TaskError
from selfroute.tasks.choice import CHOICE_SETS
from selfroute.tasks.code_rows import CODE_SETS
from selfroute.tasks.mathsets import MATH_SETS
from selfroute.tasks.sources import Hub, export_command, find_files, find_named, part_of, read_files

DIVIDED = {"train": {"train"}, "test": {"test"}}
ROWS = [{"a": "one", "b": "1"}, {"a": "two, with\na line break", "b": "2"}]


def written(folder: Path) -> list[Path]:
    """The same rows in each format."""
    files = [folder / f"rows{suffix}" for suffix in (".jsonl", ".json", ".csv", ".parquet")]
    files[0].write_text('\ufeff{"a": "one", "b": "1"}\n\n{"a": "two, with\\na line break", "b": "2"}\n')
    files[1].write_text('[{"a": "one", "b": "1"}, {"a": "two, with\\na line break", "b": "2"}]')
    files[2].write_text('a,b\none,1\n"two, with\na line break",2\n')
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[3])
    return files


def test_all_formats_give_the_same_rows_and_say_where_they_stand(tmp_path: Path) -> None:
    places = [["rows.jsonl:1", "rows.jsonl:3"], ["rows.json:1", "rows.json:2"], ["rows.csv:2", "rows.csv:4"]]
    for file, expected in zip(written(tmp_path), [*places, ["rows.parquet:1", "rows.parquet:2"]], strict=True):
        rows = list(read_files([file]))
        assert [row.values for row in rows] == ROWS
        assert [row.place for row in rows] == expected
        assert not any(row.fault for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("x.jsonl", "{", "is not JSON"),
        ("x.jsonl", "[" * 100_000, "is not JSON"),
        ("x.jsonl", "3", "must be an object with columns, not int"),
        ("x.json", "[3]", "must be an object with columns, not int"),
        ("x.csv", "a,b\n1", "another number of cells"),
        ("x.csv", "a,b\n1,2,3", "another number of cells"),
        # A letter as Windows writes it.
        ("x.jsonl", b'{"a": "caf\xe9"}', "is not UTF-8: it holds the byte 0xe9"),
        ("x.json", b'[{"a": "caf\xe9"}]', "is not UTF-8: it holds the byte 0xe9"),
        ("x.csv", b"a\ncaf\xe9", "is not UTF-8: it holds the byte 0xe9"),
    ],
)
def test_bad_rows_have_a_fault(tmp_path: Path, name: str, text: str | bytes, fault: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    [row] = read_files([tmp_path / name])
    assert fault in row.fault


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "x.json is not JSON"),
        ("x.json", '{"a": 1}', "must hold a list of objects, not dict"),
        ("x.csv", 'a\n"1', "x.csv is not CSV after line 1"),
        ("x.csv", "a,b,a,c,c\n1,2,3,4,5", "x.csv has several columns called a and c: give each a name of its own"),
        ("x.csv", b"caf\xe9\n1", "x.csv: its first line is not UTF-8: it holds the byte 0xe9"),
        ("x.parquet", "PAR1", "cannot read x.parquet as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TaskError, match=message):
        list(read_files([tmp_path / name]))


def test_a_row_that_is_not_utf8_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\xff"}\n{"a": "\xc3\xa9"}\n')
    (tmp_path / "x.json").write_bytes(b'[{"\xff": 1}, {"a": "\xc3\xa9"}]')
    (tmp_path / "x.csv").write_bytes(b"a\n\xff\n\xc3\xa9\n")
    for suffix in (".jsonl", ".json", ".csv"):
        bad, good = read_files([tmp_path / f"x{suffix}"])
        assert bad.fault == "is not UTF-8: it holds the byte 0xff"
        assert (good.values, good.fault) == ({"a": "é"}, "")
    # Half a pair that JSON spells out is no byte of the file.
    (tmp_path / "y.json").write_text(r'[{"a": "\udcff"}]')
    [row] = read_files([tmp_path / "y.json"])
    assert row.fault == ""


def test_cells_of_any_width_are_read_and_columns_may_have_no_name(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f"a,,\n{'1' * 200_000},,\n\n2,,\n")
    rows = list(read_files([tmp_path / "x.csv"]))
    assert [(row.place, len(row.values["a"]), row.fault) for row in rows] == [
        ("x.csv:2", 200_000, ""),
        ("x.csv:4", 1, ""),
    ]
    assert csv.field_size_limit() == before


def test_files_are_found_by_part(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet",
                 "test/algebra.jsonl", "README.md", "other.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_files(tmp_path, DIVIDED).parts
    names = {part: [str(f.relative_to(tmp_path)) for f in files] for part, files in found.items()}
    assert names == {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "test": ["data/test-0.parquet", "test/algebra.jsonl"],
    }
    assert len(find_files(tmp_path, {}).parts["all"]) == 5
    assert find_files(tmp_path / "other.json", DIVIDED).parts == {"all": [tmp_path / "other.json"]}


def test_a_files_own_name_comes_before_its_folders(tmp_path: Path) -> None:
    names = {"train": {"train"}, "calibration": {"train_small"}, "test": {"test"}}
    for file, part in (
        ("testbed/train.jsonl", "train"), ("test/train.jsonl", "train"), ("train_small-0.jsonl", "calibration"),
        ("Test/a.jsonl", "test"), ("testbed/a.jsonl", None), ("train_data/0.jsonl", "train"),
        ("test-v1/0.jsonl", "test"), ("a/train/b/0.jsonl", "train"),
    ):  # fmt: skip
        assert part_of(Path(file), names) == part, file
    with pytest.raises(TaskError, match=r"train/test/a.jsonl could be of test and train: begin its name with one"):
        part_of(Path("train/test/a.jsonl"), names)
    with pytest.raises(TaskError, match=r"dev.jsonl could be of calibration and test"):
        part_of(Path("dev.jsonl"), {"calibration": {"dev"}, "test": {"dev"}})
    (tmp_path / "testbed").mkdir()
    (tmp_path / "testbed/train.jsonl").touch()
    assert find_files(tmp_path, DIVIDED).parts == {"train": [tmp_path / "testbed/train.jsonl"]}


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    for place, message in (
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "x.txt", r"cannot read x.txt: give a .jsonl, .json, .csv, .parquet file"),
        (tmp_path, "nothing to read in .*train.jsonl and test.jsonl"),
    ):
        with pytest.raises(TaskError, match=message):
            find_files(place, DIVIDED)
    (tmp_path / "named.csv").touch()
    assert find_named(tmp_path, "named") == tmp_path / "named.csv"
    assert find_named(tmp_path, "x") is None


def test_the_export_command_is_python(tmp_path: Path) -> None:
    one = Hub("owner/name", {"test": "validation"})
    several = Hub("owner/name", {"test": "test"}, ("a", "b"))
    for command in (export_command(one, "test", None, "x.jsonl"), export_command(several, "test", "v1", "x.jsonl")):
        before, code, after = command.split('"')
        assert (before, after) == ("python -c ", "")
        compile(code, "command", "exec")
    assert "load_dataset('owner/name', 'b', split='test', revision='v1')" in export_command(several, "test", "v1", "x")


def show(*args: str, home: Path, code: int = 0, **environment: str) -> str:
    """`selfroute tasks show maths` in a process of its own, since the hub's address is read once."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "selfroute", "tasks", "show", "maths", *args],
        env={**env, "HF_HOME": str(home), **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_a_mirror_stands_in_for_what_vanished_from_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "hub/zwhe99/amc23"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"question": "What is 1+1?", "answer": "2.0"}\n')
    with FolderHub(tmp_path / "hub") as hub:
        text = show("dataset=amc23", home=tmp_path / "home", HF_ENDPOINT=hub.url)
        assert "What is 1+1?" in text
        assert "the hub's amc23 has 1 test rows, not 40" in text
        assert any("math-ai/amc23" in path for path in hub.asked)
        # What was fetched is there without a network.
        asked = len(hub.asked)
        assert "What is 1+1?" in show("dataset=amc23", home=tmp_path / "home", HF_HUB_OFFLINE="1")
        assert len(hub.asked) == asked
        text = show("dataset=aime24", home=tmp_path / "home", HF_ENDPOINT=hub.url, code=1)
    for name in ("HuggingFaceH4/aime_2024", "math-ai/aime24", "Maxwell-Jia/AIME_2024"):
        assert f"{name} (config default" in text
    commit = "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
    said = f"load_dataset('HuggingFaceH4/aime_2024', split='train', revision='{commit}').to_json('aime24.jsonl')"
    assert said in text


def test_a_hub_out_of_reach_is_told_at_once(tmp_path: Path) -> None:
    text = show("dataset=math-500", home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", code=1)
    commit = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    assert f"cannot load from the hub:\n  HuggingFaceH4/MATH-500 (config default, split test, revision {commit}" in text
    assert f"split='test', revision='{commit}').to_json('math-500.jsonl')" in text
    assert "set task.path to the file" in text


SUBJECTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"


def test_a_mirror_cut_into_subjects_is_read_whole(tmp_path: Path) -> None:
    folder = tmp_path / "hub/EleutherAI/hendrycks_math"
    configs = []
    for n, subject in enumerate(SUBJECTS.split()):
        for part in ("train", "test"):
            (folder / subject).mkdir(parents=True, exist_ok=True)
            (folder / subject / f"{part}.jsonl").write_text(
                f'{{"problem": "{part} {n}?", "level": "Level 1", "type": "x", "solution": "\\\\boxed{{{n}}}"}}\n'
            )
        files = ", ".join(f"{{split: {part}, path: {subject}/{part}.jsonl}}" for part in ("train", "test"))
        configs.append(f"- config_name: {subject}\n  data_files: [{files}]\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    with FolderHub(tmp_path / "hub") as hub:
        text = show("-n", "9", home=tmp_path / "home", HF_ENDPOINT=hub.url)
    # At the commit that is known.
    kept = "datasets/EleutherAI/hendrycks_math/resolve/21a5633873b6a120296cce3e2df9d5550074f4a3/algebra/test.jsonl"
    assert kept in hub.asked
    assert sorted(line.split()[-1] for line in text.splitlines() if "solution" in line) == list("0123456")
    assert "the hub's math-lighteval has 7 train rows, not 7500" in text


def test_the_commits_that_are_known_are_whole() -> None:
    hubs = [hub for sets in (MATH_SETS, CHOICE_SETS, CODE_SETS) for one in sets.values() for hub in one.hubs]
    for hub in hubs:
        assert not hub.commit or re.fullmatch("[0-9a-f]{40}", hub.commit), hub.id
    unknown = {hub.id for hub in hubs if not hub.commit}
    # docs/tasks.md names them.
    assert unknown == {
        "likaixin/TACO-verified", "hails/agieval-math", "hails/agieval-sat-math", "lighteval/mmlu",
        "zwhe99/amc23", "Maxwell-Jia/AIME_2024", "MathArena/aime_2025",
    }  # fmt: skip
