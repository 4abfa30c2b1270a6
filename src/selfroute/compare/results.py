"""What finished rows are worth: every measure with its interval, and every difference to ours, paired.

Seeds share their test problems. A measure of a method is its mean over seeds; its 95 % interval is a percentile
bootstrap that draws seeds and problems, both with replacement, the same problems for all seeds of a draw. All methods
with the same seeds are read on the same draws, so that a difference is one of the same problems and seeds. With few
seeds that says little of how seeds differ, and with one nothing. Left out on purpose: how the numbers look (report).
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

from selfroute import measures
from selfroute.compare.methods import METHODS, OURS
from selfroute.compare.rows import ASK_FIRST, Row, methods_of, read_row, seeds_of
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
        )

    @cached_property
    def curve(self) -> tuple[Floats, Floats]:
        return measures.curve(self.columns)

    def accuracy_at(self, call_rate: float) -> float:
        return float(np.interp(call_rate, *self.curve))


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
            f"accuracy_at_{at}": cell.accuracy_at(budget),
            "area": measures.area(c),
            "apgr": measures.average_pgr(c),
            "cpt_50": measures.call_rate_for(c, 0.5),
            "cpt_80": measures.call_rate_for(c, 0.8),
            "decision_auc": measures.decision_auc(_decided(c)),
        }
    if ours is not None:
        values["difference_to_ours"] = ours.accuracy_at(rate) - accuracy
        if cell.scored:
            values[f"difference_at_{at}"] = ours.accuracy_at(budget) - cell.accuracy_at(budget)
    if cell.own is not None and cell.scored:
        own_rate = float(cell.own.mean())
        own_accuracy = float(np.where(cell.own > 0, c.cloud, c.device).mean())
        values |= {"own_call_rate": own_rate, "own_accuracy": own_accuracy}
        if ours is not None:
            values["own_difference_to_ours"] = ours.accuracy_at(own_rate) - own_accuracy
    return values


def _decided(columns: Columns) -> Columns:
    """The columns with the responses that have no score of their own left out of the AUC."""
    return replace(columns, score=np.where(np.abs(columns.score) >= ASK_FIRST, -math.inf, columns.score))


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan


def names(budget: float, *, graded: bool) -> list[str]:
    """Every measure's name, in order; a mean score is one where answers are graded."""
    at = f"{100 * budget:g}"
    return [
        *("call_rate", "accuracy", f"accuracy_at_{at}", "local_accuracy", "routing_gain_captured", "apgr"),
        *("difference_to_ours", f"difference_at_{at}", "own_call_rate", "own_accuracy", "own_difference_to_ours"),
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
    budget: float
    rows: Mapping[str, Mapping[int, Row]]

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
    """Read the finished rows of a testbed.

    Raises:
        RunError: there are none, or their problems differ.
    """
    found = {m: {seed: read_row(folder, m, seed) for seed in seeds_of(folder, m)} for m in methods_of(folder)}
    if not found:
        raise RunError(f"{folder} has no finished row yet")
    ordered = {m: found[m] for m in (*METHODS, *sorted(set(found) - set(METHODS), key=_natural)) if m in found}
    problems = {tuple(r.problem for r in row.records) for by_seed in ordered.values() for row in by_seed.values()}
    if len(problems) != 1:
        raise RunError(f"the rows in {folder} are of different test problems: remove those that do not belong")
    return Testbed(folder, read_json(folder / "testbed.json")["train"]["budget"], ordered)


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
                **ledger(testbed.rows[method]),
                **search_cost(testbed.folder, method),
            }
        )
    return found


def _dips(cell: Cell, recovered: float) -> bool:
    return cell.scored and measures.dips_below(cell.columns, recovered)


def _intervals(testbed: Testbed, resamples: int) -> dict[str, dict[str, Measure]]:
    """By method, each measure's mean over seeds with its interval. A method that has seeds which ours lacks has no
    difference."""
    found: dict[str, dict[str, Measure]] = {}
    for seeds in sorted({tuple(sorted(cells)) for cells in testbed.cells.values()}):
        cells = {m: c for m, c in testbed.cells.items() if tuple(sorted(c)) == seeds}
        ours = testbed.cells.get(OURS, {})
        whole = _read(cells, ours, seeds, testbed.budget)
        count = len(next(iter(next(iter(cells.values())).values())).device_tokens)
        rng = np.random.default_rng(0)
        draws = []
        for _ in range(resamples):
            index = rng.integers(0, count, count)
            drawn = [seeds[n] for n in rng.integers(0, len(seeds), len(seeds))]
            taken = {m: {s: by_seed[s].take(index) for s in set(drawn)} for m, by_seed in cells.items()}
            other = {s: ours[s].take(index) for s in set(drawn) if s in ours}
            draws.append(_read(taken, other, drawn, testbed.budget))
        for method in cells:
            found[method] = {
                name: _interval(whole[method].get(name, math.nan), [d[method].get(name, math.nan) for d in draws])
                for name in names(testbed.budget, graded=testbed.graded)
            }
    return found


def _interval(value: float, draws: Sequence[float]) -> Measure:
    spread = np.array([d for d in draws if not math.isnan(d)])
    low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (math.nan, math.nan)
    return Measure(value, float(low), float(high))


def _read(
    cells: Mapping[str, Mapping[int, Cell]], ours: Mapping[int, Cell], seeds: Sequence[int], budget: float
) -> dict[str, dict[str, float]]:
    """By method, the mean over `seeds` of each measure."""
    paired = all(s in ours for s in seeds)
    return {
        method: _over_seeds([measure(by_seed[s], ours[s] if paired else None, budget) for s in seeds])
        for method, by_seed in cells.items()
    }


def _over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over seeds of each measure, over those seeds where it is defined."""
    found = {}
    for name in values[0]:
        defined = [v[name] for v in values if not math.isnan(v[name])]
        found[name] = sum(defined) / len(defined) if defined else math.nan
    return found


def ledger(rows: Mapping[int, Row]) -> dict[str, Any]:
    """What a method cost to make, the mean over seeds; None where it was not trained."""
    infos = [row.info for row in rows.values()]
    trained = [info["ledger"] for info in infos if "ledger" in info]
    if not trained:
        return dict.fromkeys(("lr", *(name for name, _ in _LEDGER)))
    fits = [info.get("fit", {}) for info in infos]

    def mean(key: str) -> float:
        return float(np.mean([entry[key] + fit.get(key, 0) for entry, fit in zip(trained, fits, strict=True)]))

    return {"lr": infos[0]["config"]["lr"], **{name: round(mean(key), 6) for name, key in _LEDGER}}


SEARCH = ("search_cloud_calls", "search_seconds")


def search_cost(folder: Path, method: str) -> dict[str, float | None]:
    """What the choice of a method's learning rate cost, the run that was chosen apart; None without a search."""
    file = folder / "search" / f"{METHODS[method].on or method if method in METHODS else method}.json"
    if not file.is_file():
        return dict.fromkeys(SEARCH)
    known = read_json(file)
    spent = [t["ledger"] for lr, t in known["tried"].items() if t["ledger"] and lr != f"{known['chosen']:g}"]
    return dict(zip(SEARCH, (sum(s["cloud_calls"] for s in spent), sum(s["seconds"] for s in spent)), strict=True))


_LEDGER = (
    ("train_cloud_calls", "cloud_calls"),
    ("train_cost_usd", "cost_usd"),
    ("train_device_tokens", "device_tokens"),
    ("train_seconds", "seconds"),
)
"""Names in compare.json, and in a run's ledger."""
