"""The report of a comparison: one page that opens offline, figures, CSV of every number, and compare.json."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from selfroute.compare import figures
from selfroute.compare.config import label
from selfroute.compare.methods import METHODS, OURS
from selfroute.compare.results import SEARCH, Testbed, load_testbed, names, summarise
from selfroute.errors import RunError
from selfroute.evaluate.figures import svg
from selfroute.records import read_json, write_atomic, write_json
from selfroute.types import Progress


def testbeds(out: Path) -> list[Path]:
    """The testbeds in a comparison's folder that have a finished row."""
    return sorted(f.parent for f in out.glob("*/testbed.json") if any((f.parent / "rows").glob("*/seed-*.json")))


def write_report(out: Path, *, progress: Progress = lambda what, done, total: None) -> list[dict[str, Any]]:
    """Write compare.json, report.html, results.md, three .csv files and figures/; returns the rows of compare.json.

    Raises:
        RunError: no row is finished yet.
    """
    found = [load_testbed(folder) for folder in testbeds(out)]
    if not found:
        raise RunError(f"{out} holds no finished row yet: selfroute compare compare-countdown --out {out}")
    rows: list[dict[str, Any]] = []
    sections = []
    for number, testbed in enumerate(found, 1):
        mine = summarise(testbed)
        rows += mine
        sections.append(_section(out, testbed, mine))
        progress("testbeds read", number, len(found))
    write_json(out / "compare.json", rows)
    write_atomic(out / "numbers.csv", _csv(_numbers(rows, found)))
    write_atomic(out / "curves.csv", _csv(_curves(found)))
    write_atomic(out / "training.csv", _csv(_training(found)))
    write_atomic(out / "results.md", markdown(sections))
    page = Environment(
        loader=PackageLoader("selfroute.compare", "."), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html.jinja")
    write_atomic(out / "report.html", page.render(sections=sections, show=show, label=label, took=_took, OURS=OURS))
    return rows


def _section(out: Path, testbed: Testbed, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of one testbed; its figures are also written as SVG and PNG."""
    table = {r["method"]: r for r in rows}
    drawn = {
        "curves": figures.draw_curves(testbed) if any(m in METHODS for m in testbed.rows) else None,
        "dynamics": figures.draw_dynamics(testbed),
        "ablations": figures.draw_ablations(testbed, table),
    }
    folder = out / "figures"
    pictures = {}
    for name, figure in drawn.items():
        if figure is None:
            continue
        pictures[name] = svg(figure)
        write_atomic(folder / f"{testbed.name}-{name}.svg", pictures[name])
        figure.savefig(folder / f"{testbed.name}-{name}.png", dpi=160)
    at = f"{100 * testbed.budget:g}"
    infos = [row.info for by_seed in testbed.rows.values() for row in by_seed.values()]
    return {
        "name": testbed.name,
        "at": at,
        "rows": [r for r in rows if r["method"] in METHODS],
        "ablations": [r for r in rows if r["method"] not in METHODS],
        "figures": pictures,
        "task": read_json(out / testbed.name / "testbed.json")["train"]["task"],
        "hours": sum(info.get("seconds", 0.0) for info in infos) / 3600,
        "threads": sorted({info["threads"] for info in infos if "threads" in info}),
        "commits": sorted({str(info.get("git") or "unknown") for info in infos}),
        "files": {
            method: [
                (seed, f"{testbed.name}/rows/{method}/seed-{seed}", bool(row.metrics))
                for seed, row in by_seed.items()
            ]
            for method, by_seed in testbed.rows.items()
        },
    }  # fmt: skip


def show(row: Mapping[str, Any], name: str, scale: float = 100.0, *, signed: bool = False) -> str:
    """A measure for people: a share in percent with its interval, another number alone, a dash for none."""
    m = row.get(name)
    if m is None:
        return "–"
    if isinstance(m, int | float):
        return f"{m:,.0f}" if abs(m) >= 10 else f"{m:.3g}"
    if scale == 1:
        return f"{m['value']:,.0f}" if m["value"] >= 10 else f"{m['value']:.3f}"
    sign = "+" if signed else ""
    low, value, high = (f"{scale * m[k]:{sign}.1f}" for k in ("low", "value", "high"))
    return value if m["low"] == m["high"] else f"{value} [{low}, {high}]"


def markdown(sections: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown, with what made them."""
    text = [
        "# Results",
        "",
        "Percent of the test problems, means over seeds, with 95 % intervals of a bootstrap over seeds and problems.",
        "*Ours ahead*: GAPG + decision loss less the row, paired, read off our curve at the row's own call rate.",
        "[compare.md](compare.md) says what each row is, and the command that makes each testbed;",
        "`selfroute report OUT` makes this page again from the rows.",
    ]
    for s in sections:
        at = s["at"]
        text += ["", f"## {s['name']}", "", f"Made by commit {', '.join(s['commits'])}{_took(s)}."]
        columns = (
            ("call rate", "call_rate", 100.0),
            ("accuracy", "accuracy", 100.0),
            (f"at {at} %", f"accuracy_at_{at}", 100.0),
            ("ours ahead", "difference_to_ours", 100.0),
            (f"ours ahead at {at} %", f"difference_at_{at}", 100.0),
            ("own call rate", "own_call_rate", 100.0),
            ("own accuracy", "own_accuracy", 100.0),
            ("ours ahead of its own", "own_difference_to_ours", 100.0),
            ("APGR", "apgr", 100.0),
            ("local accuracy", "local_accuracy", 100.0),
            ("routing gain", "routing_gain_captured", 100.0),
            ("device tokens", "device_tokens", 1.0),
            ("training calls", "train_cloud_calls", 1.0),
            ("training s", "train_seconds", 1.0),
            *([("mean score", "mean_score", 100.0)] if any("mean_score" in r for r in s["rows"]) else []),
        )
        for rows, first in ((s["rows"], "method"), (s["ablations"], "GAPG + decision loss with")):
            if not rows:
                continue
            text += ["", f"| {first} | seeds | " + " | ".join(c[0] for c in columns) + " |"]
            text.append("|---|" + "---|" * (len(columns) + 1))
            for r in rows:
                name = label(r["method"]) if r["method"] in METHODS else r["method"]
                cells = [show(r, key, scale, signed="difference" in key) for _, key, scale in columns]
                name = f"**{name}**" if r["method"] == OURS else name
                text.append(f"| {name} | {len(r['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _took(section: Mapping[str, Any]) -> str:
    """How long its rows took; nothing where they do not say."""
    if not section["hours"]:
        return ""
    threads = ", ".join(map(str, section["threads"]))
    return f" in {section['hours']:.2f} hours on {threads} thread{'' if threads == '1' else 's'}"


def terminal_tables(rows: Sequence[Mapping[str, Any]], *, wide: bool) -> list[Table]:
    """A table for each testbed; `wide` with intervals."""
    tables = []
    for name in dict.fromkeys(r["testbed"] for r in rows):
        mine = [r for r in rows if r["testbed"] == name]
        at = next(key.removeprefix("accuracy_at_") for key in mine[0] if key.startswith("accuracy_at_"))
        table = Table(title=f"{name}, percent of {mine[0]['problems']:,} test problems", title_justify="left")
        table.add_column("", no_wrap=True)
        columns = (
            ("seeds", "seeds"), ("call_rate", "call rate"), ("accuracy", "accuracy"),
            (f"accuracy_at_{at}", f"at {at} %"), ("difference_to_ours", "ours ahead"),
            ("local_accuracy", "local"), ("own_call_rate", "own rate"),
            ("routing_gain_captured", "gain"), ("train_cloud_calls", "train calls"),
            *([("mean_score", "mean score")] if "mean_score" in mine[0] else []),
        )  # fmt: skip
        for _, title in columns:
            table.add_column(title, justify="right", no_wrap=wide)
        for r in mine:
            cells = [str(len(r["seeds"]))]
            for key, _ in columns[1:]:
                text = show(r, key, signed=key.startswith("difference"))
                cells.append(text if wide else text.partition(" ")[0])
            table.add_row(label(r["method"]), *cells, style="bold" if r["method"] == OURS else None)
        tables.append(table)
    return tables


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _numbers(rows: Sequence[Mapping[str, Any]], found: Sequence[Testbed]) -> Iterable[Sequence[Any]]:
    yield "testbed", "method", "measure", "value", "low", "high"
    measured = {t.name: names(t.budget, graded=t.graded) for t in found}
    for r in rows:
        for name in measured[r["testbed"]]:
            if r[name] is not None:
                yield r["testbed"], r["method"], name, r[name]["value"], r[name]["low"], r[name]["high"]
        for name in ("lr", "train_cloud_calls", "train_cost_usd", "train_device_tokens", "train_seconds", *SEARCH):
            if r[name] is not None:
                yield r["testbed"], r["method"], name, r[name], "", ""


def _curves(found: Sequence[Testbed]) -> Iterable[Sequence[Any]]:
    yield "testbed", "method", "call_rate", "usd_per_1k", "accuracy"
    for testbed in found:
        for method, cells in testbed.cells.items():
            if next(iter(cells.values())).scored:
                for values in zip(*figures.curve_of(list(cells.values())), strict=True):
                    yield testbed.name, method, *(round(float(v), 6) for v in values)


def _training(found: Sequence[Testbed]) -> Iterable[Sequence[Any]]:
    keys = (
        "step",
        "reward",
        "local_accuracy",
        "help",
        "asking",
        "wrong",
        "undecided",
        "d1",
        "d2",
        "dual",
        "cloud_calls",
    )
    yield "testbed", "method", "seed", *keys
    for testbed in found:
        for method, by_seed in testbed.rows.items():
            for seed, row in by_seed.items():
                for step in row.metrics:
                    yield testbed.name, method, seed, *(step.get(k) for k in keys)
