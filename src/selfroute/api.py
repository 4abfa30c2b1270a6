"""The Python API, and what each command does: train, evaluate, calibrate, report, ask, warmstart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfroute.config import defaults, names, override, resolve, validate
from selfroute.config import load as load_config
from selfroute.errors import ConfigError, RunError
from selfroute.extras import needs
from selfroute.records import (
    best_checkpoint,
    checkpoints,
    read_json,
    read_records,
    results,
    write_json,
    write_records,
)
from selfroute.serve.config import GatewayConfig
from selfroute.tasks import TASKS, Task
from selfroute.train.config import TrainConfig, whole
from selfroute.types import Progress

if TYPE_CHECKING:
    from selfroute.cloud.memory import Cloud
    from selfroute.device.base import Sampling
    from selfroute.device.hf import HFEngine
    from selfroute.device.http import HTTPConfig
    from selfroute.evaluate.pair import Pair
    from selfroute.evaluate.run import Engine, Outcome
    from selfroute.export.folder import Format
    from selfroute.export.gguf import Kind
    from selfroute.train.progress import StepRecord
    from selfroute.train.warmstart import WarmstartConfig

CALIBRATION_DRAWS = 4
"""Responses sampled for each calibration problem: more draws steady the dial without more problems."""

SOLVE_SAMPLES = 5
"""Extra responses to each asked test problem, help forbidden: does the device solve it in a majority of samples?"""


def load_train_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training config by package name or path, changed by `key=value` overrides, with every default written out."""
    return whole(load_config(TrainConfig, name, overrides))


def train(
    config: str | TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    report: Callable[[StepRecord], None] = lambda record: None,
    progress: Progress | None = None,
    stage: str = "",
) -> Path:
    """Post-train a device model into the run directory `out`; returns the last checkpoint.

    `progress` is told of the evaluations that keep the best checkpoint (`evaluation.every`); `stage` names the run
    among those that share its cloud.sqlite (`selfroute.sequence`).
    """
    resolved = load_train_config(config) if isinstance(config, str) else whole(config)
    with needs("train"):
        from selfroute.evaluate.validation import validation
        from selfroute.train import loop

        def rate(engine: HFEngine, task: Task, cloud: Cloud) -> float:
            return validation(
                engine,
                task,
                cloud,
                sampling=resolved.evaluation,
                seed=resolved.seed,
                budget=resolved.budget,
                # A cloud that earns nothing is never asked.
                alone=resolved.reward.cloud == 0,
                progress=_under("rate the checkpoint", progress),
            )

        return loop.train(resolved, Path(out), resume=resume, report=report, rate=rate, stage=stage)


def memory(config: TrainConfig) -> str:
    """What training will take of memory, in words, worked out without loading the weights.

    Raises:
        DeviceError: the model's config cannot be read.
    """
    with needs("train"):
        from selfroute.device.memory import gigabytes
        from selfroute.train.memory import memory as memory_of

        needed, free = memory_of(config)
        return f"{needed}; {gigabytes(free)} free"


def require_training() -> None:
    """Stop early, naming the install command, where training's dependencies are missing."""
    with needs("train"):
        from selfroute.train import loop  # noqa: F401


def load_gateway_config(name: str | None = None, overrides: Sequence[str] = ()) -> GatewayConfig:
    """A gateway's config by path, or the one that needs none, changed by `key=value` overrides."""
    if name is None:
        return validate(GatewayConfig, override(defaults(GatewayConfig), overrides), "this gateway")
    if not Path(name).is_file():
        raise ConfigError(f"no such file: {name} (a gateway's .toml file; none for the shipped model and its cloud)")
    return load_config(GatewayConfig, name, overrides)


def serve(config: GatewayConfig, ready: Callable[[str], None] = print) -> None:
    """Serve the pair until SIGINT or SIGTERM; `ready` is told the base URL once it can be asked."""
    with needs("serve"):
        from selfroute.serve.server import run
    run(config, ready)


def load_warmstart_config(name: str, overrides: Sequence[str] = ()) -> WarmstartConfig:
    """A warm start's config by package name or path, changed by `key=value` overrides."""
    with needs("train"):
        from selfroute.train.warmstart import WarmstartConfig
    config = load_config(WarmstartConfig, name, overrides)
    return config.model_copy(update={"task": resolve(config.task, TASKS, "task")})


def warmstart(
    config: str | WarmstartConfig,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> Path:
    """Train a small Countdown model from nothing into the model folder `out`."""
    with needs("train"):
        from selfroute.train import warmstart as warm
    command = ""
    if isinstance(config, str):
        command = " ".join(["selfroute", "warmstart", config, *overrides, "--out", "DIR"])
        config = load_warmstart_config(config, overrides)
    return warm.warmstart(config, Path(out), command=command, report=report)


def run_config(run: Path) -> TrainConfig:
    """The config that a run directory was made with.

    Raises:
        RunError: it is not a run directory.
    """
    if not (run / "run.json").is_file():
        raise RunError(f"{run} is not a run directory (make one with: selfroute train countdown-tiny --out {run})")
    origin = read_json(run / "run.json")
    if not isinstance(origin, dict) or not isinstance(origin.get("config"), dict):
        raise RunError(f"{run / 'run.json'} is damaged: it holds no config")
    return validate(TrainConfig, origin["config"], str(run / "run.json"))


def checkpoint_name(run: Path, *, best: bool = False) -> str:
    """The newest checkpoint of a run, or the best that was kept, by name.

    Raises:
        RunError: there is none yet, or no best one was kept.
    """
    saved = checkpoints(run)
    if not saved:
        raise RunError(f"{run} has no checkpoint yet: finish the training with --resume")
    if not best:
        return saved[-1].name
    kept = best_checkpoint(run)
    if kept is None:
        raise RunError(f"{run} keeps no best checkpoint: train with evaluation.every=25, or go without --best")
    return kept.name


def _engine(run: Path, config: TrainConfig, checkpoint: str | None) -> HFEngine:
    """The device model of a run: a checkpoint by name, or (None) the model that it started from."""
    with needs("local"):
        from selfroute.device.hf import HFEngine
    model = str(run / "checkpoints" / checkpoint) if checkpoint else config.device.model
    return HFEngine.load(config.device.model_copy(update={"model": model}))


def _cloud(config: TrainConfig, memory: Path) -> Cloud:
    from selfroute.cloud import make_cloud
    from selfroute.cloud.memory import Cloud

    return Cloud(make_cloud(config.cloud), memory)


def evaluation_name(budget: float | None, untrained: bool, best: bool = False) -> str:
    """Where an evaluation lives under RUN/evaluations: `before`, `after`, or `budget-0.3`."""
    if untrained and budget is not None:
        raise ConfigError("an untrained model has no dial: it is calibrated on the trained one")
    if untrained and best:
        raise ConfigError("the untrained model is no checkpoint: give --before or --best")
    return "before" if untrained else "after" if budget is None else f"budget-{budget:g}"


def evaluate(
    run: str | Path,
    *,
    budget: float | None = None,
    untrained: bool = False,
    best: bool = False,
    engine: HTTPConfig | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Evaluate a run's device model with its cloud on the test problems; the records go to RUN/evaluations.

    With a budget the dial is set as `calibrate` found it, and decisions follow it; without, the model's own decisions
    are sampled. `untrained` evaluates the model that the run started from, `best` the best checkpoint that was kept,
    whose records go to RUN/best/evaluations. With an `engine` by URL, that answers in the model's place: what was
    exported; its name becomes a part of the evaluation's.

    Raises:
        RunError: not a run, no such checkpoint, or not calibrated for this budget.
        DeviceError: the engine fails, or cannot do what it is asked.
        CloudError: the cloud failed; what it answered is kept.
    """
    run = Path(run)
    config = run_config(run)
    name = evaluation_name(budget, untrained, best)
    sampling = config.evaluation if budget is None else turned(config.evaluation, run, budget, best=best)
    # Read once: a training run may save another one meanwhile.
    checkpoint = None if untrained else checkpoint_name(run, best=best)
    from selfroute.cloud import check_questions
    from selfroute.cloud.memory import open_judge
    from selfroute.evaluate import run as evaluation
    from selfroute.tasks.provenance import task_of

    task = task_of(run, config.task, "test")
    check_questions(config.cloud, task.load("test"))
    with ExitStack() as held:
        if engine is None:
            device: Engine = _engine(run, config, checkpoint)
        else:
            from selfroute.evaluate.remote import Remote

            remote = held.enter_context(Remote(engine))
            device, name = remote, f"{name}@{remote.name}"
        cloud = held.enter_context(_cloud(config, run / "cloud.sqlite"))
        held.enter_context(open_judge(task, run / "judge.sqlite", phase="evaluate"))
        outcomes = evaluation.evaluate(
            device,
            task,
            cloud,
            sampling=sampling,
            seed=config.seed,
            solve_samples=SOLVE_SAMPLES,
            handoff=config.evaluation.handoff,
            progress=_under(f"evaluate {name}", progress),
        )
    folder = results(run, best=best) / "evaluations" / name
    evaluation.write_outcomes(folder / "records.jsonl", outcomes)
    write_json(
        folder / "evaluation.json",
        {"checkpoint": checkpoint, "sampling": sampling.model_dump(mode="json")}
        | ({"engine": engine.model_dump(mode="json")} if engine else {}),
    )
    return outcomes


def export(
    run: str | Path,
    to: Format = "hf",
    *,
    kind: Kind = "f16",
    best: bool = False,
    out: str | Path | None = None,
) -> Path:
    """Write a run's model for other engines, into RUN/exports if `out` names no folder; returns what they load.

    Raises:
        RunError: not a run, or no such checkpoint.
        ExportError: the folder is in use, or the model is not of those that can be written.
    """
    run = Path(run)
    settings = run_config(run).model_dump(mode="json")
    checkpoint = checkpoint_name(run, best=best)
    with needs("export"):
        from selfroute.export import folder

        where = Path(out) if out else None
        return folder.export(run, checkpoint, settings, to=to, kind=kind, best=best, out=where)


def benchmark(run: str | Path, changes: Sequence[str], *, budget: float | None = None, best: bool = False) -> Path:
    """A run directory inside a run: its model, calibrated for `budget`, and other problems (`task.dataset=aime24`)."""
    from selfroute.evaluate import benchmark as other

    config = run_config(Path(run))
    if budget is not None:
        turned(config.evaluation, Path(run), budget, best=best)
    return other.benchmark(Path(run), config, changes)


def _under(name: str, progress: Progress | None) -> Progress:
    return lambda what, done, total: progress(f"{name}, {what}", done, total) if progress else None


def calibrate(
    run: str | Path, budget: float, *, best: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Find the dial's bias for a budget on the calibration split, without the cloud.

    It is kept in RUN/calibration.json, for the best checkpoint in RUN/best/calibration.json.
    """
    from selfroute.evaluate.calibrate import calibrate as find
    from selfroute.evaluate.calibrate import check_budget

    run = Path(run)
    check_budget(budget)
    config = run_config(run)
    checkpoint = checkpoint_name(run, best=best)
    folder = results(run, best=best)
    file, records = folder / "calibration.json", folder / "evaluations" / "calibration" / "records.jsonl"
    known = read_json(file) if file.is_file() else {}
    if known.get("checkpoint") != checkpoint or not records.is_file():
        engine = _engine(run, config, checkpoint)
        from selfroute.evaluate.run import calibration_responses
        from selfroute.tasks.provenance import task_of

        responses = calibration_responses(
            engine,
            task_of(run, config.task, "calibration"),
            sampling=config.evaluation,
            seed=config.seed,
            draws=CALIBRATION_DRAWS,
            progress=_under("calibrate", progress),
        )
        write_records(records, ({"problem": problem, "score": r.score} for problem, r in responses))
        known = {"checkpoint": checkpoint, "budgets": {}}
    rows = read_records(records)
    setting = asdict(find([r["score"] for r in rows], budget, num_problems=len({r["problem"] for r in rows})))
    known["budgets"][f"{budget:g}"] = setting
    write_json(file, known)
    return setting


def turned(sampling: Sampling, run: Path, budget: float, *, best: bool = False) -> Sampling:
    """Sampling with the dial set for a budget, as `calibrate` found it.

    Raises:
        ConfigError: the budget is no share.
        RunError: it was not run for this budget, or the model has changed since.
    """
    from selfroute.evaluate.calibrate import check_budget

    check_budget(budget)
    file = results(run, best=best) / "calibration.json"
    known = read_json(file) if file.is_file() else {"budgets": {}}
    setting: dict[str, Any] | None = known["budgets"].get(f"{budget:g}")
    if setting is None or known["checkpoint"] != checkpoint_name(run, best=best):
        command = f"selfroute calibrate {run} --budget {budget:g}{' --best' if best else ''}"
        raise RunError(f"{run} is not calibrated for this budget: {command}")
    return sampling.model_copy(update={"decide": "threshold", "bias": setting["bias"]})


def load(run: str | Path, *, budget: float | None = None, best: bool = False) -> Pair:
    """The pair of a run directory, by its newest checkpoint or its best, or of a config's untrained model (by name or
    `.toml` file; its cloud remembers nothing).

    Raises:
        RunError: neither a run nor a config, no such checkpoint, or not calibrated for this budget.
    """
    from selfroute.evaluate.pair import Pair

    path = Path(run)
    if (path.suffix == ".toml" and not path.is_dir()) or (not path.exists() and str(run) in names()):
        if budget is not None or best:
            raise ConfigError(
                f"{run} is an untrained model, which has no dial and no checkpoints: give a run directory with "
                "--budget and --best"
            )
        config = load_train_config(str(run))
        engine = _engine(path, config, None)
        return Pair(config, engine, _cloud(config, Path(":memory:")), config.evaluation)
    config = run_config(path)
    sampling = config.evaluation if budget is None else turned(config.evaluation, path, budget, best=best)
    engine = _engine(path, config, checkpoint_name(path, best=best))
    return Pair(config, engine, _cloud(config, path / "cloud.sqlite"), sampling)


def report(run: str | Path, *, best: bool = False) -> dict[str, Any]:
    """Write RUN/summary.json, RUN/report.html and the figures from what is in a run directory; returns the summary.

    With `best`, they are of the best checkpoint's evaluations and go to RUN/best.

    Raises:
        RunError: not a run, not evaluated yet, or no best checkpoint was kept.
    """
    from selfroute.evaluate.report import write_report

    run_config(Path(run))
    if best:
        checkpoint_name(Path(run), best=True)
    return write_report(Path(run), best=best)
