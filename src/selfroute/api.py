"""The Python API, and what each command does: load, answer, train, evaluate, calibrate, report, demo."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfroute.config import load as load_config
from selfroute.config import names, validate
from selfroute.errors import ConfigError, RunError, SelfrouteError
from selfroute.records import read_json, read_records, write_json
from selfroute.types import Answer, HelpCall

if TYPE_CHECKING:
    from selfroute.device.hf import HFEngine
    from selfroute.evaluate.run import Outcome
    from selfroute.train.loop import StepRecord, TrainConfig
    from selfroute.train.warmstart import WarmstartConfig

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much is done, and of how much."""


@contextlib.contextmanager
def needs_extra(extra: str) -> Any:
    """Turn a missing optional dependency into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in (
            "torch",
            "transformers",
            "accelerate",
            "safetensors",
            "tokenizers",
        ):
            raise SelfrouteError(f"this needs {error.name}: pip install 'selfroute[{extra}]'") from error
        raise


def load_train_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training config by package name or path."""
    with needs_extra("train"):
        from selfroute.train.loop import TrainConfig
    return load_config(TrainConfig, name, overrides)


def train(
    config: str | TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    report: Callable[[StepRecord], None] = lambda record: None,
) -> Path:
    """Post-train a device model into the run directory `out`; returns the last checkpoint."""
    with needs_extra("train"):
        from selfroute.train import loop
    resolved = load_train_config(config) if isinstance(config, str) else config
    return loop.train(resolved, Path(out), resume=resume, report=report)


def load_warmstart_config(name: str, overrides: Sequence[str] = ()) -> WarmstartConfig:
    """A warm start's config by package name or path."""
    with needs_extra("train"):
        from selfroute.train.warmstart import WarmstartConfig
    return load_config(WarmstartConfig, name, overrides)


def warmstart(config: str | WarmstartConfig, out: str | Path, *, report: Callable[[str], None] = print) -> Path:
    """Train a small Countdown model from nothing into the model folder `out`."""
    with needs_extra("train"):
        from selfroute.train import warmstart as warm
    resolved = load_warmstart_config(config) if isinstance(config, str) else config
    return warm.warmstart(resolved, Path(out), report)


def run_config(run: Path) -> TrainConfig:
    """The config that a run directory was made with.

    Raises:
        RunError: it is not a run directory.
    """
    with needs_extra("train"):
        from selfroute.train.loop import TrainConfig
    if not (run / "run.json").is_file():
        raise RunError(f"{run} is not a run directory (make one with: selfroute train countdown-tiny --out {run})")
    return validate(TrainConfig, read_json(run / "run.json")["config"], str(run / "run.json"))


def run_engine(run: Path, config: TrainConfig, *, untrained: bool = False) -> HFEngine:
    """The device model of a run: its newest checkpoint, or the model that it started from."""
    from selfroute.device.hf import HFEngine
    from selfroute.train.checkpoint import checkpoints

    if untrained:
        return HFEngine.load(config.device)
    saved = checkpoints(run)
    if not saved:
        raise RunError(f"{run} has no checkpoint yet: finish the training with --resume")
    return HFEngine.load(config.device.model_copy(update={"model": str(saved[-1])}))


def evaluate(
    run: str | Path,
    *,
    name: str = "after",
    budget: float | None = None,
    untrained: bool = False,
    split: Literal["calibration", "test"] = "test",
    draws: int = 1,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Evaluate a run's device model with its cloud; writes RUN/evaluations/NAME/records.jsonl.

    With a budget the dial is set as `calibrate` found it, and decisions follow it; without, the model's own decisions
    are sampled.
    """
    run = Path(run)
    config = run_config(run)
    from selfroute.cloud import make_cloud
    from selfroute.cloud.memory import Cloud
    from selfroute.evaluate import run as evaluation
    from selfroute.tasks import make_task

    sampling = config.evaluation
    if budget is not None:
        setting = find_calibration(run, budget)
        sampling = sampling.model_copy(update={"decide": "threshold", "bias": setting["bias"]})
    task = make_task(config.task)
    total = len(task.load(split)) * draws
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if progress:
            progress(f"evaluate {name}", done, total)

    cloud = Cloud(make_cloud(config.cloud), run / "cloud.sqlite")
    try:
        outcomes = evaluation.evaluate(
            run_engine(run, config, untrained=untrained),
            task,
            cloud,
            split=split,
            sampling=sampling,
            seed=config.seed,
            draws=draws,
            solve_samples=5 if split == "test" else 0,
            progress=count,
        )
    finally:
        cloud.close()
    evaluation.write_outcomes(run / "evaluations" / name / "records.jsonl", outcomes)
    return outcomes


def calibrate(run: str | Path, budget: float, *, progress: Progress | None = None) -> dict[str, Any]:
    """Find the dial's bias for a budget on the calibration split; remembers it in RUN/calibration.json."""
    run = Path(run)
    from selfroute.evaluate.calibrate import calibrate as find
    from selfroute.evaluate.run import read_outcomes
    from selfroute.train.checkpoint import checkpoints

    if not 0 <= budget <= 1:
        raise ConfigError(f"a budget is a share of problems between 0 and 1, such as 0.3; got {budget}")
    run_config(run)
    checkpoint = checkpoints(run)[-1].name if checkpoints(run) else None
    file = run / "calibration.json"
    known = read_json(file) if file.is_file() else {}
    records = run / "evaluations" / "calibration" / "records.jsonl"
    if known.get("checkpoint") != checkpoint or not records.is_file():
        outcomes = evaluate(run, name="calibration", split="calibration", draws=CALIBRATION_DRAWS, progress=progress)
        known = {"checkpoint": checkpoint, "budgets": {}}
    else:
        outcomes = read_outcomes(records)
    setting = asdict(find(outcomes, budget, num_problems=len({o.problem for o in outcomes})))
    known["budgets"][f"{budget:g}"] = setting
    write_json(file, known)
    return setting


CALIBRATION_DRAWS = 4
"""Responses sampled for each calibration problem: more draws steady the dial without more problems."""


def find_calibration(run: Path, budget: float) -> dict[str, Any]:
    """What `calibrate` found for a budget.

    Raises:
        RunError: it was not run for this budget, or the model has changed since.
    """
    from selfroute.train.checkpoint import checkpoints

    file = run / "calibration.json"
    known = read_json(file) if file.is_file() else {"budgets": {}}
    setting: dict[str, Any] | None = known["budgets"].get(f"{budget:g}")
    if setting is None or known["checkpoint"] != checkpoints(run)[-1].name:
        raise RunError(
            f"{run} is not calibrated for a budget of {budget:g}: selfroute calibrate {run} --budget {budget:g}"
        )
    return setting


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the pair to one question."""

    question: str
    reasoning: str
    route: Literal["device", "cloud", "undecided"]
    score: float | None
    answer: str | None
    correct: bool
    reason: str
    cost_usd: float
    device_tokens: int
    seconds: float


class Pair:
    """A device model and its cloud, ready to answer.

    >>> pair = load("countdown-tiny")                            # doctest: +SKIP
    >>> pair.answer("numbers 3, 7, 25; target 46").route         # doctest: +SKIP
    'device'
    """

    def __init__(self, config: TrainConfig, engine: HFEngine, folder: Path, bias: float | None) -> None:
        from selfroute.cloud import make_cloud
        from selfroute.cloud.memory import Cloud
        from selfroute.tasks import make_task

        self.config, self.engine, self.bias = config, engine, bias
        self.task = make_task(config.task)
        self.cloud = Cloud(make_cloud(config.cloud), folder / "cloud.sqlite")

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the cloud's cache and ledger."""
        self.cloud.close()

    def answer(self, question: str, *, seed: int = 0) -> Reply:
        """Answer a question in the task's own words; the device decides whether the cloud is asked."""
        from selfroute.evaluate.run import judge
        from selfroute.protocol import chat, cloud_request, parse

        started = time.perf_counter()
        problem = self.task.read(question)
        sampling = self.config.evaluation
        if self.bias is not None:
            sampling = sampling.model_copy(update={"decide": "threshold", "bias": self.bias})
        prompt = self.engine.encode(chat(problem.question))
        [[response]] = self.engine.generate([prompt], [[f"{seed}/ask/{problem.id}"]], sampling)
        decision = parse(response.text, finished=response.finished)
        text, finished, cost = response.text, response.finished, 0.0
        if isinstance(decision, HelpCall):
            before = self.cloud.spent().cost_usd
            [cloud_answer] = self.cloud.ask([(problem.id, cloud_request(problem.question))], phase="ask")
            text, finished, cost = cloud_answer.text, True, self.cloud.spent().cost_usd - before
        answer, correct, reason = judge(self.task, problem, text, finished)
        return Reply(
            question=problem.question,
            reasoning=response.text,
            route="cloud"
            if isinstance(decision, HelpCall)
            else "device"
            if isinstance(decision, Answer)
            else "undecided",
            score=response.score,
            answer=answer,
            correct=correct,
            reason=reason,
            cost_usd=cost,
            device_tokens=len(response.token_ids),
            seconds=time.perf_counter() - started,
        )


def load(run: str | Path, *, budget: float | None = None) -> Pair:
    """The pair of a run directory, or of a config's untrained model (its cloud's memory is then a temporary file)."""
    import tempfile

    path = Path(run)
    if not path.exists() and str(run) in names():
        config = load_train_config(str(run))
        return Pair(config, run_engine(path, config, untrained=True), Path(tempfile.mkdtemp(prefix="selfroute-")), None)
    config = run_config(path)
    bias = None if budget is None else find_calibration(path, budget)["bias"]
    return Pair(config, run_engine(path, config), path, bias)


def report(run: str | Path) -> dict[str, Any]:
    """Write RUN/summary.json, RUN/report.html and the figures from what is in a run directory; returns the summary."""
    from selfroute.evaluate.report import write_report

    run_config(Path(run))
    return write_report(Path(run))


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The training steps of a run, as dicts."""
    return read_records(Path(run) / "metrics.jsonl")
