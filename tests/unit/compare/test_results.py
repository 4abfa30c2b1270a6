"""Every measure of a comparison against hand-computed small cases."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfroute.compare.report import write_report
from selfroute.compare.results import _interval, load_testbed, summarise
from selfroute.compare.rows import Record, read_row, write_row
from selfroute.errors import RunError
from selfroute.records import write_json


def write(
    folder: Path,
    method: str,
    seed: int,
    rows: list[tuple[float | None, int, int]],
    *,
    threshold: float | None = None,
    asked: list[int] | None = None,
    **info: Any,
) -> None:
    """A row of (score, device, cloud) per problem."""
    write_json(folder / "testbed.json", {"train": {"budget": 0.3}})
    records = [
        Record(
            problem=f"p-{n}",
            score=score,
            undecided=False,
            asked=None if asked is None else bool(asked[n]),
            response=None,
            answer="1",
            device_correct=bool(device),
            device_tokens=10 * (n + 1),
            cloud_correct=bool(cloud),
            cloud_tokens=100,
            cloud_cost_usd=0.001,
            solve_share=0.75 if device else 0.0,
        )
        for n, (score, device, cloud) in enumerate(rows)
    ]
    if threshold is not None:
        info["calibration"] = {"threshold": threshold}
    write_row(folder, method, seed, info, records)


OURS = [(4.0, 0, 1), (3.0, 0, 1), (2.0, 1, 1), (1.0, 1, 1), (0.0, 1, 0)]
"""Asks rightly: accuracy 0.6, 0.8, 1, 1, 1, 0.8 along the dial."""
OTHER = [(0.0, 0, 1), (1.0, 1, 1), (2.0, 1, 1), (3.0, 1, 1), (4.0, 0, 0)]
"""Asks wrongly: accuracy 0.6, 0.6, 0.6, 0.6, 0.6, 0.8."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bed = tmp_path / "bed"
    for seed in (0, 1):
        write(bed, "gapg_decision", seed, OURS, threshold=2.5, asked=[1, 0, 0, 0, 0])
        write(bed, "da_grpo", seed, OTHER, threshold=3.5, asked=[0] * 5)
        write(bed, "device_only", seed, [(None, d, c) for _, d, c in OTHER], asked=[0] * 5)
        write(bed, "cloud_only", seed, [(None, d, c) for _, d, c in OTHER], asked=[1] * 5)
    return bed


def table(folder: Path, resamples: int = 50) -> dict[str, dict[str, Any]]:
    return {r["method"]: r for r in summarise(load_testbed(folder), resamples=resamples)}


def test_measures_by_hand(folder: Path) -> None:
    found = table(folder)
    ours, other = found["gapg_decision"], found["da_grpo"]

    def value(row: dict[str, Any], name: str) -> float:
        return row[name]["value"]

    assert list(found) == ["device_only", "cloud_only", "gapg_decision", "da_grpo"]
    assert (value(ours, "call_rate"), value(ours, "accuracy")) == (0.4, 1.0)
    assert value(ours, "accuracy_at_30") == pytest.approx(0.9)
    assert value(ours, "local_accuracy") == pytest.approx(0.6)
    assert value(ours, "own_call_rate") == pytest.approx(0.2)
    assert value(ours, "own_accuracy") == pytest.approx(0.8)
    # random 0.6 * 0.6 + 0.4 * 0.8, oracle 0.6 + 1 * 0.4
    assert value(ours, "routing_gain_captured") == pytest.approx((1 - 0.68) / (1 - 0.68))
    assert value(ours, "oracle_at_30") == pytest.approx(0.9)
    assert value(ours, "random_at_30") == pytest.approx(0.7 * 0.6 + 0.3 * 0.8)
    assert value(ours, "calls_that_rescued") == 1.0
    assert value(ours, "calls_wasted") == 0.0
    assert value(ours, "accuracy_where_answered") == 1.0
    assert value(ours, "device_tokens") == pytest.approx(30)
    assert value(ours, "cloud_tokens") == pytest.approx(40)
    assert value(ours, "usd_per_1k") == pytest.approx(0.4)
    # 0.6, 0.8, 1, 1, 1, 0.8 less 0.6, over 0.2: 0, 1, 2, 2, 2, 1
    assert value(ours, "apgr") == pytest.approx((0 + 1 + 2 + 2 + 2 + 0.5) / 5)
    assert value(ours, "cpt_50") == pytest.approx(0.2)
    assert value(ours, "area") == pytest.approx((0.3 + 0.8 + 1 + 1 + 1 + 0.4) / 5)
    assert value(ours, "difference_to_ours") == pytest.approx(0.8 + 0.2 - 1.0)
    # The other calls one problem of five, for nothing: 0.6 where ours has 0.8.
    assert (value(other, "call_rate"), value(other, "accuracy")) == (0.2, 0.6)
    assert value(other, "difference_to_ours") == pytest.approx(0.2)
    assert value(other, "difference_at_30") == pytest.approx(0.9 - 0.6)
    assert value(other, "own_difference_to_ours") == pytest.approx(0.0)
    assert value(other, "calls_that_rescued") == 0.0
    assert value(other, "pgr_vs_untrained") == pytest.approx(0.0)
    assert value(other, "cpt_80") == 1.0


def test_a_router_that_decides_on_the_prompt_spares_the_device(tmp_path: Path) -> None:
    for method, info in (("router", {"prompt_only": True}), ("probe", {})):
        write(tmp_path / "bed", method, 0, OURS, threshold=2.5, **info)
    found = table(tmp_path / "bed")
    # Tokens are 10 to 50; the first two problems go to the cloud.
    assert found["probe"]["device_tokens"]["value"] == pytest.approx(30)
    assert found["router"]["device_tokens"]["value"] == pytest.approx((30 + 40 + 50) / 5)


def test_scores_that_only_place_a_response_are_left_out_of_the_auc(tmp_path: Path) -> None:
    rows = [(2.0, 0, 1), (1.0, 1, 1), (None, 0, 1), (None, 1, 1)]
    write(tmp_path / "bed", "gapg_decision", 0, rows, threshold=1.5, asked=[0] * 4)
    assert table(tmp_path / "bed")["gapg_decision"]["decision_auc"]["value"] == 1.0


def test_points_have_no_curve(folder: Path) -> None:
    found = table(folder)
    for name in ("accuracy_at_30", "apgr", "cpt_50", "area", "difference_at_30", "own_call_rate"):
        assert found["device_only"][name] is None
        assert found["cloud_only"][name] is None
    assert found["device_only"]["difference_to_ours"]["value"] == pytest.approx(0.0)
    assert found["cloud_only"]["difference_to_ours"]["value"] == pytest.approx(0.0)
    assert found["cloud_only"]["local_accuracy"] is None
    assert found["cloud_only"]["device_tokens"] is None


def test_an_interval_joins_problems_and_seeds() -> None:
    """Student's t of 0.5, 0.6 and 0.7: 4.3027 * 0.1 / sqrt(3) = 0.2484; beside it the draws' quantiles."""
    spread = [0.6 + 0.04 * x for x in np.linspace(-1, 1, 41)]
    found = _interval("apgr", [0.5, 0.6, 0.7], spread)
    assert found.value == pytest.approx(0.6)
    # Quantiles of 41 even steps: 0.95 * 0.04 on each side.
    assert 0.6 - found.low == pytest.approx(math.hypot(0.038, 0.2484), abs=1e-4)
    assert found.high - 0.6 == pytest.approx(math.hypot(0.038, 0.2484), abs=1e-4)
    alone = _interval("apgr", [0.6], spread)
    assert (alone.low, alone.high) == (pytest.approx(0.562), pytest.approx(0.638))
    assert _interval("accuracy", [0.9, 0.6, 0.9], spread).high == 1.0
    assert _interval("difference_to_ours", [0.9, 0.6, 0.9], spread).high > 1.0
    assert _interval("accuracy", [0.5, math.nan, 0.7], spread).value == pytest.approx(0.6)
    assert math.isnan(_interval("apgr", [math.nan], []).value)


def test_intervals_of_three_seeds_hold_the_truth() -> None:
    """Where seeds differ more than problems do, a bootstrap of three of them would hold it three times in four."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = list(rng.normal(0.5, 0.04, 3))
        found = _interval("apgr", values, [sum(values) / 3])
        held += found.low <= 0.5 <= found.high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(("score", "alone"), [(None, 3.0), (-1.0, 3.0), (1.5, 3.2), (3.0, 3.2)])
def test_by_a_score_alone_what_has_no_answer_is_asked_as_it_says(
    score: float | None, alone: float, tmp_path: Path
) -> None:
    """And last where it says nothing."""
    rows = [(score, 0, 1), (2.0, 0, 1), (1.0, 1, 1), (0.0, 1, 0)]
    write(tmp_path / "bed", "gapg", 0, rows, threshold=1.5, asked=[0] * 4)
    first, *others = read_row(tmp_path / "bed", "gapg", 0).records
    info = {"calibration": {"threshold": 1.5}}
    write_row(tmp_path / "bed", "gapg", 0, info, [replace(first, undecided=True), *others])
    found = table(tmp_path / "bed")["gapg"]
    # At 30 % of 4 problems: the first, and a fifth of the second, and alone the two that it says.
    assert found["accuracy_at_30"]["value"] == pytest.approx((2 + 1 + 0.2) / 4)
    assert found["score_alone_at_30"]["value"] == pytest.approx(alone / 4)
    assert found["decision_auc"]["value"] == 1.0


def test_a_difference_is_paired(tmp_path: Path) -> None:
    """The same responses under another name differ by exactly nothing in every draw; accuracy itself is uncertain."""
    rng = np.random.default_rng(0)
    rows = [(float(rng.normal()), int(rng.random() < 0.5), int(rng.random() < 0.9)) for _ in range(60)]
    for seed in (0, 1, 2):
        for method in ("gapg_decision", "gapg"):
            write(tmp_path / "bed", method, seed, rows, threshold=0.5, asked=[0] * 60)
    row = table(tmp_path / "bed")["gapg"]
    assert row["difference_at_30"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert row["accuracy_at_30"]["low"] < row["accuracy_at_30"]["value"] < row["accuracy_at_30"]["high"]


def test_intervals_are_seeded_and_widen_with_seeds_that_disagree(tmp_path: Path) -> None:
    agree, disagree = tmp_path / "agree", tmp_path / "disagree"
    good, bad = [(float(n), n % 2, 1) for n in range(40)], [(float(n), 0, 1) for n in range(40)]
    for seed in (0, 1, 2):
        write(agree, "gapg", seed, good, threshold=30.5, asked=[0] * 40)
        write(disagree, "gapg", seed, good if seed else bad, threshold=30.5, asked=[0] * 40)
    first, again = table(agree, 300)["gapg"], table(agree, 300)["gapg"]
    assert first == again
    other = table(disagree, 300)["gapg"]["local_accuracy"]
    assert other["value"] == pytest.approx(1 / 3)
    assert other["high"] - other["low"] > first["local_accuracy"]["high"] - first["local_accuracy"]["low"]


def test_without_ours_for_every_seed_there_is_no_difference(folder: Path) -> None:
    write(folder, "gapg", 7, OTHER, threshold=3.5, asked=[0] * 5)
    row = table(folder)["gapg"]
    assert row["difference_to_ours"] is None
    assert row["seeds"] == [7]


def test_one_problem(tmp_path: Path) -> None:
    write(tmp_path / "bed", "gapg_decision", 0, [(1.0, 0, 1)], threshold=0.0, asked=[1])
    row = table(tmp_path / "bed")["gapg_decision"]
    assert row["accuracy"]["value"] == 1.0
    assert row["apgr"]["value"] == pytest.approx(0.5)
    assert row["accuracy_where_answered"] is None
    assert row["decision_auc"] is None


def test_dips_are_named(tmp_path: Path) -> None:
    rows = [(4.0, 0, 1), (3.0, 1, 0), (2.0, 0, 1), (1.0, 0, 1)]
    write(tmp_path / "bed", "gapg_decision", 0, rows, threshold=9.0, asked=[0] * 4)
    assert table(tmp_path / "bed")["gapg_decision"]["not_monotone"] == ["cpt_50"]


def test_rows_of_other_problems_are_refused(folder: Path) -> None:
    write(folder, "gapg", 0, OTHER[:3], threshold=3.5, asked=[0] * 3)
    with pytest.raises(RunError, match="different test problems"):
        load_testbed(folder)


def test_the_ledger_adds_a_routers_own_fit_and_the_searches_validations(tmp_path: Path) -> None:
    ledger = {"cloud_calls": 10, "cost_usd": 0.5, "device_tokens": 1000, "seconds": 60.0, "cpu_seconds": 50.0}
    bed, config = tmp_path / "bed", {"lr": 1e-4}
    write(bed, "task_tuning", 0, OTHER, asked=[0] * 5, ledger=ledger, config=config)
    fit = {"device_tokens": 500, "seconds": 5.0, "cpu_seconds": 4.0}
    write(bed, "probe", 0, OTHER, threshold=3.5, ledger=ledger, config=config, fit=fit)
    found = table(bed)

    def values(method: str, kind: str, *keys: str) -> list[float]:
        return [found[method][f"{kind}_{key}"] for key in keys]

    train = ("cloud_calls", "device_tokens", "seconds", "cpu_seconds")
    assert values("task_tuning", "train", *train) == [10, 1000, 60, 50]
    assert values("probe", "train", *train) == [10, 1500, 65, 54]
    assert found["probe"]["search_cpu_seconds"] is None
    validated = {"cloud_calls": 40, "cost_usd": 0.04, "seconds": 3.0, "cpu_seconds": 2.0}
    tried = {
        "0.0001": {"validation": 0.5, "ledger": ledger, "validated": validated},
        "0.0002": {"validation": 0.4, "ledger": ledger, "validated": validated},
        "0.1": {"validation": None, "ledger": None},
    }
    write_json(bed / "search/task_tuning.json", {"tried": tried, "chosen": 1e-4})
    found = table(bed)
    for method in ("task_tuning", "probe"):
        assert values(method, "search", "cloud_calls", "cost_usd", "cpu_seconds") == [90, 0.58, 54]


def test_a_mean_score_is_measured_where_answers_are_graded(folder: Path) -> None:
    plain = table(folder)
    assert "mean_score" not in plain["gapg_decision"]
    for method in ("gapg_decision", "device_only", "cloud_only"):
        for seed in (0, 1):
            row = read_row(folder, method, seed)
            marked = [replace(r, device_grade=0.2 * n, cloud_grade=0.9) for n, r in enumerate(row.records)]
            info = {k: v for k, v in row.info.items() if k not in ("schema", "method", "seed", "git", "versions")}
            write_row(folder, method, seed, info, marked)
    found = table(folder)
    # Ours asks about the first two of five, by its threshold.
    assert found["gapg_decision"]["mean_score"]["value"] == pytest.approx((2 * 0.9 + 0.4 + 0.6 + 0.8) / 5)
    assert found["device_only"]["mean_score"]["value"] == pytest.approx(0.4)
    assert found["cloud_only"]["mean_score"]["value"] == pytest.approx(0.9)
    # A row of before grades.
    assert found["da_grpo"]["mean_score"] is None
    for method, row in found.items():
        assert {k: v for k, v in row.items() if k != "mean_score"} == plain[method]
    write_json(folder / "testbed.json", {"train": {"budget": 0.3, "task": {"name": "judge"}}})
    write_report(folder.parent)
    assert "<th>mean score</th>" in (folder.parent / "report.html").read_text()
    assert "| mean score |" in (folder.parent / "results.md").read_text()
    assert "mean_score" in (folder.parent / "numbers.csv").read_text()
