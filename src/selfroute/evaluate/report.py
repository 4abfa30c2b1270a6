"""The report of a run: a table for the terminal, figures, and one page that opens offline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table

from selfroute import measures
from selfroute.evaluate.figures import CLOUD, INK, MUTED, OURS, WRONG, axes, svg
from selfroute.evaluate.run import Outcome, columns
from selfroute.evaluate.summary import budget_of, engine_of, evaluations, key_of, reference, summarise
from selfroute.records import read_json, read_records, results, write_atomic, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = 10
"""Worked examples of each route on the page."""


def write_report(run: Path, *, best: bool = False) -> dict[str, Any]:
    """Write summary.json, report.html, and the figures as SVG and PNG into RUN, or RUN/best; returns the summary."""
    summary = summarise(run, best=best)
    found = evaluations(run, best=best)
    out = results(run, best=best)
    out.mkdir(exist_ok=True)
    steps = read_records(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    figures = {"curve": draw_curve(found, summary)}
    if steps:
        figures["training"] = draw_training(steps)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=160)
        write_atomic(out / f"{name}.svg", svg(figure))
    shown = reference(found)
    page = Environment(
        loader=PackageLoader("selfroute.evaluate", "."), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html.jinja")
    html = page.render(
        summary=summary,
        rows=rows(summary),
        columns=columns_of(summary),
        origin=read_json(run / "run.json"),
        figures={name: svg(figure) for name, figure in figures.items()},
        examples={
            "device": [o for o in shown if o.route == "device"][:EXAMPLES],
            "cloud": [o for o in shown if o.route == "cloud"][:EXAMPLES],
            "undecided": [o for o in shown if o.route == "undecided"][:EXAMPLES],
        },
        show=show,
    )
    write_json(out / "summary.json", summary)
    write_atomic(out / "report.html", html)
    return summary


Cells = tuple[str, Mapping[str, Any]]

MIN_LABEL = 12
"""Characters of a terminal that a label has at least, before headings are folded for it."""


def rows(summary: Mapping[str, Any]) -> list[Cells]:
    """The table's rows: a label, and the measures by name. Bounds have an accuracy at a call rate and nothing else."""
    table: list[Cells] = []

    def exactly(rate: float) -> dict[str, float]:
        return {"value": rate, "low": rate, "high": rate}

    for name, label in (("before", "untrained device model"), ("after", "trained device model")):
        if name in summary:
            alone, score = summary[name]["local_accuracy"], summary[name].get("local_mean_score")
            table.append(
                (
                    f"{label}, alone",
                    {"accuracy": alone, "mean_score": score, "call_rate": exactly(0.0), "local_accuracy": alone},
                )
            )
    for name, label in (("before", "untrained, own decision"), ("after", "selfroute, own decision")):
        if name in summary:
            table.append((label, summary[name]))
    percents = sorted((key.removeprefix("random_at_") for key in summary if key.startswith("random_at_")), key=float)
    for percent in percents:
        rate = exactly(float(percent) / 100)
        table.append((f"random offloading at {percent} %", {**summary[f"random_at_{percent}"], "call_rate": rate}))
        if f"at_budget_{percent}" in summary:
            table.append((f"selfroute, budget {percent} %", summary[f"at_budget_{percent}"]))
        for bound in ("oracle", "clairvoyant"):
            table.append((f"{bound} at {percent} %", {**summary[f"{bound}_at_{percent}"], "call_rate": rate}))
    own = {"before": "untrained, own decision", "after": "selfroute, own decision"}
    for key in (key for key in summary if "@" in key):
        kind, _, engine = key.partition("@")
        label = own.get(kind) or f"selfroute, budget {kind.removeprefix('at_budget_')} %"
        table.append((f"{label}, on {engine}", summary[key]))
    table.append(("cloud alone", {**summary["cloud"], "call_rate": exactly(1.0)}))
    return table


_COLUMNS = (
    ("accuracy", "accuracy", 100.0),
    ("mean_score", "mean score", 100.0),
    ("call_rate", "call rate", 100.0),
    ("local_accuracy", "local accuracy", 100.0),
    ("routing_gain_captured", "routing gain", 100.0),
    ("device_tokens", "device tokens", 1.0),
    ("usd_per_1k", "USD per 1k", 1.0),
)


def columns_of(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """The table's columns: a measure's name, its heading and scale. A mean score is there where answers are graded."""
    graded = "mean_score" in summary["cloud"]
    return [column for column in _COLUMNS if graded or column[0] != "mean_score"]


def show(cells: Mapping[str, Any], name: str, scale: float) -> str:
    """A measure for people: a share in percent with its 95 % interval, any other number alone."""
    m = cells.get(name)
    if m is None:
        return "–"
    if scale == 1:
        return f"{m['value']:,.1f}" if m["value"] >= 10 else f"{m['value']:.3f}"
    low, value, high = (f"{scale * m[k]:.1f}" for k in ("low", "value", "high"))
    return value if m["low"] == m["high"] else f"{value} [{low}, {high}]"


def terminal_table(summary: Mapping[str, Any], console: Console) -> Table:
    """The table for a terminal; in one that is too narrow for the intervals, without them; in one that is too narrow
    for the labels, with these folded."""
    boundless = console.options.update(width=1000)
    table = _table(summary, intervals=True)
    if console.measure(table, options=boundless).maximum > console.width:
        table = _table(summary, intervals=False)
        _fold(table, console.width)
    return table


def _fold(table: Table, width: int) -> None:
    """Fold the labels where they do not fit, and the headings where that leaves too little for labels; no number."""
    label, *measured = table.columns
    numbers = [max(len(str(cell)) for cell in column.cells) for column in measured]
    words = [max(map(len, str(column.header).split())) for column in measured]
    whole = [max(pair) for pair in zip(numbers, words, strict=True)]
    left = width - sum(whole) - len(measured)
    if left >= max(len(str(cell)) for cell in label.cells):
        return
    label.no_wrap, label.overflow = False, "fold"
    for column, needed in zip(measured, whole if left >= MIN_LABEL else numbers, strict=True):
        column.width, column.overflow = needed, "fold"


def _table(summary: Mapping[str, Any], *, intervals: bool) -> Table:
    if intervals:
        table = Table(title="test problems, percent", title_justify="left")
    else:
        table = Table(
            title="test problems, percent",
            title_justify="left",
            caption="95 % intervals: in a wider terminal, summary.json, report.html",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
    table.add_column("", no_wrap=True)
    columns = columns_of(summary)
    for _, label, _ in columns:
        table.add_column(label, justify="right", no_wrap=intervals)
    for label, cells in rows(summary):
        ours = label.startswith("selfroute")
        values = [show(cells, name, scale) for name, _, scale in columns]
        if not intervals:
            values = [value.partition(" ")[0] for value in values]
        table.add_row(label, *values, style="bold" if ours else None)
    return table


def draw_curve(found: Mapping[str, Sequence[Outcome]], summary: Mapping[str, Any]) -> Figure:
    """Accuracy against call rate: the dial, its operating points, and the bounds."""
    figure, axis = axes(7.2, 4.6)
    stand = columns(reference(found))
    grid = np.linspace(0, 1, 201)

    def line(bound: Callable[[measures.Columns, float], float]) -> list[float]:
        return [100 * bound(stand, float(rate)) for rate in grid]

    axis.plot(100 * grid, line(measures.oracle_accuracy), color=MUTED, linestyle="--", label="oracle")
    axis.plot(100 * grid, line(measures.random_accuracy), color=MUTED, linestyle=":", label="random offloading")
    if "before" in found:
        rates, accuracy = columns(found["before"]).curve
        axis.plot(100 * rates, 100 * accuracy, color=CLOUD, linewidth=1.2, alpha=0.7, label="untrained, along its dial")
    if set(found) != {"before"}:
        rates, accuracy = stand.curve
        axis.plot(100 * rates, 100 * accuracy, color=OURS, linewidth=2.2, label="selfroute, along its dial")
    markers = itertools.cycle("DvPX*")
    for name in found:
        if name == "before":
            continue
        budget, engine = budget_of(name), engine_of(name)
        cells = summary[key_of(name)]
        x, y = cells["call_rate"]["value"], cells["accuracy"]
        axis.errorbar(
            100 * x,
            100 * y["value"],
            yerr=[[100 * (y["value"] - y["low"])], [100 * (y["high"] - y["value"])]],
            marker="o" if budget is None and not engine else next(markers),
            color=OURS,
            linestyle="none",
            capsize=3,
            label=("own decision" if budget is None else f"budget {100 * budget:.0f} %")
            + (engine and f", on {engine}"),
        )
    axis.plot(
        100, 100 * summary["cloud"]["accuracy"]["value"], marker="s", color=INK, linestyle="none", label="cloud alone"
    )
    axis.plot(0, 100 * stand.device.mean(), marker="^", color=INK, linestyle="none", label="device alone")
    axis.set(xlabel="call rate (%)", ylabel="accuracy (%)", xlim=(-2, 102))
    axis.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def draw_training(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """What the training did, step by step: shares of responses, and what the filter kept."""
    figure, (left, right) = axes(9.6, 3.6, 2)
    x = [s["step"] for s in steps]
    for key, label, color in (
        ("local_accuracy", "solved", OURS),
        ("asking", "asks (of decisions)", CLOUD),
        ("wrong", "wrong", WRONG),
        ("undecided", "undecided", MUTED),
    ):
        left.plot(x, [100 * s.get(key, s["help"]) for s in steps], color=color, label=label, linewidth=1.6)
    left.set(xlabel="step", ylabel="share of responses (%)", ylim=(0, 100))
    right.plot(x, [s["reward"] for s in steps], color=INK, label="mean reward", linewidth=1.6)
    right.set(xlabel="step", ylabel="mean reward")
    problems = right.twinx()
    problems.spines[["top"]].set_visible(False)
    problems.plot(x, [s["d1"] for s in steps], color=OURS, label="|D1|", linewidth=1.2, alpha=0.8)
    problems.plot(x, [s["d2"] for s in steps], color=CLOUD, label="|D2|", linewidth=1.2, alpha=0.8)
    problems.set_ylabel("problems")
    problems.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=9)
    handles = [*right.get_lines(), *problems.get_lines()]
    right.legend(handles, [h.get_label() for h in handles], frameon=False, fontsize=9, loc="center right")
    return figure
