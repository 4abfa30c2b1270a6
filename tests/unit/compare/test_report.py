from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.unit.compare.test_results import OTHER, OURS, write

from selfroute.compare.figures import ablation_groups, cost_curve, curve_of
from selfroute.compare.report import show, write_report
from selfroute.compare.results import load_testbed
from selfroute.errors import RunError
from selfroute.records import read_json, write_json

LEDGER = {"cloud_calls": 4, "cost_usd": 0.1, "device_tokens": 100, "seconds": 9.0}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    bed = tmp_path / "out/bed"
    info = {"config": {"lr": 1e-4}, "ledger": LEDGER}
    write(bed, "gapg_decision", 0, OURS, threshold=2.5, asked=[1, 0, 0, 0, 0], **info)
    write(bed, "probe", 0, OTHER, threshold=3.5, **info)
    for name in ("G=4", "G=16", "cloud=0.7", "cloud=0.7@accuracy=1.0"):
        write(bed, name, 0, OTHER, threshold=3.5, asked=[0] * 5, **info)
    write_json(bed / "testbed.json", {"train": {"budget": 0.3, "task": {"name": "countdown", "path": None}}})
    return tmp_path / "out"


def test_everything_is_written_ablations_too(out: Path) -> None:
    rows = write_report(out)
    assert [r["method"] for r in rows] == [
        "gapg_decision",
        "probe",
        "G=4",
        "G=16",
        "cloud=0.7",
        "cloud=0.7@accuracy=1.0",
    ]
    assert json.loads((out / "compare.json").read_text()) == rows
    page, text = (out / "report.html").read_text(), (out / "results.md").read_text()
    for name in ("Hidden-state probe", "G=16", "cloud=0.7@accuracy=1.0"):
        assert name in page
        assert f"| {name} | 1 |" in text
    assert "| **GAPG + decision loss** | 1 | 40.0" in text
    assert "Ablations of GAPG + decision loss" in page
    assert "bed/rows/cloud%3D0.7%40accuracy%3D1.0/seed-0.records.jsonl.gz" in page
    assert (out / "figures/bed-ablations.png").stat().st_size > 10_000
    assert (out / "figures/bed-curves.svg").is_file()


def test_ablations_are_grouped_by_what_they_change(out: Path) -> None:
    assert ablation_groups(load_testbed(out / "bed")) == {
        "G": [("4", "G=4"), ("16", "G=16")],
        "cloud": [("0.7", "cloud=0.7")],
        "trained with cloud=0.7, evaluated with cloud": [("1.0", "cloud=0.7@accuracy=1.0")],
    }


def test_cost_grows_with_each_call_in_the_order_of_the_score(out: Path) -> None:
    cell = load_testbed(out / "bed").cells["gapg_decision"][0]
    rates, usd = cost_curve(cell)
    assert rates.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert usd.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    _, cost, accuracy = curve_of([cell, cell])
    assert np.interp(0.2, cost, accuracy) == pytest.approx(0.8)


def test_numbers_for_people() -> None:
    row = {"a": {"value": 0.5, "low": 0.4, "high": 0.6}, "b": {"value": 0.05, "low": 0.05, "high": 0.05}, "c": None}
    assert show(row, "a") == "50.0 [40.0, 60.0]"
    assert show(row, "a", signed=True) == "+50.0 [+40.0, +60.0]"
    assert show(row, "b") == "5.0"
    assert show(row, "c") == show(row, "d") == "–"
    assert show({"n": 12345}, "n") == "12,345"
    assert show({"n": {"value": 98.6, "low": 90.0, "high": 99.0}}, "n", 1.0) == "99"


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no finished row yet"):
        write_report(tmp_path)


def test_the_report_is_the_same_twice(out: Path) -> None:
    write_report(out)
    names = ("compare.json", "report.html", "results.md", "numbers.csv", "curves.csv", "training.csv")
    first = {name: (out / name).read_bytes() for name in names}
    write_report(out)
    assert {name: (out / name).read_bytes() for name in names} == first
    assert read_json(out / "compare.json")
