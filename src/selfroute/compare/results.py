"""What finished rows are worth: every measure with its interval, and every difference to ours, paired.

Seeds share their test problems. A measure of a method is its mean over seeds. Its 95 % interval joins two
uncertainties as independent ones: that of the problems, a percentile bootstrap that draws them with replacement, the
same for all methods and seeds, and that of the seeds, Student's t of their values. (A bootstrap of three seeds would
end at the worst and the best of them, and hold the truth in less than 95 % of cases.) A difference is one of the same
problems and seeds in both. With one seed the interval is of the problems alone. Left out on purpose: how the numbers
look (report).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from selfroute import measures
from selfroute.compare.checks import base_of, check_base, check_place
from selfroute.compare.methods import METHODS, OURS
from selfroute.compare.rows import ASK_FIRST, Row, methods_of, ordering, read_row, seeds_of
from selfroute.errors import RunError
from selfroute.measures import Columns, Floats, Measure
from selfroute.records import read_json

RESAMPLES = 1000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Cell:
    """One method's test problems under one seed, as arrays of N problems.

    `columns.asked` is what the method asks at the budget: by its threshold where it has a score, else by its own
    decision, which is also in `own` (None for a router, which makes none). `answers` is off where no device takes part.
    """

    columns: Columns
    own: Floats | None
    scored: bool
    answers: bool
    prompt_only: bool
    device_tokens: Floats
    cloud_tokens: Floats
    cost_usd: Floats
    solve_share: Floats
    unanswered: Floats
    alone: Columns
    """`columns` with the score as recorded, in place of that by which a response without a readable answer is asked
    first; of what has none, a place below all others."""

    @classmethod
    def of(cls, row: Row, untrained: Row | None) -> Cell:
        calibration = row.info.get("calibration")
        columns = row.columns(calibration["threshold"] if calibration else None)
        if untrained is not None:
            solved = {r.problem: float(r.device_correct) for r in untrained.records}
            known = np.array([solved.get(r.problem, math.nan) for r in row.records])
            columns = replace(columns, untrained=known)
        decides = row.records[0].asked is not None
        return cls(
            columns=columns,
            own=np.array([float(bool(r.asked)) for r in row.records]) if decides else None,
            scored=calibration is not None,
            answers=row.method != "cloud_only",
            prompt_only=row.info.get("prompt_only", False),
            device_tokens=np.array([float(r.device_tokens) for r in row.records]),
            cloud_tokens=np.array([float(r.cloud_tokens) for r in row.records]),
            cost_usd=np.array([r.cloud_cost_usd for r in row.records]),
            solve_share=np.array([math.nan if r.solve_share is None else r.solve_share for r in row.records]),
            unanswered=np.array([float(r.answer is None) for r in row.records]),
            alone=replace(
                columns, score=np.array([ordering(r.problem, r.score, undecided=False) for r in row.records])
            ),
        )

    def take(self, index: NDArray[np.int64]) -> Cell:
        return replace(
            self,
            columns=self.columns.take(index),
            own=None if self.own is None else self.own[index],
            device_tokens=self.device_tokens[index],
            cloud_tokens=self.cloud_tokens[index],
            cost_usd=self.cost_usd[index],
            solve_share=self.solve_share[index],
            unanswered=self.unanswered[index],
            alone=self.alone.take(index),
        )


def measure(cell: Cell, ours: Cell | None, budget: float) -> dict[str, float]:
    """Every measure of one method under one seed; NaN where it has none.

    `difference_*` is ours less the method's, positive where ours is ahead, with ours read off its curve at the method's
    own realised call rate (or both at the budget).
    """
    c, asked = cell.columns, cell.columns.asked > 0
    at = f"{100 * budget:g}"
    rate, accuracy = float(c.asked.mean()), float(c.final.mean())
    wasted = cell.solve_share[asked & ~np.isnan(cell.solve_share)]
    values = {
        "call_rate": rate,
        "accuracy": accuracy,
        "local_accuracy": float(c.device.mean()),
        "routing_gain_captured": measures.routing_gain_captured(c),
        "pgr_vs_trained": measures.pgr_vs_trained(c),
        "pgr_vs_untrained": measures.pgr_vs_untrained(c),
        f"oracle_at_{at}": measures.oracle_accuracy(c, budget),
        f"random_at_{at}": measures.random_accuracy(c, budget),
        f"clairvoyant_at_{at}": measures.clairvoyant_accuracy(c, budget),
        "accuracy_where_answered": _mean(c.device[~asked]),
        "accuracy_where_asked": _mean(c.cloud[asked]),
        "calls_that_rescued": _mean(((c.device == 0) & (c.cloud == 1))[asked]),
        "calls_wasted": _mean(wasted > 0.5),
        "unanswered": float(cell.unanswered.mean()),
        # A router that decides on the prompt spares the device what it sends away.
        "device_tokens": _mean(cell.device_tokens * (1 - c.asked) if cell.prompt_only else cell.device_tokens),
        "cloud_tokens": float((cell.cloud_tokens * c.asked).mean()),
        "usd_per_1k": float((1000 * cell.cost_usd * c.asked).mean()),
    }
    if c.final_score is not None:
        values["mean_score"] = float(c.final_score.mean())
    if not cell.answers:
        kept = ("call_rate", "accuracy", "mean_score", "cloud_tokens", "usd_per_1k")
        values = {k: v for k, v in values.items() if k in kept}
    if cell.scored:
        values |= {
            f"accuracy_at_{at}": measures.accuracy_at(c, budget),
            f"score_alone_at_{at}": measures.accuracy_at(cell.alone, budget),
            "area": measures.area(c),
            "apgr": measures.average_pgr(c),
            "cpt_50": measures.call_rate_for(c, 0.5),
            "cpt_80": measures.call_rate_for(c, 0.8),
            # Those without a readable answer are asked first, and not by a score of theirs.
            "decision_auc": measures.decision_auc(c, np.abs(c.score) < ASK_FIRST),
        }
    if ours is not None:
        values["difference_to_ours"] = measures.accuracy_at(ours.columns, rate) - accuracy
        if cell.scored:
            values[f"difference_at_{at}"] = measures.accuracy_at(ours.columns, budget) - measures.accuracy_at(c, budget)
            alone = measures.accuracy_at(ours.alone, budget) - measures.accuracy_at(cell.alone, budget)
            values[f"score_alone_difference_at_{at}"] = alone
    if cell.own is not None and cell.scored:
        own_rate = float(cell.own.mean())
        own_accuracy = float(np.where(cell.own > 0, c.cloud, c.device).mean())
        values |= {"own_call_rate": own_rate, "own_accuracy": own_accuracy}
        if ours is not None:
            values["own_difference_to_ours"] = measures.accuracy_at(ours.columns, own_rate) - own_accuracy
    return values


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def names(budget: float, *, graded: bool) -> list[str]:
    """Every measure's name, in order; a mean score is one where answers are graded."""
    at = f"{100 * budget:g}"
    return [
        *("call_rate", "accuracy", f"accuracy_at_{at}", "local_accuracy", "routing_gain_captured", "apgr"),
        *("difference_to_ours", f"difference_at_{at}", "own_call_rate", "own_accuracy", "own_difference_to_ours"),
        *(f"score_alone_at_{at}", f"score_alone_difference_at_{at}"),
        *("cpt_50", "cpt_80", "area", "decision_auc", "pgr_vs_trained", "pgr_vs_untrained"),
        *(f"random_at_{at}", f"oracle_at_{at}", f"clairvoyant_at_{at}"),
        *("accuracy_where_answered", "accuracy_where_asked", "calls_that_rescued", "calls_wasted", "unanswered"),
        *("device_tokens", "cloud_tokens", "usd_per_1k"),
        *(("mean_score",) if graded else ()),
    ]


@dataclass(frozen=True)
class Testbed:
    """The finished rows of one testbed: by method, then by seed."""

    folder: Path
    settings: Mapping[str, Any]
    rows: Mapping[str, Mapping[int, Row]]

    @property
    def budget(self) -> float:
        return float(self.settings["train"]["budget"])

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def graded(self) -> bool:
        """Whether its task grades answers."""
        return any(c.columns.final_score is not None for by_seed in self.cells.values() for c in by_seed.values())

    @cached_property
    def cells(self) -> dict[str, dict[int, Cell]]:
        untrained = self.rows.get("device_only", {})
        return {
            method: {seed: Cell.of(row, untrained.get(seed)) for seed, row in by_seed.items()}
            for method, by_seed in self.rows.items()
        }


def load_testbed(folder: Path) -> Testbed:
    """Read the finished rows of a testbed, which may have been made in several places and copied together.

    Raises:
        RunError: there are none, or they do not belong together.
    """
    found = {m: {seed: read_row(folder, m, seed) for seed in seeds_of(folder, m)} for m in methods_of(folder)}
    if not found:
        raise RunError(f"{folder} has no finished row yet")
    ordered = {m: found[m] for m in (*METHODS, *sorted(set(found) - set(METHODS), key=_natural)) if m in found}
    problems = {tuple(r.problem for r in row.records) for by_seed in ordered.values() for row in by_seed.values()}
    if len(problems) != 1:
        raise RunError(f"the rows in {folder} are of different test problems: remove those that do not belong")
    for method, by_seed in ordered.items():
        if len({row.info.get("config", {}).get("lr") for row in by_seed.values()}) > 1:
            raise RunError(
                f"the seeds of {method} in {folder} have different learning rates: remove those of another run"
            )
        for seed, row in by_seed.items():
            check_place(folder, row)
            if base := found.get(base_of(row) or "", {}).get(seed):
                check_base(folder, row, base)
    return Testbed(folder, read_json(folder / "testbed.json"), ordered)


def _natural(name: str) -> list[tuple[int, float, str]]:
    """A key that sorts numbers inside names by size."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(0, float(p), "") if n % 2 else (1, 0.0, p) for n, p in enumerate(parts)]


def summarise(testbed: Testbed, *, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """A row of compare.json for each method."""
    intervals = _intervals(testbed, resamples)
    found = []
    for method, cells in testbed.cells.items():
        dips = [f"cpt_{percent}" for percent in (50, 80) if any(_dips(c, percent / 100) for c in cells.values())]
        found.append(
            {
                "testbed": testbed.name,
                "method": method,
                "seeds": sorted(cells),
                "problems": len(next(iter(cells.values())).device_tokens),
                **{name: m.json() for name, m in intervals[method].items()},
                "not_monotone": dips,
                **ledger(testbed, method),
            }
        )
    return found


def _dips(cell: Cell, recovered: float) -> bool:
    return cell.scored and measures.dips_below(cell.columns, recovered)


def _intervals(testbed: Testbed, resamples: int) -> dict[str, dict[str, Measure]]:
    """By method, each measure's mean over seeds with its interval. A method that has seeds which ours lacks has no
    difference."""
    read = _read(testbed.cells, testbed.budget)
    count = len(next(iter(next(iter(testbed.cells.values())).values())).device_tokens)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        index = rng.integers(0, count, count)
        drawn = {m: {seed: c.take(index) for seed, c in by_seed.items()} for m, by_seed in testbed.cells.items()}
        draws.append({m: _over_seeds(values) for m, values in _read(drawn, testbed.budget).items()})
    return {
        method: {
            name: _interval(
                name, [v.get(name, math.nan) for v in values], [d[method].get(name, math.nan) for d in draws]
            )
            for name in names(testbed.budget, graded=testbed.graded)
        }
        for method, values in read.items()
    }


def _interval(name: str, by_seed: Sequence[float], draws: Sequence[float]) -> Measure:
    """The mean of a measure's values by seed, and its interval from them and from its means over seeds in the draws."""
    values = [v for v in by_seed if not math.isnan(v)]
    spread = [d for d in draws if not math.isnan(d)]
    if not values or not spread:
        return Measure(math.nan, math.nan, math.nan)
    value, count = sum(values) / len(values), len(values)
    seeds = float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / count**0.5 if count > 1 else 0.0
    low, high = np.quantile(spread, [0.025, 0.975])
    below, above = math.hypot(max(0.0, value - low), seeds), math.hypot(max(0.0, high - value), seeds)
    if name.startswith(_UNBOUNDED) or "difference" in name:
        return Measure(value, value - below, value + above)
    return Measure(value, max(0.0, value - below), min(1.0, value + above))


_UNBOUNDED = ("routing_gain", "apgr", "pgr_", "device_tokens", "cloud_tokens", "usd_per_1k")
"""Measures, beside differences, that are no shares: their intervals may pass 0 and 1."""


def _read(cells: Mapping[str, Mapping[int, Cell]], budget: float) -> dict[str, list[dict[str, float]]]:
    """By method, the measures of each of its seeds, beside ours of the same seed where ours has them all."""
    ours = cells.get(OURS, {})
    return {
        method: [
            measure(cell, ours[seed] if by_seed.keys() <= ours.keys() else None, budget)
            for seed, cell in sorted(by_seed.items())
        ]
        for method, by_seed in cells.items()
    }


def values_by_seed(testbed: Testbed) -> dict[str, dict[int, dict[str, float]]]:
    """By method and seed, every measure; NaN where there is none."""
    read = _read(testbed.cells, testbed.budget)
    return {m: dict(zip(sorted(testbed.cells[m]), values, strict=True)) for m, values in read.items()}


def _over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over seeds of each measure, over those seeds where it is defined."""
    found = {}
    for name in values[0]:
        defined = [v[name] for v in values if not math.isnan(v[name])]
        found[name] = sum(defined) / len(defined) if defined else math.nan
    return found


LEDGER = (
    *("lr", "train_cloud_calls", "train_cost_usd", "train_device_tokens", "train_seconds", "train_cpu_seconds"),
    *("search_cloud_calls", "search_cost_usd", "search_cpu_seconds"),
)
"""What a method's making is described by in compare.json."""


def ledger(testbed: Testbed, method: str) -> dict[str, float | None]:
    """What a method took to make: its training, or that of the model it stands on, and its own fitting and calibration,
    the mean over seeds; and the search for the learning rate, with its first seed. None where it was not trained.

    `train_seconds` is by the clock, beside whatever else the machine did; `train_cpu_seconds` are the processor's.
    """
    rows = testbed.rows[method].values()
    trained = [row.info["ledger"] for row in rows if "ledger" in row.info]
    if not trained:
        return dict.fromkeys(LEDGER)
    fits = [row.info.get("fit", {}) for row in rows]

    def mean(key: str) -> float:
        return round(float(np.mean([one[key] + fit.get(key, 0) for one, fit in zip(trained, fits, strict=True)])), 6)

    config = next(iter(rows)).info["config"]
    return {
        "lr": config["lr"],
        **{f"train_{key}": mean(key) for key in ("cloud_calls", "cost_usd", "device_tokens", "seconds", "cpu_seconds")},
        **_search(testbed.folder, METHODS[method].on or method if method in METHODS else method),
    }


def _search(folder: Path, method: str) -> dict[str, float | None]:
    """What the choice of a method's learning rate took beside the run that was chosen: the other runs, and the
    validation of each."""
    keys = ("cloud_calls", "cost_usd", "cpu_seconds")
    file = folder / "search" / f"{method}.json"
    if not file.is_file():
        return {f"search_{key}": None for key in keys}
    known = read_json(file)
    runs = [t["ledger"] for lr, t in known["tried"].items() if t["ledger"] and lr != f"{known['chosen']:g}"]
    # A search of an earlier version does not know what its validations took.
    spent = [*runs, *(t["validated"] for t in known["tried"].values() if "validated" in t)]
    return {f"search_{key}": round(sum(one[key] for one in spent), 6) for key in keys}


def cpu_hours(testbed: Testbed) -> float:
    """Processor time of all trainings of a testbed, those of its searches among them."""
    rows = [row for by_seed in testbed.rows.values() for row in by_seed.values()]
    trained = [row.info["ledger"]["cpu_seconds"] for row in rows if row.metrics and "same_as" not in row.info]
    searched = [_search(testbed.folder, method)["search_cpu_seconds"] or 0.0 for method in testbed.rows]
    return float(sum(trained) + sum(searched)) / 3600
