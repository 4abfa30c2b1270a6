"""What a run directory says: every number of the report, with its interval, from the records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfroute import measures
from selfroute.cloud.memory import spent_by_phase
from selfroute.errors import RunError
from selfroute.evaluate.run import Outcome, columns, read_outcomes
from selfroute.measures import Floats, Measure, bootstrap, proportion
from selfroute.records import best_checkpoint, checkpoints, read_json, read_records, results

BOUNDS = {
    "random": measures.random_accuracy,
    "oracle": measures.oracle_accuracy,
    "clairvoyant": measures.clairvoyant_accuracy,
}


def evaluations(run: Path, *, best: bool = False) -> dict[str, list[Outcome]]:
    """The evaluations of a run's test problems, by name: of the newest checkpoint, or the best, and of the model
    before; those of other checkpoints are left out."""
    shown = _shown(run, best)
    before = (run / "evaluations").glob("before/evaluation.json")
    found = {
        path.parent.name: path for path in (*before, *results(run, best=best).glob("evaluations/*/evaluation.json"))
    }
    return {
        name: read_outcomes(path.parent / "records.jsonl")
        for name, path in sorted(found.items())
        if read_json(path)["checkpoint"] in (None, shown)
    }


def _shown(run: Path, best: bool) -> str | None:
    """The name of the newest checkpoint, or of the best; None where there is none."""
    checkpoint = best_checkpoint(run) if best else next(reversed(checkpoints(run)), None)
    return checkpoint.name if checkpoint else None


def reference(found: Mapping[str, Sequence[Outcome]]) -> Sequence[Outcome]:
    """The evaluation that the bounds and the page stand on: the trained model's, if there is one, best in process."""
    trained = sorted((name for name in found if name != "before"), key=engine_of)
    return found["after" if "after" in found else trained[0] if trained else "before"]


def summarise(run: Path, *, best: bool = False) -> dict[str, Any]:
    """The content of summary.json, of the newest checkpoint or the best; what was not evaluated is left out.

    Raises:
        RunError: the run has no evaluation at all.
    """
    found = evaluations(run, best=best)
    if not found:
        raise RunError(f"{run} has no evaluation yet: selfroute evaluate {run}{' --best' if best else ''}")
    summary: dict[str, Any] = {}
    usual: float = read_json(run / "run.json")["config"]["budget"]
    for name, outcomes in found.items():
        budget = budget_of(name)
        rate = usual if budget is None else budget
        summary[key_of(name)] = describe(outcomes, untrained=found.get("before"), rate=rate)
    stand = columns(reference(found))
    for rate in sorted({usual, *(b for b in map(budget_of, found) if b is not None)}):
        for name, bound in BOUNDS.items():
            accuracy = bootstrap(stand, partial(bound, call_rate=rate))
            summary[f"{name}_at_{100 * rate:g}"] = {"accuracy": accuracy.json()}
    summary["cloud"] = {"accuracy": proportion(stand.cloud).json()}
    if stand.cloud_score is not None:
        summary["cloud"]["mean_score"] = _mean(stand.cloud_score).json()
    calibration = results(run, best=best) / "calibration.json"
    if calibration.is_file():
        known = read_json(calibration)
        if known["checkpoint"] == _shown(run, best):
            summary["calibration"] = known["budgets"]
    summary["train"] = training(run)
    judge = spent_by_phase(run / "judge.sqlite")
    if judge:
        summary["judge"] = {phase: asdict(spent) for phase, spent in judge.items()}
    return summary


def budget_of(name: str) -> float | None:
    """The budget in an evaluation's name, `budget-0.3`; None for other names.

    >>> budget_of("budget-0.3@demo-q8_0"), budget_of("after")
    (0.3, None)
    """
    kind, dash, value = name.partition("@")[0].partition("-")
    return float(value) if dash and kind == "budget" else None


def key_of(name: str) -> str:
    """An evaluation's key in the summary: `before`, `after`, or `at_budget_30`; with `@MODEL` of an engine by URL."""
    budget, engine = budget_of(name), engine_of(name)
    return name if budget is None else f"at_budget_{100 * budget:g}" + (f"@{engine}" if engine else "")


def engine_of(name: str) -> str:
    """The model of an engine by URL in an evaluation's name, `after@demo-q8_0`; empty in process."""
    return name.partition("@")[2]


def describe(outcomes: Sequence[Outcome], *, untrained: Sequence[Outcome] | None, rate: float) -> dict[str, Any]:
    """The measures of one evaluation.

    Args:
        outcomes: the evaluation's.
        untrained: the evaluation of the model before training, on the same problems.
        rate: the call rate that accuracy is read at, off this evaluation's own curve.
    """
    c = columns(outcomes)
    if untrained is not None:
        solved = {o.problem: float(o.device_correct) for o in untrained}
        c = replace(c, untrained=np.array([solved[o.problem] for o in outcomes]))
    asked = c.asked > 0
    calls = [o for o in outcomes if o.route == "cloud"]
    shares = np.array([o.device_solve_share for o in calls if o.device_solve_share is not None])
    values: dict[str, Measure] = {
        "accuracy": proportion(c.final),
        "call_rate": proportion(c.asked),
        "local_accuracy": proportion(c.device),
        "undecided": proportion(np.array([float(o.route == "undecided") for o in outcomes])),
        "decision_auc": bootstrap(c, measures.decision_auc),
        f"accuracy_at_{100 * rate:g}": bootstrap(c, partial(measures.accuracy_at, call_rate=rate)),
        "routing_gain_captured": bootstrap(c, measures.routing_gain_captured),
        "pgr_vs_trained": bootstrap(c, measures.pgr_vs_trained),
        "pgr_vs_untrained": bootstrap(c, measures.pgr_vs_untrained),
        "apgr": bootstrap(c, measures.average_pgr),
        "cpt_50": bootstrap(c, partial(measures.call_rate_for, recovered=0.5)),
        "cpt_80": bootstrap(c, partial(measures.call_rate_for, recovered=0.8)),
        # The decomposition: where the accuracy comes from, and what the calls bought.
        "accuracy_where_answered": proportion(c.device[~asked]),
        "accuracy_where_asked": proportion(c.cloud[asked]),
        "calls_that_rescued": proportion(((c.device == 0) & (c.cloud == 1))[asked].astype(float)),
        "calls_wasted": proportion((shares > 0.5).astype(float)),
        "device_tokens": _mean([o.device_tokens for o in outcomes]),
        "device_tokens_where_answered": _mean([o.device_tokens for o in outcomes if o.route == "device"]),
        "device_tokens_where_asked": _mean([o.device_tokens for o in calls]),
        "cloud_tokens": _mean([o.cloud_tokens * (o.route == "cloud") for o in outcomes]),
        "usd_per_1k": _mean([1000 * o.cost_usd for o in outcomes]),
        "cloud_latency_s": _mean([o.cloud_latency_s * (o.route == "cloud") for o in outcomes]),
    }
    if c.final_score is not None and c.device_score is not None:
        values |= {"mean_score": _mean(c.final_score), "local_mean_score": _mean(c.device_score)}
    return {"problems": len(outcomes), **{name: m.json() for name, m in values.items()}}


def _mean(values: Sequence[float] | Floats) -> Measure:
    """A mean with its normal interval; NaN of nothing."""
    if not len(values):
        return Measure(math.nan, math.nan, math.nan)
    mean, half = float(np.mean(values)), 1.959964 * float(np.std(values)) / len(values) ** 0.5
    return Measure(mean, mean - half, mean + half)


def training(run: Path) -> dict[str, Any]:
    """The ledger of the training: what it called, spent and took."""
    metrics = run / "metrics.jsonl"
    steps = read_records(metrics) if metrics.is_file() else []
    seconds = sum(s["seconds"]["total"] for s in steps)
    return {
        "steps": len(steps),
        "cloud_calls": steps[-1]["cloud_calls"] if steps else 0,
        "cost_usd": steps[-1]["cost_usd"] if steps else 0.0,
        "cloud_tokens": steps[-1]["cloud_tokens"] if steps else 0,
        "device_tokens": sum(s["device_tokens"] for s in steps),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(s["seconds"]["cpu"] for s in steps), 1),
        "seconds_per_step": round(seconds / len(steps), 3) if steps else 0.0,
    }
