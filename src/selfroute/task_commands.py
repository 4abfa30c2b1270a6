"""`selfroute tasks`: what tasks there are, their problems, whether they judge as they should; and one of your own."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfroute.errors import TaskError
from selfroute.terminal import plain

if TYPE_CHECKING:
    from selfroute.tasks import Task
    from selfroute.tasks.judge import Judge
    from selfroute.types import Split

NEAR_SHOWN = 5
"""Near-duplicates that `check` prints."""

app = typer.Typer(
    invoke_without_command=True, help="List tasks, show their problems, check their verifiers, begin your own."
)

Name = Annotated[
    str, typer.Argument(help="A task, such as countdown or maths, package.module:Class, or a config for its task.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(help="Its settings, such as dataset=math-500 path=FILE.", metavar="[KEY=VALUE]..."),
]
SplitOption = Annotated[str, typer.Option("--split", help="train, calibration or test.")]


@app.callback()
def tasks(context: typer.Context) -> None:
    """List the tasks, with the source, the size and the licence of each data set."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.table import Table

    from selfroute.config import Choice, chosen
    from selfroute.tasks import TASKS

    table = Table(box=None, pad_edge=False)
    for heading in ("task", "source", "size", "licence"):
        table.add_column(heading, overflow="fold")
    for name in TASKS:
        for about in chosen(Choice(name=name), TASKS).ABOUT:
            table.add_row(about.name, about.source, about.size, about.licence)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


@app.command()
def show(
    name: Name,
    settings: Settings = None,
    number: Annotated[int, typer.Option("-n", min=1, help="Problems to show.")] = 3,
    split: SplitOption = "test",
) -> None:
    """Show problems, as the device model gets them, and their reference answers."""
    from selfroute.protocol import chat

    task = _task(name, settings)
    problems = task.load(_split(split))
    typer.echo(f"{split}: {len(problems):,} problems\n")
    for p in problems[:number]:
        typer.echo(f"{p.id}")
        for message in chat(p.question):
            typer.echo(_indented(message["role"], message["content"]))
        typer.echo(_indented("solution", task.solution(p) or "none is known") + "\n")


@app.command()
def check(
    name: Name,
    settings: Settings = None,
    split: SplitOption = "test",
    out: Annotated[
        Path, typer.Option(help="Task judge: where what the judge said is kept, so that a rerun pays nothing.")
    ] = Path("runs/judge"),
) -> None:
    """Check that every reference answer verifies itself, and that another problem's answer does not.

    Prints what fails, and then exits with 1; and, of a data set, training problems that all but repeat a test problem.
    Of the task judge: how far its grades agree with the labels of answers.
    """
    from selfroute.cloud.memory import open_judge
    from selfroute.tasks.check import check as faults_of
    from selfroute.tasks.datasets import Loader
    from selfroute.tasks.judge import Judge

    task = _task(name, settings)
    if isinstance(task, Judge):
        _agreement(task, out)
        return
    problems = task.load(_split(split))
    # Programs and puzzles are judged in a sandbox, and take minutes.
    typer.echo(f"checking {len(problems):,} problems", err=True)
    with open_judge(task, out / "judge.sqlite", phase="check"):
        found = list(faults_of(task, problems))
    faults = [fault for fault in found if fault]
    for fault in faults:
        what = "its own reference answer is refused" if fault.expected else "another problem's answer is accepted"
        read = "" if fault.extracted in ("", fault.answer.strip()) else f", read as {fault.extracted!r}"
        typer.echo(f"{fault.problem}: {what}: {fault.answer!r}{read} ({plain(fault.reason)})")
    data = getattr(task, "data", None)
    pairs = data.near if isinstance(data, Loader) else []
    if pairs:
        typer.echo(f"{len(pairs)} training problems all but repeat a test problem:")
    for training, test in pairs[:NEAR_SHOWN]:
        typer.echo(_indented("training", f"{training.id}: {training.question[:300]}"))
        typer.echo(_indented("test", f"{test.id}: {test.question[:300]}") + "\n")
    if faults:
        raise TaskError(f"{len(faults)} of {len(found)} problems fail")
    if not found:
        raise TaskError(
            f"none of the {len(problems)} problems has an answer to try: give them one (task.columns.answer)"
        )
    if len(found) < len(problems):
        typer.echo(f"{len(problems) - len(found)} of {len(problems)} problems have no answer to try")
    typer.echo(f"all {len(found)} problems pass")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What to call it, such as my_task.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("."),
) -> None:
    """Begin a task of your own: a config, some rows, a verifier and its test, which work as they are."""
    from selfroute.tasks.starter import write_starter

    for file in write_starter(name, out):
        typer.echo(f"wrote {file}")
    commands = [
        f"python -m pytest test_{name}.py   # pip install pytest",
        f"selfroute tasks show {name}.toml",
        f"selfroute tasks check {name}.toml",
        f"selfroute train {name}.toml --dry-run",
        f"selfroute train {name}.toml steps=2 --out runs/{name}",
    ]
    if out.resolve() != Path.cwd():
        commands.insert(0, f"cd {shlex.quote(str(out))}")
    typer.echo("\nnext:\n" + "\n".join(f"  {command}" for command in commands))


def _agreement(task: Judge, out: Path) -> None:
    """Judge the labelled answers of all splits, and print how far the grades agree, what does not, and the cost."""
    from selfroute.cloud.memory import open_judge, spent_by_phase
    from selfroute.tasks import verdicts

    try:
        from selfroute.tasks.agreement import agreement
    except ModuleNotFoundError as error:
        # Before anything is paid.
        raise TaskError(f"this needs {error.name}: pip install 'selfroute[tasks]'") from error
    labelled = task.labelled
    if not labelled:
        raise TaskError(
            f"{task.config.path} holds no labelled answer: give each row an answer and its label, from 0 to 1"
        )
    with open_judge(task, out / "judge.sqlite", phase="check"):
        found = verdicts(task, [(one.answer, one.problem) for one in labelled])
    passes = task.pass_score
    for one, verdict in zip(labelled, found, strict=True):
        if verdict.correct != (one.label >= passes):
            typer.echo(f"{one.problem.id}: label {one.label:g}, {plain(verdict.reason)}: {one.answer[:100]!r}")
    how = agreement([v.score for v in found], [one.label for one in labelled], passes)
    kappa, rank = ("n/a" if math.isnan(value) else f"{value:.2f}" for value in (how.kappa, how.rank))
    typer.echo(
        f"{len(labelled)} labelled answers: {how.alike.value:.1%} [{how.alike.low:.1%}, {how.alike.high:.1%}] on the "
        f"same side of pass_score {passes:g}, Cohen's kappa {kappa}, Spearman {rank}"
    )
    spent = spent_by_phase(out / "judge.sqlite").get("check")
    if spent:
        typer.echo(f"the judge: {spent.calls} calls, {spent.cost_usd:.4f} USD, kept in {out / 'judge.sqlite'}")


def _task(name: str, settings: list[str] | None) -> Task:
    from selfroute.config import Choice, names, override, read
    from selfroute.tasks import make_task

    # As for the other commands, `task.` may stand before a setting.
    own = [setting.removeprefix("task.") for setting in settings or []]
    is_config = name in names() or name.endswith(".toml")
    task = read(name).get("task") if is_config else {"name": name}
    if not isinstance(task, dict) or "name" not in task:
        raise TaskError(f"{name} names no task: it needs a [task] table with a name")
    return make_task(Choice(**override(task, own)))


def _split(name: str) -> Split:
    for split in ("train", "calibration", "test"):
        if split == name:
            return split
    raise TaskError(f"no such split: {name!r} (train, calibration or test)")


def _indented(label: str, text: str) -> str:
    first, *rest = map(plain, text.splitlines() or [""])
    return "\n".join([f"  {label:9} {first}", *(f"  {'':9} {line}".rstrip() for line in rest)])
