from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from selfroute.compare.routing import threshold_for
from selfroute.compare.rows import (
    ASK_FIRST,
    Record,
    methods_of,
    ordering,
    read_gzip,
    read_row,
    row_info,
    seeds_of,
    write_row,
)
from selfroute.errors import RunError

RECORD = Record("p-1", 0.5, False, True, "so 1+2", "1+2", False, 30, True, 500, 0.001, 0.25)


def test_a_row_comes_back_and_is_the_same_bytes_twice(tmp_path: Path) -> None:
    records = [RECORD, replace(RECORD, problem="p-2", score=None, undecided=True, answer=None, solve_share=None)]
    for name in "ab":
        write_row(tmp_path / name, "gapg", 3, {"config": {"lr": 1.0}}, records, [{"step": 1, "help": 0.5}])
    row = read_row(tmp_path / "a", "gapg", 3)
    assert list(row.records) == records
    assert row.metrics == ({"step": 1, "help": 0.5},)
    assert row.info["config"] == {"lr": 1.0}
    assert "git" in row.info
    file = "rows/gapg/seed-3.records.jsonl.gz"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (seeds_of(tmp_path / "a", "gapg"), list(methods_of(tmp_path / "a"))) == ([3], ["gapg"])


def test_a_row_without_its_json_is_not_finished(tmp_path: Path) -> None:
    write_row(tmp_path, "gapg", 0, {}, [RECORD])
    (tmp_path / "rows/gapg/seed-0.json").unlink()
    assert row_info(tmp_path, "gapg", 0) is None
    assert seeds_of(tmp_path, "gapg") == []
    assert list(methods_of(tmp_path)) == []


def test_damage_is_named(tmp_path: Path) -> None:
    write_row(tmp_path, "gapg", 0, {}, [RECORD])
    file = tmp_path / "rows/gapg/seed-0.records.jsonl.gz"
    whole = file.read_bytes()
    flipped = bytes([*whole[:20], whole[20] ^ 0xFF, *whole[21:]])
    for bad in (whole[:-4], flipped, b"plain text", gzip.compress(b"{not json}\n")):
        file.write_bytes(bad)
        with pytest.raises(RunError, match="is damaged"):
            read_row(tmp_path, "gapg", 0)
    file.write_bytes(gzip.compress(b'{"problem": "x"}\n'))
    with pytest.raises(RunError, match="not a row's records"):
        read_row(tmp_path, "gapg", 0)
    file.unlink()
    with pytest.raises(RunError, match="no such file"):
        read_gzip(file)
    (tmp_path / "rows/gapg/seed-0.json").write_text("[]")
    with pytest.raises(RunError, match="not a row of this version"):
        row_info(tmp_path, "gapg", 0)


def test_other_files_beside_rows_are_left_alone(tmp_path: Path) -> None:
    write_row(tmp_path, "gapg", 0, {}, [RECORD])
    (tmp_path / "rows/gapg/seed-0 (copy).json").write_text("{}")
    (tmp_path / "rows/notes").mkdir()
    assert (seeds_of(tmp_path, "gapg"), list(methods_of(tmp_path))) == ([0], ["gapg"])


def test_of_more_responses_without_an_answer_than_the_budget_pays_for_some_are_asked() -> None:
    for prefix in "ab":
        scores = [ordering(f"{prefix}{n}", None, undecided=n % 2 == 0) for n in range(1000)]
        assert len(set(scores)) == 1000
        found = threshold_for(scores, 0.3)
        assert found["call_rate"] == pytest.approx(0.285, abs=0.001)
        others = [ordering(f"test-{prefix}{n}", 0.5, undecided=n % 2 == 0) for n in range(1000)]
        assert 0.24 < sum(score > found["threshold"] for score in others) / 1000 < 0.34


def test_a_response_without_an_answer_is_asked_first_and_an_unusual_one_last(tmp_path: Path) -> None:
    assert ordering("a", None, False) <= -ASK_FIRST < ordering("a", 0.9, False) == 0.9 < ASK_FIRST
    assert ASK_FIRST <= ordering("a", None, True) == ordering("a", 2.0, True) < ASK_FIRST + 1
    records = [
        replace(RECORD, problem="a", score=0.9, asked=False),
        replace(RECORD, problem="b", score=None, undecided=True, asked=False),
        replace(RECORD, problem="c", score=None, asked=True),
    ]
    write_row(tmp_path, "gapg", 0, {}, records)
    row = read_row(tmp_path, "gapg", 0)
    assert row.columns(0.95).asked.tolist() == [0, 1, 0]
    assert row.columns(0.5).asked.tolist() == [1, 1, 0]
    assert row.columns(None).asked.tolist() == [0, 0, 1]
