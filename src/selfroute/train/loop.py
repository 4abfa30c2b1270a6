"""The training loop: G responses a problem -> their plan (`plan`) -> one update.

One step reads from top to bottom in `Trainer.step`. Everything random is named by (seed, step, problem, index) and the
weights change only at a step's end, so that a run killed anywhere and resumed equals one that was not. Left out on
purpose: many machines, how a checkpoint is rated (`rate` comes from outside), and clipping, KL or old
log-probabilities, which the method does without.

Axes: P problems, G responses.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfroute.cloud import check_questions, free_settings, make_cloud
from selfroute.cloud.memory import Cloud, Spent, open_judge
from selfroute.device.head import Head
from selfroute.device.hf import HFEngine
from selfroute.device.load import place
from selfroute.errors import ConfigError, ContextError, DivergenceError, TrainingError, TrainingWarning
from selfroute.protocol import chat
from selfroute.records import append_record, checkpoints, known_data, lock_run, open_run, read_records, write_records
from selfroute.tasks import Task, make_task
from selfroute.tasks.provenance import pinned, provenance
from selfroute.train.checkpoint import load_checkpoint, note_scores, save_checkpoint, warn_of_changes
from selfroute.train.config import TrainConfig, as_now, check_dtype
from selfroute.train.memory import check_memory
from selfroute.train.optimizer import MasterAdamW
from selfroute.train.plan import Planner, batch
from selfroute.train.progress import Clock, StepRecord, flat, shares, start_trackers, stop_signals
from selfroute.train.ranks import Ranks, check_launch
from selfroute.train.rows import Row, accumulate_gradients
from selfroute.types import Problem, Response

Rate = Callable[[HFEngine, Task, Cloud], float]
"""What a model is worth; the more the better. It changes neither the model nor what training draws."""


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[StepRecord], None] = lambda record: None,
    rate: Rate | None = None,
    stage: str = "",
) -> Path:
    """Post-train a device model; returns the last checkpoint.

    A Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint; `resume` goes on from the newest one.
    With `rate`, every `config.evaluation.every` steps and at the end a checkpoint is rated, and the best one kept.
    `stage` tells the run's cloud calls from those of other runs that share its cloud's file.

    Raises:
        ConfigError: checkpoints are to be rated, and there is no `rate`.
        RunError: `out` holds another run, or one and `resume` is off.
        CloudError: the cloud failed; a checkpoint of the last finished step is saved.
        DivergenceError: a number was not finite.
        TrainingError: the disk refused a checkpoint.
        KeyboardInterrupt: after the checkpoint that a Ctrl-C asked for.
    """
    if config.evaluation.every and rate is None:
        raise ConfigError("evaluation.every needs what rates a checkpoint: train with selfroute.api.train")
    check_dtype(config)
    where = place(config.device)
    check_launch(where)
    ranks = Ranks(where)
    written, free = config.model_dump(mode="json"), free_settings(config.cloud, config.task)
    with lock_run(out) if ranks.first else nullcontext():
        task = make_task(pinned(config.task, known_data(out)))

        def begin() -> None:
            data = provenance(task, "train", "calibration", "test")
            check_questions(config.cloud, task.load("train"))
            open_run(out, "train", written, resume=resume, free=free, as_now=as_now, data=data)

        ranks.from_first(begin)
        ranks.each(lambda: check_memory(config))
        trainer = Trainer(config, out, ranks, rate, task, stage)
        with trainer.clouds:
            last = trainer.run(report)
    ranks.end()
    return last


SILENT_STEPS = 3
"""Steps without a response that decided or one to learn from, after which training says so."""


def check_prompts(engine: HFEngine, problems: Sequence[Problem], max_tokens: int) -> None:
    """Refuse a problem that will not fit the model's context now, and not when its step comes.

    Raises:
        ContextError: naming the problem.
    """
    for problem in problems:
        # A token is a byte at least, and the instruction with its template is far shorter than the rest.
        if engine.context and len(problem.question.encode()) + 500 + max_tokens > engine.context:
            try:
                engine.check_context([engine.encode(chat(problem.question))], max_tokens)
            except ContextError as error:
                raise ContextError(f"problem {problem.id}: {error}") from error


class Trainer:
    """A run on this process, which is one of `ranks`; the first of them rates checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        ranks: Ranks,
        rate: Rate | None = None,
        task: Task | None = None,
        stage: str = "",
    ) -> None:
        self.config, self.out, self.ranks, self.rate = config, out, ranks, rate
        self.task = task or make_task(config.task)
        self.problems = self.task.load("train")
        saved = checkpoints(out)
        model = config.device.model_copy(update={"model": str(saved[-1])}) if saved else config.device
        self.engine = HFEngine.load(model)
        check_prompts(self.engine, self.problems, config.sampling.max_tokens)
        self.head = Head(self.engine.model)
        self.optimizer = MasterAdamW(
            [p for p in self.engine.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=0.0,
            # Without copies of all weights on the way.
            fused=self.engine.model.device.type == "cuda",
        )
        # Closed by who made this trainer.
        self.clouds = ExitStack()
        self.cloud = None
        if ranks.first:
            cloud = Cloud(make_cloud(config.cloud), out / "cloud.sqlite", stage=stage)
            self.cloud = self.clouds.enter_context(cloud)
            self.clouds.enter_context(open_judge(self.task, out / "judge.sqlite", phase="train"))
        self.planner = Planner(config, self.task, self.engine.tokenizer, self.engine.points, self.cloud, ranks)
        self.finished = 0
        self._silent = 0
        self.scores: dict[str, float] = {}
        metrics = out / "metrics.jsonl"
        if saved:
            state = load_checkpoint(saved[-1], self.optimizer)
            self.finished = state["step"]
            if self.finished < config.steps:
                warn_of_changes(saved[-1], state)
            self.planner.resume(state)
            self.scores = state.get("scores", {})
        if ranks.first:
            # Steps past the checkpoint will be done again.
            done = read_records(metrics) if saved else []
            write_records(metrics, [r for r in done if r["step"] <= self.finished])
        # Whether weights, optimizer and metrics.jsonl all stand at `finished`, so that a checkpoint may be made.
        self.whole = True
        self.accelerator = start_trackers(config, out) if config.trackers and ranks.first else None

    def run(self, report: Callable[[StepRecord], None]) -> Path:
        config = self.config
        with stop_signals() as stop:
            # A run that was stopped before its last checkpoint was rated.
            if self._rate() and self.ranks.any(stop.is_set()):
                raise KeyboardInterrupt
            for step in range(self.finished + 1, config.steps + 1):
                try:
                    record = self.step(step)
                    values = {name: getattr(record, name) for name in StepRecord.__slots__}
                    self.ranks.from_first(partial(self._note, values))
                    self.whole = True
                    if self.accelerator:
                        self.accelerator.log(flat(values), step=step)
                    if self.ranks.first:
                        report(record)
                        self._warn_of_silence(record)
                except Exception:
                    if self.ranks.first and self.finished and self.whole and self._healthy():
                        self.save()
                    raise
                stopped = self.ranks.any(stop.is_set())
                if step % config.checkpoint_every == 0 or step == config.steps or stopped or self._due():
                    self.ranks.from_first(self.save)
                if stopped or (self._rate() and self.ranks.any(stop.is_set())):
                    raise KeyboardInterrupt
        for tracker in self.accelerator.trackers if self.accelerator else ():
            tracker.finish()
        return checkpoints(self.out)[-1]

    def _warn_of_silence(self, record: StepRecord) -> None:
        """Say once that no response comes to a tag: nothing is learned so, and the cloud is paid all the same."""
        self._silent = self._silent + 1 if record.undecided == 1 and not record.rows else 0
        if self._silent == SILENT_STEPS:
            warnings.warn(
                f"no response of the last {SILENT_STEPS} steps came to an answer or a help call, so that nothing is "
                "learned: raise sampling.max_tokens, or begin with a model that follows the instruction (`selfroute "
                "tasks show` prints it)",
                TrainingWarning,
                stacklevel=2,
            )

    def _due(self) -> bool:
        """Whether the checkpoint of the last finished step is one to rate, and is not rated yet."""
        every = self.config.evaluation.every
        if not (self.rate and every and self.finished) or _name(self.finished) in self.scores:
            return False
        return self.finished % every == 0 or self.finished == self.config.steps

    def _rate(self) -> bool:
        """Rate the newest checkpoint, if that is due, and keep it if it is the best; whether it was."""
        if not self._due():
            return False
        self.scores[_name(self.finished)] = self.ranks.from_first(self._score)
        self.ranks.from_first(lambda: note_scores(self.out, self.scores, keep=self.config.keep_checkpoints))
        return True

    def _score(self) -> float:
        assert self.rate is not None
        assert self.cloud is not None
        return self.rate(self.engine, self.task, self.cloud)

    def _note(self, values: dict[str, Any]) -> None:
        """Add a step to metrics.jsonl. A step that is not there is never saved, so that a resumed run lacks no line."""
        try:
            append_record(self.out / "metrics.jsonl", values)
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.out / 'metrics.jsonl'}: {error.strerror} (free some space, then continue with "
                "--resume)"
            ) from error

    def _healthy(self) -> bool:
        """Whether every weight is finite; a checkpoint of others would be of no use."""
        return all(bool(torch.isfinite(p).all()) for p in self.engine.model.parameters())

    def save(self) -> None:
        if any(p.name == _name(self.finished) for p in checkpoints(self.out)):
            return
        save_checkpoint(
            self.out,
            self.finished,
            self.engine.model,
            self.engine.tokenizer,
            self.optimizer,
            {**self.planner.state(), "scores": self.scores},
            keep=self.config.keep_checkpoints,
        )

    def step(self, step: int) -> StepRecord:
        clock = Clock()

        # Sample, and judge.
        problems = batch(self.config, self.problems, step)
        prompts = [self.engine.encode(chat(p.question)) for p in problems]
        groups = self.ranks.gather(lambda: self._sampled(step, problems, prompts))
        judged = self.planner.judge(problems, groups)
        clock.mark("sample")

        # Ask the cloud, reward and filter.
        plan = self.planner.plan(step, problems, judged)
        clock.mark("cloud")

        # Update, on the kept problems alone. Nothing that can fail comes after it.
        spent = self.ranks.from_first(lambda: self._spent(step))
        rows = self.planner.rows(plan)
        decision_loss, grad_norm = self._update(step, [prompts[p] for p in plan.selection.kept], rows, plan.count)
        dual = self.planner.dual
        self.planner.follow(plan)
        self.finished, self.whole = step, False
        clock.mark("update")

        return StepRecord(
            step=step,
            reward=plan.rewards_PG.mean().item(),
            **shares(judged),
            d1=len(plan.selection.d1),
            d2=len(plan.selection.d2),
            dual=dual,
            cloud_calls=spent.calls,
            cloud_tokens=spent.prompt_tokens + spent.completion_tokens,
            cost_usd=round(spent.cost_usd, 9),
            cloud_share=self.planner.cloud_share(),
            device_tokens=sum(len(r.token_ids) for one in judged for r in one.responses),
            rows=len(rows),
            decision_loss=decision_loss,
            grad_norm=grad_norm,
            seconds=clock.seconds(),
        )

    def _sampled(
        self, step: int, problems: Sequence[Problem], prompts: Sequence[Sequence[int]]
    ) -> list[list[Response]]:
        """The responses to this rank's share of a batch."""
        streams = self._streams(step, problems)
        share = self.ranks.share(range(len(problems)))
        try:
            return self.engine.generate([prompts[p] for p in share], [streams[p] for p in share], self.config.sampling)
        except DivergenceError as error:
            raise DivergenceError(f"{error} at step {step}: {_start_again(self.config.lr)}") from error

    def _spent(self, step: int) -> Spent:
        assert self.cloud is not None
        return self.cloud.spent("train", until_step=step)

    def _streams(self, step: int, problems: Sequence[Problem]) -> list[list[str]]:
        """The names of the responses' random streams; a problem that a batch holds twice goes on counting."""
        streams: list[list[str]] = []
        seen: Counter[str] = Counter()
        for p in problems:
            first = seen[p.id] * self.config.num_responses
            streams.append([f"{self.config.seed}/{step}/{p.id}/{first + i}" for i in range(self.config.num_responses)])
            seen[p.id] += 1
        return streams

    def _update(
        self, step: int, prompts: Sequence[Sequence[int]], rows: Sequence[Row], count: int
    ) -> tuple[float, float]:
        """One optimizer step; returns the decision loss and the gradient's norm. None is taken without rows."""
        if not rows:
            return 0.0, 0.0
        config, ranks = self.config, self.ranks
        self.optimizer.zero_grad(set_to_none=True)
        mine = [rows[i] for i in ranks.balance([len(row.token_ids) for row in rows])]

        def work() -> list[float]:
            return [accumulate_gradients(self.engine, self.head, prompts, mine, config, count)]

        try:
            total_decision = sum(ranks.gather(work))
        except DivergenceError as error:
            raise DivergenceError(f"{error} at step {step}: {_start_again(config.lr)}") from error
        ranks.add_gradients(self.optimizer.masters)
        longest = config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.optimizer.masters, longest).item()
        if not math.isfinite(grad_norm):
            raise DivergenceError(f"the gradient's norm is {grad_norm} at step {step}: {_start_again(config.lr)}")
        progress = (step - 1) / max(1, config.steps - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 - progress * (1 - config.lr_end))
        # Out of memory in the middle of it would leave weights of no step.
        self.whole = False
        self.optimizer.step()
        return total_decision, grad_norm


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _start_again(lr: float) -> str:
    return f"start again in another --out with a lower lr (now {lr:g})"
