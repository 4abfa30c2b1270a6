from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfroute.errors import RunError
from selfroute.evaluate.report import columns_of, rows, show, terminal_table, write_report
from selfroute.evaluate.run import Outcome, columns, write_outcomes
from selfroute.evaluate.summary import describe, summarise
from selfroute.records import append_record, write_json
from selfroute.train.config import TrainConfig


def outcome(n: int, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "problem": f"p{n}", "question": "q", "response": "r", "route": "device", "score": -1.0, "correct": True,
        "device_answer": "1", "device_correct": True, "device_reason": "makes 1", "device_solve_share": None,
        "cloud_answer": "1", "cloud_correct": True, "cloud_reason": "makes 1", "device_tokens": 10, "cloud_tokens": 500,
        "cloud_cost_usd": 0.001, "cloud_latency_s": 2.0,
    }  # fmt: skip
    return Outcome(**{**values, **changes})


# What the cloud's answer costs is known of every problem, and counts where it was asked.
ASKED = {"route": "cloud", "score": 2.0}
# Ten problems: six answered (five right), three asked (two rescued, one wasted), one undecided.
OUTCOMES = [
    *(outcome(n) for n in range(5)),
    outcome(5, correct=False, device_correct=False),
    outcome(6, **ASKED, device_correct=False, device_solve_share=0.2),
    outcome(7, **ASKED, device_correct=False, device_solve_share=0.4),
    outcome(8, **ASKED, device_solve_share=1.0, device_tokens=25),
    outcome(9, route="undecided", score=None, correct=False, device_correct=False, device_answer=None),
]


def test_the_decomposition_by_hand() -> None:
    untrained = [outcome(n, device_correct=n < 4) for n in reversed(range(10))]
    got = {k: v["value"] for k, v in describe(OUTCOMES, untrained=untrained, rate=0.3).items() if isinstance(v, dict)}
    expected = {
        "accuracy": 0.8,
        "call_rate": 0.3,
        "local_accuracy": 0.6,
        "undecided": 0.1,
        "accuracy_at_30": 0.8,
        "accuracy_where_answered": 5 / 7,
        "accuracy_where_asked": 1.0,
        "calls_that_rescued": 2 / 3,
        "calls_wasted": 1 / 3,
        "device_tokens": 11.5,
        "device_tokens_where_answered": 10,
        "device_tokens_where_asked": 15,
        "cloud_tokens": 150,
        "usd_per_1k": 0.3,
        "cloud_latency_s": 0.6,
        # random 0.72, oracle 0.9
        "routing_gain_captured": (0.8 - 0.72) / (0.9 - 0.72),
        "pgr_vs_trained": 0.5,
        "pgr_vs_untrained": (0.8 - 0.4) / (1 - 0.4),
    }
    assert {k: got[k] for k in expected} == pytest.approx(expected)


def test_columns_keep_the_undecided_last() -> None:
    c = columns(OUTCOMES)
    assert c.score[-1] == float("-inf")
    assert c.final.tolist() == [float(o.correct) for o in OUTCOMES]


def make_run(run: Path, **changes: Any) -> None:
    write_json(
        run / "run.json",
        {"command": "train", "config": TrainConfig(**changes).model_dump(mode="json"), "git": None,
         "versions": dict.fromkeys(("selfroute", "torch", "transformers"), "0")},
    )  # fmt: skip
    write_json(run / "checkpoints/step-000002/state.json", {})


def add(run: Path, name: str, outcomes: list[Outcome], checkpoint: str | None) -> None:
    write_outcomes(run / "evaluations" / name / "records.jsonl", outcomes)
    write_json(run / "evaluations" / name / "evaluation.json", {"checkpoint": checkpoint, "sampling": {}})


def test_evaluations_of_an_older_checkpoint_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RunError, match="no evaluation yet"):
        summarise(tmp_path)
    failing = [replace(o, device_correct=False) for o in OUTCOMES]
    add(tmp_path, "before", failing, None)
    add(tmp_path, "after", OUTCOMES, "step-000001")
    add(tmp_path, "budget-0.125", OUTCOMES, "step-000002")
    write_json(tmp_path / "calibration.json", {"checkpoint": "step-000001", "budgets": {"0.125": {}}})
    summary = summarise(tmp_path)
    assert "before" in summary
    assert "after" not in summary
    assert "accuracy_at_12.5" in summary["at_budget_12.5"]
    # The bounds stand on the trained model, of which 6 in 10 are right, not on the untrained one.
    assert summary["random_at_12.5"]["accuracy"]["value"] == pytest.approx(0.875 * 0.6 + 0.125)
    assert summary["random_at_30"]["accuracy"]["value"] == pytest.approx(0.7 * 0.6 + 0.3)
    assert "calibration" not in summary
    write_json(tmp_path / "calibration.json", {"checkpoint": "step-000002", "budgets": {"0.125": {}}})
    assert summarise(tmp_path)["calibration"] == {"0.125": {}}


def test_own_decisions_are_read_at_the_runs_own_budget(tmp_path: Path) -> None:
    make_run(tmp_path, budget=0.2)
    add(tmp_path, "after", OUTCOMES, "step-000002")
    summary = summarise(tmp_path)
    assert "accuracy_at_20" in summary["after"]
    assert {"random_at_20", "oracle_at_20"} <= set(summary)
    assert "random_at_30" not in summary


def test_the_page_escapes_what_models_write(tmp_path: Path) -> None:
    make_run(tmp_path)
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    hostile = [outcome(n, question=evil, response=evil, device_reason=evil) for n in range(3)]
    add(tmp_path, "after", [*hostile, *OUTCOMES[3:]], "step-000002")
    append_record(tmp_path / "metrics.jsonl", {"step": 1, **_step()})
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    for name in ("curve.png", "curve.svg", "training.png", "training.svg", "summary.json"):
        assert (tmp_path / name).stat().st_size > 0


def _step() -> dict[str, Any]:
    return {
        "reward": 0.5, "local_accuracy": 0.5, "help": 0.1, "wrong": 0.3, "undecided": 0.1, "d1": 3, "d2": 1,
        "dual": 0.0, "cloud_calls": 4, "cost_usd": 0.01, "cloud_tokens": 9, "device_tokens": 100,
        "seconds": {"total": 1.0, "cpu": 2.0},
    }  # fmt: skip


def test_only_the_untrained_model_makes_a_page_too(tmp_path: Path) -> None:
    make_run(tmp_path)
    add(tmp_path, "before", OUTCOMES, None)
    summary = write_report(tmp_path)
    labels = [label for label, _ in rows(summary)]
    assert "untrained, own decision" in labels
    assert not any(label.startswith("selfroute") for label in labels)


@pytest.mark.parametrize(("width", "intervals"), [(200, True), (100, False), (80, False)])
def test_the_terminal_table_cuts_no_number(tmp_path: Path, width: int, intervals: bool) -> None:
    make_run(tmp_path)
    for name in ("before", "after"):
        add(tmp_path, name, OUTCOMES, None if name == "before" else "step-000002")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal_table(summarise(tmp_path), console))
    text = console.export_text()
    assert "…" not in text
    assert "0.300" in text
    assert ("80.0 [" in text) == intervals


@pytest.mark.parametrize("width", [45, 50, 60, 79])
def test_a_narrow_terminal_shows_the_numbers_and_folds_the_labels(tmp_path: Path, width: int) -> None:
    make_run(tmp_path)
    for name in ("after", "after@countdown-tiny-q4_0-on-a-phone"):
        add(tmp_path, name, OUTCOMES, "step-000002")
    console = Console(width=width, record=True, file=io.StringIO())
    summary = summarise(tmp_path)
    console.print(terminal_table(summary, console))
    text = console.export_text()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    cells = summary["after@countdown-tiny-q4_0-on-a-phone"]
    shown = [show(cells, name, scale).partition(" ")[0] for name, _, scale in columns_of(summary)]
    numbers = r"\s+".join(map(re.escape, shown))
    # Two rows of the model, one of them on the engine.
    assert len(re.findall(numbers, text)) == 2
    assert ("accuracy" in text) == (width >= 60)


def test_an_engines_evaluations_stand_beside_those_in_process(tmp_path: Path) -> None:
    make_run(tmp_path)
    failing = [replace(o, device_correct=False, correct=o.route == "cloud") for o in OUTCOMES]
    add(tmp_path, "after@demo-q4_0", failing, "step-000002")
    add(tmp_path, "budget-0.3@demo-q4_0", failing, "step-000002")
    add(tmp_path, "after", OUTCOMES, "step-000002")
    summary = write_report(tmp_path)
    assert summary["after"]["accuracy"]["value"] == 0.8
    assert summary["after@demo-q4_0"]["accuracy"]["value"] == 0.3
    assert summary["at_budget_30@demo-q4_0"]["accuracy"]["value"] == 0.3
    # The bounds stand on the model in process.
    assert summary["random_at_30"]["accuracy"]["value"] == pytest.approx(0.7 * 0.6 + 0.3)
    assert {
        "selfroute, own decision": 0.8,
        "selfroute, own decision, on demo-q4_0": 0.3,
        "selfroute, budget 30 %, on demo-q4_0": 0.3,
    }.items() <= {label: cells["accuracy"]["value"] for label, cells in rows(summary)}.items()


def test_numbers_for_people() -> None:
    assert show({"a": {"value": 0.5, "low": 0.41, "high": 0.6}}, "a", 100) == "50.0 [41.0, 60.0]"
    assert show({"a": {"value": 0.3, "low": 0.3, "high": 0.3}}, "a", 100) == "30.0"
    assert show({"a": {"value": 1234.5, "low": 1, "high": 2}}, "a", 1) == "1,234.5"
    assert show({"a": None}, "a", 100) == show({}, "a", 100) == "–"


def test_a_mean_score_stands_beside_the_accuracy_where_answers_are_graded(tmp_path: Path) -> None:
    found = describe(OUTCOMES, untrained=None, rate=0.3)
    # The undecided one has no grade, and counts nothing.
    marked = [replace(o, device_grade=0.5 if o.device_answer else None, cloud_grade=0.9) for o in OUTCOMES]
    graded = describe(marked, untrained=None, rate=0.3)
    means = {"mean_score": (6 * 0.5 + 3 * 0.9) / 10, "local_mean_score": 9 * 0.5 / 10}
    assert {name: graded.pop(name)["value"] for name in means} == pytest.approx(means)
    assert graded == found
    make_run(tmp_path)
    for outcomes in (OUTCOMES, marked):
        add(tmp_path, "after", outcomes, "step-000002")
        summary = write_report(tmp_path)
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(terminal_table(summary, console))
        page, text = (tmp_path / "report.html").read_text(), console.export_text()
        assert [("mean score" in page, "mean score" in text)] == [(outcomes is marked,) * 2]
    assert summary["cloud"]["mean_score"]["value"] == pytest.approx(0.9)
    cells = dict(rows(summary))
    assert cells["trained device model, alone"]["mean_score"]["value"] == pytest.approx(0.45)
