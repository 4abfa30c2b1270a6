from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from selfroute.errors import RunError
from selfroute.records import (
    append_record,
    lock_run,
    open_run,
    read_json,
    read_records,
    write_atomic,
    write_records,
)


def test_records_round_trip_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, [{"step": 1}])
    append_record(path, {"step": 2, "text": "line\nbreak \u2028 é"})
    with path.open("a") as file:
        file.write('{"schema": 1, "step"')
    assert [r["step"] for r in read_records(path)] == [1, 2]
    assert [json.loads(line)["schema"] for line in path.read_text().split("\n")[:2]] == [2, 2]
    assert read_records(path)[1]["text"] == "line\nbreak \u2028 é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken\n{}\n", ":1 is damaged"),
        ("[]\n", ":1 is damaged"),
        ('{"schema": 99}\n', "schema 99; this version reads 2"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        read_records(path)
    with pytest.raises(RunError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    path.write_text("{")
    with pytest.raises(RunError, match="damaged"):
        read_json(path)


def test_a_run_directory_has_one_user_at_a_time(tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"), pytest.raises(RunError, match="in use by another"), lock_run(tmp_path / "run"):
        pass
    with lock_run(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a directory"), lock_run(tmp_path / "file"):
        pass


def test_a_lock_may_be_waited_for(tmp_path: Path) -> None:
    done: list[str] = []

    def wait() -> None:
        with lock_run(tmp_path, wait=True):
            done.append("waited")

    with lock_run(tmp_path):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        done.append("held")
    waiting.join(10)
    assert done == ["held", "waited"]


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_record(tmp_path / "m.jsonl", {"loss": float("nan")})


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_directory_belongs_to_its_settings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(run, "train", {"lr": 9}, resume=False)
    # Nothing was done yet, so a corrected first command just works.
    open_run(run, "train", {"lr": 1, "seed": 0}, resume=False)
    append_record(run / "metrics.jsonl", {"step": 1})
    open_run(run, "train", {"lr": 1, "seed": 0}, resume=True)
    with pytest.raises(RunError, match="already holds a run"):
        open_run(run, "train", {"lr": 1, "seed": 0}, resume=False)
    with pytest.raises(RunError, match=r"other settings \(lr, steps\): .* give another --out$"):
        open_run(run, "train", {"lr": 2, "seed": 0, "steps": 3}, resume=True)
    (last := run / "checkpoints/step-000002").mkdir(parents=True)
    (last / "state.json").touch()
    with pytest.raises(
        RunError, match=rf"\(steps\): .*start from its last checkpoint: device\.model={last} --out NEW$"
    ):
        open_run(run, "train", {"lr": 1, "seed": 0, "steps": 3}, resume=True)
    with pytest.raises(RunError, match=r"\(lr\): .* give another --out$"):
        open_run(run, "train", {"lr": 2, "seed": 0}, resume=True)
    # Through TRL a run has other checkpoints, and no metrics.
    open_run(trl := tmp_path / "trl", "train", {"lr": 1}, resume=False)
    (trl / "checkpoint-2").mkdir()
    with pytest.raises(RunError, match="already holds a run"):
        open_run(trl, "train", {"lr": 1}, resume=False)
    with pytest.raises(RunError, match=r"other settings \(lr\)"):
        open_run(trl, "train", {"lr": 2}, resume=True)
    # What its problems were is noted when it is known, and must not change.
    known = {"sources": [{"hub": "a/b", "commit": "c"}], "train": {"problems": 9, "sha256": "1"}}
    open_run(run, "train", {"lr": 1, "seed": 0}, resume=True, data=known)
    open_run(run, "train", {"lr": 1, "seed": 0}, resume=True, data={**known, "sources": []})
    assert read_json(run / "run.json")["data"] == known
    with pytest.raises(
        RunError, match=r"other train problems \(9, now 8\) from a/b at c: bring them back, or give anoth"
    ):
        open_run(run, "train", {"lr": 1, "seed": 0}, resume=True, data={"train": {"problems": 8, "sha256": "2"}})
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "metrics.jsonl").write_text("somebody's\n")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"holds results but no run\.json"):
            open_run(foreign, "train", {}, resume=resume)
    assert (foreign / "metrics.jsonl").read_text() == "somebody's\n"
    written = read_json(run / "run.json")
    assert written["config"] == {"lr": 1, "seed": 0}
    assert written["versions"]["torch"].startswith("2.")
