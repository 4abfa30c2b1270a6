from __future__ import annotations

import io
import json
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.unit.compare.test_results import OTHER, OURS, write

from selfroute.compare import report
from selfroute.compare.config import CompareConfig
from selfroute.compare.figures import ablation_groups, cost_curve, curve_of, draw_ablations
from selfroute.compare.report import show, terminal_tables, write_report
from selfroute.compare.results import cpu_hours, load_testbed, summarise
from selfroute.compare.rows import read_row, write_row
from selfroute.config import load
from selfroute.errors import RunError
from selfroute.records import read_json, write_json

LEDGER = {"cloud_calls": 4, "cost_usd": 0.1, "device_tokens": 100, "seconds": 9.0, "cpu_seconds": 8.0}


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


def test_the_testbed_with_the_most_methods_comes_first(out: Path) -> None:
    write(
        out / "few", "gapg_decision", 0, OURS, threshold=2.5, asked=[1, 0, 0, 0, 0], config={"lr": 1e-4}, ledger=LEDGER
    )
    shutil.copy(out / "bed/testbed.json", out / "few/testbed.json")
    shutil.copytree(out / "few", out / "at-least-as-few")
    assert [folder.name for folder in report.testbeds(out)] == ["bed", "at-least-as-few", "few"]


def test_trainings_that_came_out_the_same_are_named(out: Path) -> None:
    bed = out / "bed"
    settings = read_json(bed / "testbed.json")
    said = "The same responses to every problem with every seed: Collaboration-Aware Tuning, std and DA-GRPO."
    info = {"config": {"lr": 1e-4}, "ledger": LEDGER}
    for method in ("grpo", "da_grpo"):
        write(bed, method, 0, OTHER, threshold=3.5, asked=[0] * 5, **info)
    write(bed, "gapg", 0, OURS, threshold=3.5, asked=[0] * 5, **info)
    write_json(bed / "testbed.json", settings)
    write_report(out)
    assert said in (out / "results.md").read_text()
    assert said in (out / "report.html").read_text()
    # Another seed of one of them alone, and they are two.
    write(bed, "da_grpo", 1, OTHER, threshold=3.5, asked=[0] * 5, **info)
    write_json(bed / "testbed.json", settings)
    write_report(out)
    assert "The same responses" not in (out / "results.md").read_text() + (out / "report.html").read_text()


def test_a_lambda_that_never_left_0_is_named(out: Path) -> None:
    info = {"config": {"lr": 1e-4}, "ledger": LEDGER}
    settings = read_json(out / "bed/testbed.json")
    write(out / "bed", "da_grpo", 0, OTHER, threshold=3.5, asked=[0] * 5, **info)
    write_json(out / "bed/testbed.json", settings)
    row = read_row(out / "bed", "da_grpo", 0)
    for dual, named in ((0.0, True), (0.25, False)):
        steps = [{"step": n, "dual": dual * n, "help": 0.0, "asking": 0.0, "local_accuracy": 0.0} for n in range(2)]
        write_row(out / "bed", "da_grpo", 0, {**info, "calibration": row.info["calibration"]}, row.records, steps)
        write_report(out)
        for page in ("results.md", "report.html"):
            assert ("calls had no price: DA-GRPO (seed 0)" in (out / page).read_text()) is named


def test_ablations_are_grouped_by_what_they_change(out: Path) -> None:
    assert ablation_groups(load_testbed(out / "bed")) == {
        "G": [("4", "G=4"), ("16", "G=16")],
        "cloud": [("0.7", "cloud=0.7")],
        "trained with cloud=0.7, evaluated with cloud": [("1.0", "cloud=0.7@accuracy=1.0")],
    }


def test_each_ablation_has_a_panel_also_where_they_fill_two_rows(out: Path) -> None:
    for name in ("rho=1", "help_sampled", "alpha_c=0.5"):
        write(out / "bed", name, 0, OTHER, threshold=3.5, asked=[0] * 5, config={"lr": 1e-4}, ledger=LEDGER)
    testbed = load_testbed(out / "bed")
    figure = draw_ablations(testbed, {row["method"]: row for row in summarise(testbed, resamples=10)})
    assert figure
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_xlabel().replace("\n", ", ") for axis in shown] == list(ablation_groups(testbed))
    assert len(shown) == 6
    assert {len(axis.containers) for axis in shown} == {3}
    assert len(figure.legends[0].get_texts()) == 3


def test_cost_grows_with_each_call_in_the_order_of_the_score(out: Path) -> None:
    cell = load_testbed(out / "bed").cells["gapg_decision"][0]
    rates, usd = cost_curve(cell)
    assert rates.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert usd.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    rates, cost, accuracy, alone, oracle = curve_of([cell, cell])
    assert np.interp(0.2, cost, accuracy) == pytest.approx(0.8)
    assert alone.tolist() == accuracy.tolist()
    # Two of five are wrong, and the cloud is right about both.
    assert np.interp([0, 0.2, 0.4, 1], rates, oracle) == pytest.approx([0.6, 0.8, 1, 1])


def test_numbers_for_people() -> None:
    row = {"a": {"value": 0.5, "low": 0.4, "high": 0.6}, "b": {"value": 0.05, "low": 0.05, "high": 0.05}, "c": None}
    assert show(row, "a") == "50.0 [40.0, 60.0]"
    assert show(row, "a", signed=True) == "+50.0 [+40.0, +60.0]"
    assert show(row, "b") == "5.0"
    assert show(row, "c") == show(row, "d") == "–"
    assert show({"n": 12345}, "n") == "12,345"
    assert show({"n": {"value": 98.6, "low": 90.0, "high": 99.0}}, "n", 1.0) == "99"


def test_a_shipped_comparison_is_named_with_what_its_rows_have_of_their_own(tmp_path: Path) -> None:
    config = load(CompareConfig, "compare-addition")
    bed = tmp_path / "addition"
    for seed in config.seeds:
        training = config.training("gapg_decision", lr=1e-4, seed=seed).model_dump(mode="json")
        write(bed, "gapg_decision", seed, OURS, threshold=2.5, asked=[0] * 5, config=training, ledger=LEDGER)
    shared = {**config.shared(), "rows_version": 1, "device_sha256": "0" * 64}

    def made_by(settings: dict[str, Any]) -> str:
        write_json(bed / "testbed.json", settings)
        write_report(tmp_path)
        [line] = [x for x in (tmp_path / "results.md").read_text().splitlines() if x.startswith("Made by")]
        assert line[8:].replace("`", "") in unescape((tmp_path / "report.html").read_text())
        return line

    whole = made_by(shared)
    assert whole.startswith("Made by `selfroute compare compare-addition --out OUT` (not there yet: Device only; ")
    assert "GAPG + decision loss" not in whole
    assert "lack" not in whole
    other = made_by({**shared, "num_samples": 2, "train": {**shared["train"], "steps": 2}})
    command = "Made by `selfroute compare compare-addition --out OUT` with other settings "
    assert other.startswith(f"{command}(num_samples, train.steps) at commit")
    training["sampling"]["forbid_help"] = False
    write(bed, "gapg_decision", 2, OURS, threshold=2.5, asked=[0] * 5, config=training, ledger=LEDGER)
    changed = made_by(shared)
    assert changed.startswith(f"{command}for GAPG + decision loss and what stands on it (sampling) (not there yet")
    shutil.rmtree(bed / "rows/gapg_decision")
    write(bed, "gapg_decision", 1, OURS, threshold=2.5, asked=[0] * 5, config=training, ledger=LEDGER)
    assert "(seeds that some rows lack: 0, 2)" in made_by(shared)


def test_processor_hours_are_those_of_trainings_and_searches(out: Path) -> None:
    bed = out / "bed"
    info = {"config": {"lr": 1e-4}, "ledger": {**LEDGER, "cpu_seconds": 3600.0}}
    write(bed, "gapg", 0, OTHER, threshold=3.5, asked=[0] * 5, **info)
    row = read_row(bed, "gapg", 0)
    for seed, more in ((0, {}), (1, {"same_as": "other"})):
        write_row(bed, "gapg", seed, {**info, "calibration": {"threshold": 3.5}, **more}, row.records, [{"step": 1}])
    ledger = {**LEDGER, "cpu_seconds": 1800.0}
    tried = {"0.0001": {"ledger": ledger}, "0.0002": {"ledger": ledger}}
    write_json(bed / "search/gapg.json", {"tried": tried, "chosen": 1e-4})
    assert cpu_hours(load_testbed(bed)) == pytest.approx(1.5)


@pytest.mark.parametrize("width", [80, 100, 140, 220, 300])
def test_the_terminals_table_fits_and_keeps_the_intervals_of_differences(out: Path, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    [table] = terminal_tables(write_report(out), console)
    console.print(table)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    [line] = [x for x in printed.splitlines() if "│ Hidden-state probe " in x]
    # 0.8 of ours at its own rate of 20 %, less 0.6; beside it, intervals of the others as far as they fit.
    assert "+20.0 [" in line
    assert line.count("[") == {80: 1, 100: 1, 140: 1, 220: 6, 300: 7}[width]


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no finished row yet"):
        write_report(tmp_path)


def test_the_report_is_the_same_twice(out: Path) -> None:
    write_report(out)
    names = ("compare.json", "report.html", "results.md", "numbers.csv", "seeds.csv", "curves.csv", "training.csv")
    first = {name: (out / name).read_bytes() for name in names}
    write_report(out)
    assert {name: (out / name).read_bytes() for name in names} == first
    assert read_json(out / "compare.json")
