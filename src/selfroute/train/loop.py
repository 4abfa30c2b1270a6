"""The training loop: G responses a problem -> verdicts -> rewards -> D1 u D2 -> one update.

One step reads from top to bottom in `Trainer.step`. Everything random is named by (seed, step, problem, index) and the
weights change only at a step's end, so that a run killed anywhere and resumed equals one that was not. Left out on
purpose: many machines, evaluation, and clipping, KL or old log-probabilities, which the method does without.

Axes: P problems, G responses, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from selfroute.cloud import free_settings, make_cloud
from selfroute.cloud.memory import Cloud
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts, pack
from selfroute.errors import DivergenceError, TrainingError
from selfroute.protocol import chat, cloud_request, find_decision, last_boundary, parse
from selfroute.records import append_record, checkpoints, lock_run, open_run, read_records, write_records
from selfroute.tasks import make_task
from selfroute.train import gapg
from selfroute.train.algorithms import ALGORITHMS, next_dual
from selfroute.train.checkpoint import load_checkpoint, save_checkpoint, warn_of_changes
from selfroute.train.config import TrainConfig, as_now
from selfroute.train.progress import Clock, StepRecord, flat, start_trackers, stop_signals
from selfroute.train.reward import reward
from selfroute.train.rows import Row, log_odds, without_help
from selfroute.types import Answer, Decision, HelpCall, Problem, Response, Undecided


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[StepRecord], None] = lambda record: None,
) -> Path:
    """Post-train a device model; returns the last checkpoint.

    A Ctrl-C or SIGTERM ends the run after the step under way, with a checkpoint; `resume` goes on from the newest one.

    Raises:
        RunError: `out` holds another run, or one and `resume` is off.
        CloudError: the cloud failed; a checkpoint of the last finished step is saved.
        DivergenceError: a number was not finite.
        TrainingError: the disk refused a checkpoint.
        KeyboardInterrupt: after the checkpoint that a Ctrl-C asked for.
    """
    with lock_run(out):
        open_run(
            out, "train", config.model_dump(mode="json"), resume=resume, free=free_settings(config.cloud), as_now=as_now
        )
        trainer = Trainer(config, out)
        try:
            return trainer.run(report)
        finally:
            trainer.cloud.close()


class Trainer:
    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.task = make_task(config.task)
        self.problems = self.task.load("train")
        saved = checkpoints(out)
        model = config.device.model_copy(update={"model": str(saved[-1])}) if saved else config.device
        self.engine = HFEngine.load(model)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.engine.model.parameters() if p.requires_grad],
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=0.0,
        )
        self.algorithm = ALGORITHMS[config.algorithm]
        self.finished = 0
        self.cloud_correct: dict[str, bool] = {}
        self.dual = 0.0
        metrics = out / "metrics.jsonl"
        if saved:
            state = load_checkpoint(saved[-1], self.optimizer)
            self.finished = state["step"]
            if self.finished < config.steps:
                warn_of_changes(saved[-1], state)
            self.cloud_correct, self.dual = state["cloud_correct"], state["dual"]
            # Steps past the checkpoint will be done again.
            write_records(metrics, [r for r in read_records(metrics) if r["step"] <= self.finished])
        else:
            write_records(metrics, [])
        # Whether weights, optimizer and metrics.jsonl all stand at `finished`, so that a checkpoint may be made.
        self.whole = True
        self.cloud = Cloud(make_cloud(config.cloud), out / "cloud.sqlite")
        self.accelerator = start_trackers(config, out) if config.trackers else None

    def run(self, report: Callable[[StepRecord], None]) -> Path:
        config = self.config
        with stop_signals() as stop:
            for step in range(self.finished + 1, config.steps + 1):
                try:
                    record = self.step(step)
                    values = {name: getattr(record, name) for name in StepRecord.__slots__}
                    self._note(values)
                    if self.accelerator:
                        self.accelerator.log(flat(values), step=step)
                    report(record)
                except Exception:
                    if self.finished and self.whole and self._healthy():
                        self.save()
                    raise
                if step % config.checkpoint_every == 0 or step == config.steps or stop.is_set():
                    self.save()
                if stop.is_set():
                    raise KeyboardInterrupt
        if self.accelerator:
            self.accelerator.end_training()
        return checkpoints(self.out)[-1]

    def _note(self, values: dict[str, Any]) -> None:
        """Add a step to metrics.jsonl. A step that is not there is never saved, so that a resumed run lacks no line."""
        try:
            append_record(self.out / "metrics.jsonl", values)
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.out / 'metrics.jsonl'}: {error.strerror} (free some space, then continue with "
                "--resume)"
            ) from error
        self.whole = True

    def _healthy(self) -> bool:
        """Whether every weight is finite; a checkpoint of others would be of no use."""
        return all(bool(torch.isfinite(p).all()) for p in self.engine.model.parameters())

    def save(self) -> None:
        if any(p.name == f"step-{self.finished:06d}" for p in checkpoints(self.out)):
            return
        save_checkpoint(
            self.out,
            self.finished,
            self.engine.model,
            self.engine.tokenizer,
            self.optimizer,
            {"cloud_correct": self.cloud_correct, "dual": self.dual},
            keep=self.config.keep_checkpoints,
        )

    def batch(self, step: int) -> list[Problem]:
        """The problems of a step: a fresh order each pass over the data, from (seed, pass) alone."""
        size, count = self.config.problems_per_step, len(self.problems)
        positions = range((step - 1) * size, step * size)
        orders: dict[int, list[int]] = {}
        for position in positions:
            epoch = position // count
            if epoch not in orders:
                orders[epoch] = list(range(count))
                random.Random(f"{self.config.seed}/order/{epoch}").shuffle(orders[epoch])
        return [self.problems[orders[i // count][i % count]] for i in positions]

    def step(self, step: int) -> StepRecord:
        config, engine = self.config, self.engine
        clock = Clock()

        # Score: sample, parse, judge.
        problems = self.batch(step)
        prompts = [engine.encode(chat(p.question)) for p in problems]
        streams = self._streams(step, problems)
        try:
            groups = engine.generate(prompts, streams, config.sampling)
        except DivergenceError as error:
            raise DivergenceError(f"{error} at step {step}: {_start_again(config.lr)}") from error
        decisions = [[parse(r.text, finished=r.finished) for r in group] for group in groups]
        correct_PG = [
            [isinstance(d, Answer) and self.task.verify(d.text, p).correct for d in group]
            for p, group in zip(problems, decisions, strict=True)
        ]
        clock.mark("sample")

        asked_PG = [[isinstance(d, HelpCall) for d in group] for group in decisions]
        cloud_correct_P = self._ask_cloud(step, problems, self._needed(correct_PG, asked_PG))
        clock.mark("cloud")

        # Reward and filter.
        rewards_PG = torch.tensor(
            [
                [
                    reward(d, correct=ok, cloud_correct=cloud_correct, weights=config.reward)
                    for d, ok in zip(group, correct_G, strict=True)
                ]
                for group, correct_G, cloud_correct in zip(decisions, correct_PG, cloud_correct_P, strict=True)
            ],
            dtype=torch.float64,
        )
        if not torch.isfinite(rewards_PG).all():
            raise TrainingError(f"a reward is not finite at step {step}: check the task's verifier and the weights")
        selection = gapg.select(
            correct_PG,
            cloud_correct_P,
            budget=config.budget,
            rule=config.d1,
            rng=random.Random(f"{config.seed}/{step}/d2"),
        )

        if not self.algorithm.filters:
            selection = replace(selection, kept=tuple(range(len(problems))))
        asks_PG = torch.tensor(asked_PG, dtype=torch.float64)
        advantages_PG = self.algorithm.advantages(rewards_PG, asks_PG, self.dual)

        # Update, on the kept problems alone. Nothing that can fail comes after it.
        spent = self.cloud.spent("train", until_step=step)
        rows = self._rows(selection.kept, groups, decisions, rewards_PG, advantages_PG, cloud_correct_P)
        kept_prompts = [prompts[p] for p in selection.kept]
        decision_loss, grad_norm = self._update(step, kept_prompts, rows, len(selection.kept) * config.num_responses)
        dual, call_rate = self.dual, asks_PG.mean().item()
        if self.algorithm.dual:
            self.dual = next_dual(dual, call_rate=call_rate, budget=config.budget, rate=config.dual_rate)
        self.finished, self.whole = step, False
        clock.mark("update")

        everyone = [
            (d, ok) for group, oks in zip(decisions, correct_PG, strict=True) for d, ok in zip(group, oks, strict=True)
        ]
        share = 1 / len(everyone)
        return StepRecord(
            step=step,
            reward=rewards_PG.mean().item(),
            local_accuracy=sum(ok for _, ok in everyone) * share,
            help=call_rate,
            wrong=sum(isinstance(d, Answer) and not ok for d, ok in everyone) * share,
            undecided=sum(isinstance(d, Undecided) for d, _ in everyone) * share,
            d1=len(selection.d1),
            d2=len(selection.d2),
            dual=dual,
            cloud_calls=spent.calls,
            cloud_tokens=spent.prompt_tokens + spent.completion_tokens,
            cost_usd=round(spent.cost_usd, 9),
            cloud_share=self._cloud_share(),
            device_tokens=sum(len(r.token_ids) for group in groups for r in group),
            rows=len(rows),
            decision_loss=decision_loss,
            grad_norm=grad_norm,
            seconds=clock.seconds(),
        )

    def _streams(self, step: int, problems: Sequence[Problem]) -> list[list[str]]:
        """The names of the responses' random streams; a problem that a batch holds twice goes on counting."""
        streams: list[list[str]] = []
        seen: Counter[str] = Counter()
        for p in problems:
            first = seen[p.id] * self.config.num_responses
            streams.append([f"{self.config.seed}/{step}/{p.id}/{first + i}" for i in range(self.config.num_responses)])
            seen[p.id] += 1
        return streams

    def _needed(self, correct_PG: Sequence[Sequence[bool]], asked_PG: Sequence[Sequence[bool]]) -> list[int]:
        """The problems whose reward, selection or decision loss rests on the cloud's verdict."""
        config = self.config
        if config.reward.cloud == 0:
            return []
        if config.decision_cloud == "call" and config.decision_weight > 0:
            return list(range(len(correct_PG)))
        return [
            i
            for i, (correct_G, asked_G) in enumerate(zip(correct_PG, asked_PG, strict=True))
            if any(asked_G) or (self.algorithm.filters and not any(correct_G))
        ]

    def _ask_cloud(self, step: int, problems: Sequence[Problem], needed: Sequence[int]) -> list[bool | None]:
        """The cloud's verdict on each problem of the batch; None where it was never needed."""
        fresh = [problems[i] for i in needed if problems[i].id not in self.cloud_correct]
        answers = self.cloud.ask([(p.id, cloud_request(p.question)) for p in fresh], phase="train", step=step)
        for p, answer in zip(fresh, answers, strict=True):
            read = parse(answer.text, finished=answer.finished)
            self.cloud_correct[p.id] = isinstance(read, Answer) and self.task.verify(read.text, p).correct
        return [self.cloud_correct.get(p.id) for p in problems]

    def _cloud_share(self) -> float:
        """q: the share of correct cloud answers so far; 1 before the first."""
        return sum(self.cloud_correct.values()) / len(self.cloud_correct) if self.cloud_correct else 1.0

    def _rows(
        self,
        kept: Sequence[int],
        groups: Sequence[Sequence[Response]],
        decisions: Sequence[Sequence[Decision]],
        rewards_PG: torch.Tensor,
        advantages_PG: torch.Tensor,
        cloud_correct_P: Sequence[bool | None],
    ) -> list[Row]:
        """The sequences with a gradient: those with an advantage, and those with a decision to learn from."""
        config = self.config
        cloud_share = self._cloud_share()
        rows: list[Row] = []
        for number, p in enumerate(kept):
            for g, (response, decision) in enumerate(zip(groups[p], decisions[p], strict=True)):
                advantage = advantages_PG[p, g].item()
                found, ids, boundary = None, response.token_ids, None
                if config.decision_weight > 0 and not isinstance(decision, HelpCall):
                    if isinstance(decision, Answer):
                        found = find_decision(ids, self.engine.points, self.engine.tokenizer)
                    elif not response.finished:
                        # A cut response has not decided: at its last line break it could have asked.
                        point = self.engine.points[0]
                        head = ids[: last_boundary(ids, self.engine.tokenizer)]
                        if head and self.engine.decode(point.prefix).startswith("\n"):
                            # This tokenizer merges the line break into the tag's first token.
                            head = head[:-1]
                        boundary = len(head)
                        ids = (*head, *point.prefix, point.help)
                        found = len(ids) - 1, point
                gap = 0.0
                if found is not None:
                    gap = gapg.decision_gap(
                        rewards_PG[p, g].item() if isinstance(decision, Answer) else 0.0,
                        cloud_correct=cloud_correct_P[p],
                        cloud_share=cloud_share,
                        cloud_reward=config.reward.cloud,
                    )
                if found is None or gap == 0:
                    if advantage:
                        rows.append(Row(number, response.token_ids, advantage))
                elif advantage and ids is response.token_ids:
                    rows.append(Row(number, ids, advantage, gap, *found))
                else:
                    if advantage:
                        rows.append(Row(number, response.token_ids, advantage))
                    rows.append(Row(number, ids[: found[0] + 1], 0.0, gap, *found, boundary))
        return rows

    def _update(
        self, step: int, prompts: Sequence[Sequence[int]], rows: Sequence[Row], count: int
    ) -> tuple[float, float]:
        """One optimizer step; returns the decision loss and the gradient's norm. None is taken without rows."""
        if not rows:
            return 0.0, 0.0
        config, model = self.config, self.engine.model
        device = model.device
        total_decision = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        # A group without a gradient has no row, and its prompt does not run either.
        learning = sorted({row.problem for row in rows})
        place = {problem: n for n, problem in enumerate(learning)}
        shared = SharedPrompts(model, [prompts[problem] for problem in learning], self.engine.pad)
        for part in pack([row.token_ids for row in rows], config.micro_batch_tokens):
            chosen = [rows[i] for i in part]
            logits_BTV, targets_BT, mask_BT = shared.logits(
                [place[row.problem] for row in chosen], [row.token_ids for row in chosen]
            )
            loss = logits_BTV.new_zeros(())
            if any(row.advantage for row in chosen):
                policy_BTV = logits_BTV
                if config.sampling.forbid_help:
                    policy_BTV = without_help(logits_BTV, chosen, self.engine.points)
                log_prob_BT = -cross_entropy(policy_BTV.transpose(1, 2).float(), targets_BT, reduction="none")
                advantage_B = torch.tensor([row.advantage for row in chosen], device=device)
                loss = loss + gapg.policy_loss((log_prob_BT * mask_BT).sum(1), advantage_B, count)
            deciding = [(b, row, row.point) for b, row in enumerate(chosen) if row.point is not None]
            if deciding:
                log_odds_B = torch.stack([log_odds(logits_BTV[b], row, point) for b, row, point in deciding])
                gap_B = torch.tensor([row.gap for _, row, _ in deciding], device=device)
                decision = gapg.decision_loss(log_odds_B, gap_B, config.decision_weight, count)
                total_decision += decision.item()
                loss = loss + decision
            if not torch.isfinite(loss):
                raise DivergenceError(f"the loss is {loss.item()} at step {step}: {_start_again(config.lr)}")
            loss.backward()
        shared.backward()
        longest = config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), longest).item()
        if not math.isfinite(grad_norm):
            raise DivergenceError(f"the gradient's norm is {grad_norm} at step {step}: {_start_again(config.lr)}")
        progress = (step - 1) / max(1, config.steps - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 - progress * (1 - config.lr_end))
        # Out of memory in the middle of it would leave weights of no step.
        self.whole = False
        self.optimizer.step()
        return total_decision, grad_norm


def _start_again(lr: float) -> str:
    return f"start again in another --out with a lower lr (now {lr:g})"
