"""What commands show on the way, and how they stop."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from selfroute.errors import SelfrouteError

if TYPE_CHECKING:
    from rich.console import Console

    from selfroute.train.progress import StepRecord


def plain(text: str) -> str:
    """One line of text that others wrote, without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text.expandtabs(4))


class Printer:
    """Progress for people: a rewritten line on a terminal, a line at the start and the end elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def progress(self, what: str, done: int, total: int) -> None:
        if self.live:
            typer.echo(f"\r{what}: {done}/{total}", nl=done == total, err=True)
        elif done == total:
            typer.echo(f"{what}: {total}", err=True)

    def step(self, total: int) -> Callable[[StepRecord], None]:
        shown = 0
        # A terminal that is too narrow for the parts of a step's time goes without.
        parts = not sys.stdout.isatty() or shutil.get_terminal_size().columns >= 112

        def show(r: StepRecord) -> None:
            nonlocal shown
            shown += 1
            if shown % 20 == 1:
                if shown == 1 and r.step > 1:
                    typer.echo(f"resumed after step {r.step - 1}")
                typer.echo(
                    f"{'step':>9}  reward  solved   asks  wrong undec. |D1| |D2|  calls      USD"
                    + ("   sample  cloud update" if parts else "")
                    + "  seconds"
                )
            s = r.seconds
            typer.echo(
                f"{r.step:4d}/{total:<4d}  {r.reward:6.3f}  {r.local_accuracy:6.1%} {r.asking:6.1%} {r.wrong:6.1%}"
                f" {r.undecided:6.1%} {r.d1:4d} {r.d2:4d}  {r.cloud_calls:5d} {r.cost_usd:8.4f}"
                + (f"   {s['sample']:6.2f} {s['cloud']:6.2f} {s['update']:6.2f}" if parts else "")
                + f"  {s['total']:7.2f}"
            )

        return show


@contextmanager
def stopping(run: Path, again: str, *, holds: str = "run.json") -> Iterator[None]:
    """Turn a Ctrl-C into a word on how to go on; `holds` is in `run` where something was done."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"{run} holds what is done: run the same command {again}"
        raise SelfrouteError(f"stopped; {done if (run / holds).exists() else 'nothing was done yet'}") from None


def show_run(summary: Mapping[str, Any]) -> None:
    """The table of a run, and what its judge cost."""
    from selfroute.evaluate.report import terminal_table

    console = _console()
    console.print(terminal_table(summary, console))
    judge = summary.get("judge", {})
    if judge:
        calls, cost_usd = (sum(spent[key] for spent in judge.values()) for key in ("calls", "cost_usd"))
        typer.echo(f"the judge: {calls:,} calls for {cost_usd:.4f} USD in all")


def show_comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each testbed."""
    from selfroute.compare.report import terminal_tables

    console = _console()
    for table in terminal_tables(rows, console):
        console.print(table)


def show_sequence(result: Mapping[str, Any]) -> None:
    """Each task during and after all, and each task after each stage."""
    from selfroute.sequence import terminal_tables

    console = _console()
    for table in terminal_tables(result):
        console.print(table)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # A pipe has no width of its own.
        console = Console(width=max(console.width, 240))
    return console
