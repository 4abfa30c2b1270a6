"""Figures of a comparison: curves against call rate and cost, the training's dynamics, the ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfroute import measures
from selfroute.compare.config import label
from selfroute.compare.methods import METHODS, OURS, TASK_TUNED
from selfroute.compare.results import Cell, Testbed
from selfroute.evaluate.figures import INK, MUTED, axes
from selfroute.measures import Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = np.linspace(0, 1, 201)
"""Call rates that curves are drawn at."""

_ACROSS = 5
"""Ablations side by side: more would be too small on a page."""

COLOURS = {
    "gapg_decision": "#0b6e99",
    "decision_votes": "#54b4d6",
    "gapg": "#c4541d",
    "gapg_mixed": "#e39a6f",
    "dr_grpo": "#a3244b",
    "grpo": "#d989a3",
    "da_grpo": "#6b3fa0",
    "lagrangian_gapg": "#a98bd0",
    "naive_offloading": "#8a94a0",
    "router": "#1b7a3d",
    "router_encoder": "#5fae78",
    "router_boosting": "#a5cfb1",
    "prompt_probe": "#3f7f5f",
    "unanswered_first": "#b5bcc4",
    "log_probability": "#8c6d1f",
    "self_consistency": "#c9a227",
    "prompt_variants": "#e2cc7f",
    "probe": "#1d2733",
    "task_tuning": "#5d6873",
}
"""One colour a method, the same in every figure; kinds share a hue."""


def curve_of(cells: Sequence[Cell]) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Along a method's score, the means over its seeds: call rates, USD per 1k problems, accuracy, that of the score
    alone, and the oracle's on its device model."""
    accuracy, alone = (
        np.mean([np.interp(GRID, *curve) for curve in curves], axis=0)
        for curves in ([c.columns.curve for c in cells], [c.alone.curve for c in cells])
    )
    cost = np.mean([np.interp(GRID, *cost_curve(c)) for c in cells], axis=0)
    oracle = np.mean([[measures.oracle_accuracy(c.columns, float(rate)) for rate in GRID] for c in cells], axis=0)
    return GRID, cost, accuracy, alone, oracle


def cost_curve(cell: Cell) -> tuple[Floats, Floats]:
    """Call rate, and the cost in USD per 1k problems of the calls made so far, in the order of the score."""
    n = len(cell.cost_usd)
    return np.arange(n + 1) / n, 1000 * measures.accumulated(cell.columns.places, cell.cost_usd) / n


def draw_curves(testbed: Testbed) -> Figure:
    """Accuracy against call rate, against cost, and against call rate by the score alone: lines for methods with a
    score, points for their own decisions."""
    figure, (left, right, alone) = axes(16.0, 5.0, 3)
    cells = {m: list(c.values()) for m, c in testbed.cells.items() if m in METHODS}
    if OURS in cells:
        for bound, style, name in (
            (measures.oracle_accuracy, "--", "oracle, our device model"),
            (measures.random_accuracy, ":", "random, our device model"),
        ):
            line = np.mean([[bound(c.columns, float(rate)) for rate in GRID] for c in cells[OURS]], axis=0)
            left.plot(100 * GRID, 100 * line, color=MUTED, linestyle=style, linewidth=1, label=name)
    for method, mine in sorted(cells.items(), key=lambda item: item[0] == OURS):
        ours, colour = method == OURS, COLOURS.get(method, INK)
        if mine[0].scored:
            rates, cost, accuracy, of_score, _ = curve_of(mine)
            width = 2.6 if ours else 1.2
            left.plot(100 * rates, 100 * accuracy, color=colour, linewidth=width, label=label(method))
            right.plot(cost, 100 * accuracy, color=colour, linewidth=width)
            alone.plot(100 * rates, 100 * of_score, color=colour, linewidth=width)
        deciding = [(c, c.own) for c in mine if c.own is not None]
        if deciding:
            x = float(np.mean([own.mean() for _, own in deciding]))
            y = float(np.mean([np.where(own > 0, c.columns.cloud, c.columns.device).mean() for c, own in deciding]))
            usd = float(np.mean([(1000 * c.cost_usd * own).mean() for c, own in deciding]))
            shown = None if mine[0].scored else label(method)
            left.plot(100 * x, 100 * y, marker="o", markersize=6, color=colour, linestyle="none", label=shown)
            right.plot(usd, 100 * y, marker="o", markersize=6, color=colour, linestyle="none")
    left.axvline(100 * testbed.budget, color=MUTED, linewidth=0.8)
    left.set(xlabel="call rate (%)", ylabel="accuracy (%)", title=testbed.name)
    alone.axvline(100 * testbed.budget, color=MUTED, linewidth=0.8)
    right.set(xlabel="cloud cost (USD per 1,000 problems)", title="dots: own decisions, or no score")
    alone.set(xlabel="call rate (%)", title="the score alone", ylim=left.get_ylim())
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def draw_dynamics(testbed: Testbed) -> Figure | None:
    """How readily it asks and what it solves by training step, the mean over seeds: a collapse is a line at zero."""
    found = {m: [r.metrics for r in rows.values() if r.metrics] for m, rows in testbed.rows.items() if m in METHODS}
    trained = {m: runs for m, runs in found.items() if runs}
    if not trained:
        return None
    figure, (left, right) = axes(11.5, 3.8, 2)
    for method, runs in trained.items():
        steps = min(map(len, runs))
        x = [s["step"] for s in runs[0][:steps]]
        width = 2.4 if method == OURS else 1.2
        # Nothing that the task-tuned model learns from asks. Steps of an earlier version know the share of help calls
        # among all responses alone, which is another quantity.
        if method != TASK_TUNED and all("asking" in s for run in runs for s in run):
            y = 100 * np.mean([[s["asking"] for s in run[:steps]] for run in runs], axis=0)
            left.plot(x, y, color=COLOURS.get(method, INK), linewidth=width)
        y = 100 * np.mean([[s["local_accuracy"] for s in run[:steps]] for run in runs], axis=0)
        right.plot(x, y, color=COLOURS.get(method, INK), linewidth=width, label=label(method))
    left.set(xlabel="step", ylabel="probability of asking at a decision (%)", title=testbed.name, ylim=(-1, None))
    right.set(xlabel="step", ylabel="solved by the device (% of responses)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


def ablation_groups(testbed: Testbed) -> dict[str, list[tuple[str, str]]]:
    """By what was changed, each value and its row's name: `{"G": [("4", "G=4"), ...]}`; swapped clouds by training."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for method in testbed.rows:
        if method in METHODS:
            continue
        trained, _, swapped = method.partition("@")
        key, _, value = trained.partition("=")
        if swapped:
            key, value = f"trained with {trained}, evaluated with cloud", swapped.partition("=")[2] or swapped
        groups.setdefault(key, []).append((value or "on", method))
    return groups


def draw_ablations(testbed: Testbed, table: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Accuracy at the budget with its interval, local accuracy and own call rate, for each value of each change."""
    groups = ablation_groups(testbed)
    if not groups:
        return None
    across = min(len(groups), _ACROSS)
    down = math.ceil(len(groups) / across)
    figure, made = axes(2.6 * across + 1.5, 3.3 * down + 0.3, across, down)
    panels = list(np.atleast_1d(made).flat)
    for axis in panels[len(groups) :]:
        axis.set_visible(False)
    at = f"accuracy_at_{100 * testbed.budget:g}"
    for axis, (key, values) in zip(panels, groups.items(), strict=False):
        x = np.arange(len(values))
        for name, text, colour, marker in (
            (at, f"accuracy at {100 * testbed.budget:g} % calls", COLOURS[OURS], "o"),
            ("local_accuracy", "local accuracy", INK, "^"),
            ("own_call_rate", "own call rate", COLOURS["gapg"], "s"),
        ):
            found = [table[method].get(name) for _, method in values]
            y = np.array([100 * m["value"] if m else np.nan for m in found])
            low = np.array([100 * m["low"] if m else np.nan for m in found])
            high = np.array([100 * m["high"] if m else np.nan for m in found])
            axis.errorbar(
                x,
                y,
                yerr=np.maximum(0, [y - low, high - y]),
                color=colour,
                marker=marker,
                markersize=4,
                capsize=2,
                linewidth=1,
                label=text if axis is panels[0] else None,
            )
        axis.set_xticks(x, [value for value, _ in values])
        axis.set_xlabel("\n".join(key.split(", ")), fontsize=8)
        axis.set_ylim(0, 102)
    panels[0].set_ylabel("%")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8, ncols=3)
    return figure
