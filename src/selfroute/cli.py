"""The command line: thin over `selfroute.api`; heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selfroute.errors import ConfigError, DataWarning, ReproducibilityWarning, SelfrouteError
from selfroute.export_command import export
from selfroute.key_commands import app as keys_app
from selfroute.records import best_checkpoint, checkpoints, results
from selfroute.serve_command import serve
from selfroute.task_commands import app as tasks_app
from selfroute.terminal import Printer, plain, show_comparison, show_run, show_sequence, stopping

if TYPE_CHECKING:
    from selfroute.sequence import SequenceConfig
    from selfroute.train.config import TrainConfig
    from selfroute.train.progress import StepRecord

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Post-train a small on-device LLM to know when to ask the cloud, and measure what that is worth.

    Start with `selfroute demo --out runs/demo`: it trains the shipped model on Countdown in minutes, with no
    key and no network, and writes a report page. Every config can be changed with key=value.""",
)

BOXED_HELP = 80
"""Columns of a terminal below which help is plain: its boxes would cut the options' names."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to what --dry-run prints, dots between tables: steps=50, task.seed=1 (or train.steps=50, for "
        "comparisons and sequences).",
        metavar="[KEY=VALUE]...",
    ),
]
MainJob = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to what `selfroute train countdown-tiny --dry-run` prints: steps=50, task.seed=1.",
        metavar="[KEY=VALUE]...",
    ),
]
Run = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
Best = Annotated[
    bool,
    typer.Option("--best", help="Of the best checkpoint (evaluation.every=25) in place of the newest: into RUN/best."),
]


def _first() -> bool:
    """Whether this is the one of several training processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _echo(text: str = "") -> None:
    typer.echo(text)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _echo(version("selfroute"))
        raise typer.Exit


@app.callback()
def selfroute(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    pass


def _dry_run(config: Any) -> None:
    _echo(json.dumps(config.model_dump(mode="json"), indent=2))


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A config that comes with selfroute (countdown-tiny), or a .toml file.")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run directory to write; default runs/CONFIG.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the memory that it takes, and stop.")
    ] = False,
    unsafe_sandbox: Annotated[
        bool,
        typer.Option(
            "--unsafe-sandbox",
            help="Tasks code and gym, where nothing can be isolated: judge answers with resource limits only.",
        ),
    ] = False,
) -> None:
    """Post-train a device model with GAPG and the decision loss, on one task or, where CONFIG has stages, on several.

    Ctrl-C finishes the step under way and saves; --resume goes on from there: bit for bit on the same processor,
    versions and threads.
    """
    from selfroute import api, sequence

    run = out or Path("runs") / Path(config).stem
    if sequence.is_sequence(config):
        if unsafe_sandbox:
            raise ConfigError("in a sequence, the stages say it: task.unsafe_sandbox = true")
        _train_sequence(sequence.load_config(config, overrides or []), run, resume=resume, dry_run=dry_run)
        return
    unsafe = ["task.unsafe_sandbox=true"] if unsafe_sandbox else []
    resolved = api.load_train_config(config, [*(overrides or []), *unsafe])
    if dry_run:
        _dry_run(resolved)
    _tell_memory(resolved, dry_run=dry_run)
    if dry_run:
        return
    if resume and not checkpoints(run):
        _echo(f"no checkpoint in {run} yet: starting from the first step")
    with stopping(run, "with --resume"):
        printer = Printer()
        saved = api.train(resolved, run, resume=resume, report=printer.step(resolved.steps), progress=printer.progress)
    _echo(f"\ntrained: {saved}\nnext: selfroute evaluate {run}   or   selfroute calibrate {run} --budget 0.3")
    best = best_checkpoint(run)
    if best:
        _echo(f"best:    {best}   (with --best)")


def _tell_memory(config: TrainConfig, *, dry_run: bool) -> None:
    from selfroute import api

    try:
        if _first():
            typer.echo(f"memory: {api.memory(config)}", err=True)
    except SelfrouteError as error:
        # A dry run needs neither the model nor a network.
        if not dry_run:
            raise
        typer.echo(f"memory: not known ({error})", err=True)


def _train_sequence(config: SequenceConfig, out: Path, *, resume: bool, dry_run: bool) -> None:
    from selfroute import sequence

    runs = sequence.stages(config, out)
    if dry_run:
        _echo(json.dumps({name: run.model_dump(mode="json") for name, run in runs.items()}, indent=2))
    # The models that later stages start from are not there yet, but of the same size.
    largest = max(runs.values(), key=lambda run: run.sampling.max_tokens)
    _tell_memory(largest.model_copy(update={"device": config.train.device}), dry_run=dry_run)
    if dry_run:
        return
    printer = Printer()

    def report(name: str, run: TrainConfig) -> Callable[[StepRecord], None]:
        _echo(f"\nstage {name}: {run.steps} steps, from {run.device.model}")
        return printer.step(run.steps)

    with stopping(out, "with --resume", holds=f"{next(iter(runs))}/run.json"):
        result = sequence.train(config, out, resume=resume, report=report, progress=printer.progress)
    show_sequence(result)
    _echo(f"kept in {out / 'sequence.json'}; a stage is a run: selfroute report {out / next(iter(runs))}")


@app.command()
def evaluate(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Other problems for the run's model, such as task.dataset=aime24.", metavar="[KEY=VALUE]..."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Set the dial to this share of calls, as `calibrate` found it.")
    ] = None,
    before: Annotated[bool, typer.Option("--before", help="Evaluate the model that the run started from.")] = False,
    best: Best = False,
    engine: Annotated[
        str | None,
        typer.Option(help="An engine that serves the exported model, such as http://127.0.0.1:8080/v1.", metavar="URL"),
    ] = None,
    model: Annotated[str, typer.Option(help="The model's name there, where the engine serves several.")] = "",
) -> None:
    """Evaluate a run on its test problems and print the table.

    Without --budget the model's own decisions are sampled. The records go to RUN/evaluations/, those of other problems
    to RUN/benchmarks/.
    """
    from selfroute import api
    from selfroute.config import validate
    from selfroute.device.http import HTTPConfig

    where = api.benchmark(run, overrides, budget=budget, best=best) if overrides else run
    by_url = validate(HTTPConfig, {"base_url": engine, "model": model}, "--engine") if engine else None
    progress = Printer().progress
    api.evaluate(where, budget=budget, untrained=before, best=best, engine=by_url, progress=progress)
    show_run(api.report(where, best=best))
    if overrides:
        _echo(f"kept in {where}: selfroute report {where}{' --best' if best else ''}")


@app.command()
def calibrate(
    run: Run,
    budget: Annotated[float, typer.Option(help="Share of problems that may go to the cloud, such as 0.3.")],
    best: Best = False,
) -> None:
    """Find the dial's bias for a budget, on the calibration problems.

    A budget is a ceiling: the bias aims one standard error below it, at 28 % for 30 % and 500 problems.
    """
    from selfroute import api

    found = api.calibrate(run, budget, best=best, progress=Printer().progress)
    _echo(
        f"budget {budget:.0%}: bias {found['bias']:+.3f} nats; calls {found['call_rate']:.1%} of {found['problems']} "
        f"calibration problems, 95 % interval [{found['low']:.1%}, {found['high']:.1%}]\n"
        f"next: selfroute evaluate {run} --budget {budget:g}{' --best' if best else ''}"
    )


@app.command()
def compare(
    config: Annotated[
        str, typer.Argument(help="A comparison that comes with selfroute (compare-countdown), or a .toml file.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option(help="The folder to write; several testbeds share one, and an unfinished one is continued.")
    ] = Path("runs/compare"),
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", "-j", min=1, help="Processes, which share the cores. With small models on a CPU: one a core."
        ),
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Every row in a few minutes; it learns little.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")] = False,
) -> None:
    """Compare every way to route on one testbed, at the same realised call rate.

    Trains each method with each seed, fits the outside routers, and writes compare.json, a page, figures and CSV. Rows
    that are already in --out are kept: after Ctrl-C or a crash, or with one more method or seed, the same command pays
    only for what is missing.
    """
    from selfroute import comparison
    from selfroute.compare.config import QUICK

    resolved = comparison.load_config(config, (*(QUICK if quick else ()), *(overrides or ())))
    if dry_run:
        _dry_run(resolved)
        return
    with stopping(out, "again", holds=resolved.testbed):
        rows = comparison.compare(resolved, out, jobs=jobs, progress=Printer().progress)
    show_comparison(rows)
    _echo(f"page: {out / 'report.html'}")


@app.command()
def report(run: Run, best: Best = False) -> None:
    """Print the table and write the page, the figures and the numbers: of a run, or of a comparison's folder.

    Of a sequence's folder: its tables and its numbers.
    """
    from selfroute import api, comparison, sequence

    if not best and (run / "sequence.json").exists():
        show_sequence(sequence.report(run))
        return
    if not best and not (run / "run.json").exists() and any(run.glob("*/testbed.json")):
        show_comparison(comparison.report(run, progress=Printer().progress))
    else:
        show_run(api.report(run, best=best))
    _echo(f"page: {results(run, best=best) / 'report.html'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory to write; an unfinished one is continued.")],
    overrides: MainJob = None,
    config: Annotated[str, typer.Option(help="The config to run.")] = "countdown-tiny",
    quick: Annotated[bool, typer.Option("--quick", help="All parts in a minute or two; it learns little.")] = False,
) -> None:
    """The main job: evaluate before, train, calibrate, evaluate after, report."""
    from selfroute import api
    from selfroute.demo import QUICK
    from selfroute.demo import demo as run_demo

    changes = (*(QUICK if quick else ()), *(overrides or ()))
    steps = api.load_train_config(config, changes).steps
    printer = Printer()
    with stopping(out, "again"):
        summary = run_demo(out, config=config, overrides=changes, progress=printer.progress, report=printer.step(steps))
    show_run(summary)
    _echo(f"page: {out / 'report.html'}")


@app.command()
def ask(
    run: Annotated[
        str,
        typer.Argument(
            help="A run directory, or a config, by name or .toml file, for its untrained model.", metavar="RUN"
        ),
    ],
    question: Annotated[str, typer.Argument(help='Such as "numbers 3, 7, 25; target 46".')],
    budget: Annotated[float | None, typer.Option(help="Set the dial as `calibrate` found it.")] = None,
    best: Best = False,
    seed: Annotated[int, typer.Option(help="Another seed samples another response.")] = 0,
) -> None:
    """Ask the pair one question: reasoning, decision, hand-off if any, verdict, cost."""
    from selfroute import api

    with api.load(run, budget=budget, best=best) as pair:
        reply = pair.answer(question, seed=seed)
    _echo(f"question   {reply.question}\n")
    _echo("\n".join(f"  device | {plain(line)}" for line in reply.reasoning.splitlines()))
    score = "" if reply.score is None else f" (l = {reply.score:+.2f})"
    decision = {"device": "answers itself", "cloud": "asks the cloud", "undecided": "reaches no decision"}[reply.route]
    _echo(f"\ndecision   the device {decision}{score}")
    _echo(f"answer     {plain(reply.answer or '-')}   from the {'cloud' if reply.route == 'cloud' else 'device'}")
    if reply.extracted not in ("", (reply.answer or "").strip()):
        _echo(f"read as    {plain(reply.extracted)}")
    verdict = "none" if not reply.judged else "correct" if reply.correct else "wrong"
    _echo(f"verdict    {verdict}: {plain(reply.reason)}")
    _echo(f"cost       {reply.cost_usd:.5f} USD, {reply.device_tokens} device tokens, {reply.seconds:.2f} s")


@app.command()
def warmstart(
    config: Annotated[str, typer.Argument(help="A config that comes with selfroute (countdown-1m), or a .toml file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The model folder to write; default runs/CONFIG.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")] = False,
) -> None:
    """Train the small Countdown model that post-training starts from, on synthetic search traces."""
    from selfroute import api

    if dry_run:
        _dry_run(api.load_warmstart_config(config, overrides or []))
        return
    folder = out or Path("runs") / Path(config).stem
    api.warmstart(config, folder, overrides=overrides or [], report=_echo)
    _echo(f"model folder: {folder}")


app.add_typer(tasks_app, name="tasks")
app.add_typer(keys_app, name="keys")
app.command()(export)
app.command()(serve)


def main() -> None:
    """The console script: errors and warnings of selfroute are one message, without a place in the code."""
    usual = warnings.formatwarning

    def brief(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = issubclass(category, (DataWarning, ReproducibilityWarning))
        return f"selfroute: {message}\n" if ours else usual(message, category, filename, lineno, line)

    warnings.formatwarning = brief
    if shutil.get_terminal_size().columns < BOXED_HELP:
        app.rich_markup_mode = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] != ["train"]:
        typer.secho("selfroute: train alone runs in several processes", fg="red", err=True)
        sys.exit(1)
    if not _first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        app()
    except (SelfrouteError, OSError) as error:
        # What the system refuses (a folder that cannot be written, a closed pipe) is told the same way.
        typer.secho(f"selfroute: {error}", fg="red", err=True)
        sys.exit(1)
