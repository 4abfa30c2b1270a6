"""The report of a comparison: one page that opens offline, figures, CSV of every number, and compare.json."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from selfroute.compare import figures
from selfroute.compare.config import CompareConfig, label
from selfroute.compare.methods import METHODS, OURS, TRAINED
from selfroute.compare.results import LEDGER, Testbed, cpu_hours, load_testbed, names, summarise, values_by_seed
from selfroute.compare.rows import methods_of
from selfroute.config import load, read
from selfroute.config import names as shipped
from selfroute.errors import RunError
from selfroute.evaluate.figures import svg
from selfroute.records import read_json, write_atomic, write_json
from selfroute.types import Progress


def testbeds(out: Path) -> list[Path]:
    """The testbeds in a comparison's folder that have a finished row, those with the most methods first."""
    methods = {f.parent: methods_of(f.parent) for f in out.glob("*/testbed.json")}
    compared = {folder: len(METHODS.keys() & found) for folder, found in methods.items() if found}
    return sorted(compared, key=lambda folder: (-compared[folder], folder.name))


def write_report(out: Path, *, progress: Progress = lambda what, done, total: None) -> list[dict[str, Any]]:
    """Write compare.json, report.html, results.md, four .csv files and figures/; returns the rows of compare.json.

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
    write_atomic(out / "seeds.csv", _csv(_seeds(found)))
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
        "alike": _alike(testbed),
        "unpriced": _unpriced(testbed),
        "command": _command(testbed),
        "cpu_hours": cpu_hours(testbed),
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


_HEAD = """# Results

Percent of the test problems, means over seeds, with 95 % intervals of problems (bootstrap) and seeds (Student's t of
their values) together; with one seed, of the problems alone. *Ours ahead*: GAPG + decision loss less the row, paired,
read off our curve at the row's own call rate, or at the budget. A threshold sends responses without a readable answer
to the cloud first; *score alone* leaves that to the score, and sends last what has none: a device model's own decision
has no log-odds where a response runs out of tokens before it. CPU seconds are those of a training, for a router of the
model that it stands on, and of its own fitting where the row knows it. The encoder is a small one, trained from
nothing. [compare.md](compare.md) says what each row is; `selfroute report OUT` makes this page again from the rows."""


def markdown(sections: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown, with what made them."""
    text = [_HEAD]
    for s in sections:
        at = s["at"]
        text += ["", f"## {s['name']}", "", f"Made by {s['command']}at commit {', '.join(s['commits'])}{_took(s)}."]
        columns = (
            ("call rate", "call_rate", 100.0),
            ("accuracy", "accuracy", 100.0),
            (f"at {at} %", f"accuracy_at_{at}", 100.0),
            ("ours ahead", "difference_to_ours", 100.0),
            (f"ours ahead at {at} %", f"difference_at_{at}", 100.0),
            (f"score alone at {at} %", f"score_alone_at_{at}", 100.0),
            ("ours ahead, score alone", f"score_alone_difference_at_{at}", 100.0),
            ("own call rate", "own_call_rate", 100.0),
            ("own accuracy", "own_accuracy", 100.0),
            ("ours ahead of its own", "own_difference_to_ours", 100.0),
            ("APGR", "apgr", 100.0),
            ("CPT 50 %", "cpt_50", 100.0),
            ("CPT 80 %", "cpt_80", 100.0),
            ("local accuracy", "local_accuracy", 100.0),
            ("routing gain", "routing_gain_captured", 100.0),
            ("device tokens", "device_tokens", 1.0),
            ("training calls", "train_cloud_calls", 1.0),
            ("training CPU s", "train_cpu_seconds", 1.0),
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
        if s["alike"]:
            text += ["", f"The same responses to every problem with every seed: {'; '.join(s['alike'])}."]
        if s["unpriced"]:
            text += ["", f"Lambda never left 0, so that calls had no price: {'; '.join(s['unpriced'])}."]
    return "\n".join(text) + "\n"


def _alike(testbed: Testbed) -> list[str]:
    """Trained methods whose records are equal, seed by seed: nothing in what sets them apart came to bear, and their
    agreement is no second finding."""
    groups: list[list[str]] = []
    for method in (m for m in TRAINED if m in testbed.rows):
        mine = {seed: row.records for seed, row in testbed.rows[method].items()}
        for group in groups:
            if mine == {seed: row.records for seed, row in testbed.rows[group[0]].items()}:
                group.append(method)
                break
        else:
            groups.append([method])
    return [" and ".join(label(m) for m in group) for group in groups if len(group) > 1]


_WITH_LAMBDA = ("da_grpo", "lagrangian_gapg")


def _unpriced(testbed: Testbed) -> list[str]:
    """Methods with a multiplier that never left 0, and with which seeds: what they add did not come to bear."""
    found = []
    for method in (m for m in testbed.rows if m in _WITH_LAMBDA):
        rows = testbed.rows[method].values()
        seeds = [str(row.seed) for row in rows if row.metrics and not any(step.get("dual") for step in row.metrics)]
        if seeds:
            found.append(f"{label(method)} (seed {', '.join(seeds)})")
    return found


def _command(testbed: Testbed) -> str:
    """The shipped comparison that a testbed is of, and where its rows differ from what that would make; "" for one's
    own."""
    for name in shipped():
        if not name.startswith(("compare-", "ablate-")) or read(name)["testbed"] != testbed.name:
            continue
        config = load(CompareConfig, name)
        kept = {key: testbed.settings.get(key) for key in ("rows_version", "device_sha256") if key in testbed.settings}
        differ = config.differing({**config.shared(), **kept}, testbed.settings)
        if differ:
            return f"`selfroute compare {name} --out OUT` with other settings ({', '.join(differ)}) "
        rows = {m: [row.info["config"] for row in by_seed.values()] for m, by_seed in testbed.rows.items()}
        changed = {m: {k for c in rows[m] for k in config.changed(m, c)} for m in config.trained if m in rows}
        notes = [f"{label(m)} and what stands on it ({', '.join(sorted(k))})" for m, k in changed.items() if k]
        text = f"`selfroute compare {name} --out OUT` "
        if notes:
            text += f"with other settings for {' and for '.join(notes)} "
        wanted, seeds = (*config.methods, *config.ablations), set(config.seeds)
        absent = [label(m) for m in wanted if m not in testbed.rows]
        fewer = sorted({seed for m in wanted if m in testbed.rows for seed in seeds - set(testbed.rows[m])})
        text += f"(not there yet: {'; '.join(absent)}) " if absent else ""
        return text + (f"(seeds that some rows lack: {', '.join(map(str, fewer))}) " if fewer else "")
    return ""


def _took(section: Mapping[str, Any]) -> str:
    """What its trainings took; nothing where nothing was trained."""
    if not section["cpu_hours"]:
        return ""
    threads = ", ".join(map(str, section["threads"]))
    text = f"; its trainings, the search among them, took {section['cpu_hours']:.1f} processor-hours"
    return f"{text} on {threads} thread{'' if threads == '1' else 's'} each" if threads else text


def terminal_tables(rows: Sequence[Mapping[str, Any]], console: Console) -> list[Table]:
    """A table for each testbed, with as much of it as the terminal is wide for: every difference has its interval, and
    other columns give up theirs, and then their place."""
    tables, as_wide_as_it_is = [], console.options.update(max_width=10_000)
    for name in dict.fromkeys(r["testbed"] for r in rows):
        mine = [r for r in rows if r["testbed"] == name]
        layouts = (_terminal_table(mine, rank, intervals) for rank, intervals in _LAYOUTS)
        fitting = (t for t in layouts if Measurement.get(console, as_wide_as_it_is, t).maximum <= console.width)
        tables.append(next(fitting, _terminal_table(mine, *_LAYOUTS[-1])))
    return tables


_LAYOUTS = ((3, True), (2, True), (2, False), (1, False), (0, False))
"""The highest rank of a column that is shown, and whether all have intervals; the widest first."""


def _terminal_table(rows: Sequence[Mapping[str, Any]], rank: int, intervals: bool) -> Table:
    at = next(key.removeprefix("accuracy_at_") for key in rows[0] if key.startswith("accuracy_at_"))
    table = Table(title=f"{rows[0]['testbed']}, percent of {rows[0]['problems']:,} test problems", title_justify="left")
    columns = [
        (0, "", "method"), (2, "seeds", "seeds"), (0, "call rate", "call_rate"), (1, "accuracy", "accuracy"),
        (0, f"at {at} %", f"accuracy_at_{at}"), (0, "ours ahead", "difference_to_ours"),
        (3, f"ours ahead at {at} %", f"difference_at_{at}"), (1, "local", "local_accuracy"),
        (1, "own rate", "own_call_rate"), (2, "gain", "routing_gain_captured"), (2, "train calls", "train_cloud_calls"),
        *([(2, "mean score", "mean_score")] if "mean_score" in rows[0] else []),
    ]  # fmt: skip
    shown = [(title, key) for least, title, key in columns if least <= rank]
    for title, key in shown:
        name = key == "method"
        table.add_column(title, justify="left" if name else "right", no_wrap=not name or rank > 0)
    for r in rows:
        cells = {"method": label(r["method"]), "seeds": str(len(r["seeds"]))}
        for _, key in shown[2 if rank >= 2 else 1 :]:
            difference = key.startswith("difference")
            text = show(r, key, signed=difference)
            cells[key] = text if intervals or difference else text.partition(" ")[0]
        table.add_row(*(cells[key] for _, key in shown), style="bold" if r["method"] == OURS else None)
    return table


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
        for name in LEDGER:
            if r[name] is not None:
                yield r["testbed"], r["method"], name, r[name], "", ""


def _seeds(found: Sequence[Testbed]) -> Iterable[Sequence[Any]]:
    yield "testbed", "method", "seed", "measure", "value"
    for testbed in found:
        for method, seeds in values_by_seed(testbed).items():
            for seed, values in seeds.items():
                for name in names(testbed.budget, graded=testbed.graded):
                    if not math.isnan(values.get(name, math.nan)):
                        yield testbed.name, method, seed, name, values[name]


def _curves(found: Sequence[Testbed]) -> Iterable[Sequence[Any]]:
    yield "testbed", "method", "call_rate", "usd_per_1k", "accuracy", "score_alone", "oracle"
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
