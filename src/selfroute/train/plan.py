"""What a batch teaches: verdicts -> rewards -> D1 u D2 -> advantages and decisions -> the rows of the update.

Nothing here samples or touches weights, so that our loop and TRL's trainer plan alike.

Axes: P problems, G responses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfroute.cloud.memory import Cloud
from selfroute.errors import TrainingError
from selfroute.protocol import DecisionPoint, cloud_request, find_decision, last_boundary, parse
from selfroute.tasks import Task, verdicts
from selfroute.train import gapg
from selfroute.train.algorithms import ALGORITHMS, next_dual
from selfroute.train.config import TrainConfig
from selfroute.train.ranks import Ranks
from selfroute.train.reward import reward
from selfroute.train.rows import Row
from selfroute.types import Answer, Decision, HelpCall, Problem, Response


def batch(config: TrainConfig, problems: Sequence[Problem], step: int) -> list[Problem]:
    """The problems of a step: a fresh order each pass over the data, from (seed, pass) alone."""
    size, count = config.problems_per_step, len(problems)
    positions = range((step - 1) * size, step * size)
    orders: dict[int, list[int]] = {}
    for position in positions:
        epoch = position // count
        if epoch not in orders:
            orders[epoch] = list(range(count))
            random.Random(f"{config.seed}/order/{epoch}").shuffle(orders[epoch])
    return [problems[orders[i // count][i % count]] for i in positions]


@dataclass(frozen=True, slots=True)
class Judged:
    """A problem's G responses, what they decide, and which answers are correct."""

    responses: Sequence[Response]
    decisions: Sequence[Decision]
    correct: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch teaches. `cloud_correct_P` is None where the cloud's verdict was never needed."""

    judged: Sequence[Judged]
    cloud_correct_P: Sequence[bool | None]
    rewards_PG: Tensor
    selection: gapg.Selection
    advantages_PG: Tensor
    call_rate: float

    @property
    def count(self) -> int:
        """|D1 u D2| * G, which both losses are divided by."""
        return len(self.selection.kept) * self.rewards_PG.shape[1]


class Planner:
    """Judges and plans, batch after batch; remembers the cloud's verdicts and lambda.

    Args:
        config: the run's settings.
        task: says which answers are correct.
        tokenizer: the device model's.
        points: its decision points.
        cloud: the cloud's memory, on the first rank; None on others.
        ranks: this process among those of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        points: Sequence[DecisionPoint],
        cloud: Cloud | None,
        ranks: Ranks,
    ) -> None:
        self.config, self.task, self.tokenizer, self.points = config, task, tokenizer, points
        self.cloud, self.ranks = cloud, ranks
        self.algorithm = ALGORITHMS[config.algorithm]
        self.cloud_correct: dict[str, bool] = {}
        self.dual = 0.0

    def judge(self, problem: Problem, responses: Sequence[Response]) -> Judged:
        """What a problem's responses decide, and which answers are correct."""
        decisions = [parse(r.text, finished=r.finished) for r in responses]
        found = iter(verdicts(self.task, [(d.text, problem) for d in decisions if isinstance(d, Answer)]))
        correct = [isinstance(d, Answer) and next(found).correct for d in decisions]
        return Judged(responses, decisions, correct)

    def plan(self, step: int, problems: Sequence[Problem], judged: Sequence[Judged]) -> Plan:
        """The plan of a batch; asks the cloud where its verdict is needed.

        Raises:
            CloudError: the cloud failed.
            TrainingError: a reward is not finite.
        """
        config = self.config
        cloud_correct_P = self._ask_cloud(step, problems, self._needed(judged))
        rewards_PG = torch.tensor(
            [
                [
                    reward(d, correct=ok, cloud_correct=cloud_correct, weights=config.reward)
                    for d, ok in zip(one.decisions, one.correct, strict=True)
                ]
                for one, cloud_correct in zip(judged, cloud_correct_P, strict=True)
            ],
            dtype=torch.float64,
        )
        if not torch.isfinite(rewards_PG).all():
            raise TrainingError(f"a reward is not finite at step {step}: check the task's verifier and the weights")
        selection = gapg.select(
            [one.correct for one in judged],
            cloud_correct_P,
            budget=config.budget,
            rule=config.d1,
            rng=random.Random(f"{config.seed}/{step}/d2"),
        )
        if not self.algorithm.filters:
            selection = replace(selection, kept=tuple(range(len(problems))))
        asks_PG = torch.tensor([[isinstance(d, HelpCall) for d in one.decisions] for one in judged]).double()
        advantages_PG = self.algorithm.advantages(rewards_PG, asks_PG, self.dual)
        return Plan(judged, cloud_correct_P, rewards_PG, selection, advantages_PG, asks_PG.mean().item())

    def follow(self, plan: Plan) -> None:
        """After the update: lambda follows the batch's call rate."""
        if self.algorithm.dual:
            config = self.config
            self.dual = next_dual(self.dual, call_rate=plan.call_rate, budget=config.budget, rate=config.dual_rate)

    def rows(self, plan: Plan) -> list[Row]:
        """The sequences with a gradient: those with an advantage, and those with a decision to learn from.

        `Row.problem` counts the problems that are kept.
        """
        rows: list[Row] = []
        for number, p in enumerate(plan.selection.kept):
            for g, response in enumerate(plan.judged[p].responses):
                advantage = plan.advantages_PG[p, g].item()
                decision = self.decision(plan, p, g)
                if decision is not None:
                    decision = replace(decision, problem=number)
                if decision is not None and advantage and decision.boundary is None:
                    # One pass for both.
                    rows.append(replace(decision, token_ids=response.token_ids, advantage=advantage))
                    continue
                if advantage:
                    rows.append(Row(number, response.token_ids, advantage))
                if decision is not None:
                    rows.append(decision)
        return rows

    def decision(self, plan: Plan, p: int, g: int) -> Row | None:
        """A response up to its decision, without an advantage; None where there is nothing to learn from it."""
        response, decision = plan.judged[p].responses[g], plan.judged[p].decisions[g]
        if self.config.decision_weight == 0 or isinstance(decision, HelpCall):
            return None
        ids, boundary = response.token_ids, None
        if isinstance(decision, Answer):
            found = find_decision(ids, self.points, self.tokenizer)
            if found is None:
                return None
            index, point = found
        elif not response.finished:
            # A cut response has not decided: at its last line break it could have asked.
            point = self.points[0]
            head = ids[: last_boundary(ids, self.tokenizer)]
            if head and str(self.tokenizer.decode(list(point.prefix))).startswith("\n"):
                # This tokenizer merges the line break into the tag's first token.
                head = head[:-1]
            boundary = len(head)
            ids = (*head, *point.prefix, point.help)
            index = len(ids) - 1
        else:
            return None
        gap = gapg.decision_gap(
            plan.rewards_PG[p, g].item() if isinstance(decision, Answer) else 0.0,
            cloud_correct=plan.cloud_correct_P[p],
            cloud_share=self.cloud_share(),
            cloud_reward=self.config.reward.cloud,
        )
        return Row(p, ids[: index + 1], 0.0, gap, index, point, boundary) if gap else None

    def cloud_share(self) -> float:
        """q: the share of correct cloud answers so far; 1 before the first."""
        return sum(self.cloud_correct.values()) / len(self.cloud_correct) if self.cloud_correct else 1.0

    def _needed(self, judged: Sequence[Judged]) -> list[int]:
        """The problems whose reward, selection or decision loss rests on the cloud's verdict."""
        config = self.config
        if config.reward.cloud == 0:
            return []
        if config.decision_cloud == "call" and config.decision_weight > 0:
            return list(range(len(judged)))
        return [
            i
            for i, one in enumerate(judged)
            if any(isinstance(d, HelpCall) for d in one.decisions) or (self.algorithm.filters and not any(one.correct))
        ]

    def _ask_cloud(self, step: int, problems: Sequence[Problem], needed: Sequence[int]) -> list[bool | None]:
        """The cloud's verdict on each problem of the batch; None where it was never needed."""
        fresh = [problems[i] for i in needed if problems[i].id not in self.cloud_correct]

        def correct() -> list[bool]:
            assert self.cloud is not None
            asked = [(p.id, cloud_request(p.question)) for p in fresh]
            answers = self.cloud.ask(asked, phase="train", step=step)
            read = [parse(answer.text, finished=answer.finished) for answer in answers]
            return [
                isinstance(r, Answer) and self.task.verify(r.text, p).correct for p, r in zip(fresh, read, strict=True)
            ]

        for p, ok in zip(fresh, self.ranks.from_first(correct), strict=True):
            self.cloud_correct[p.id] = ok
        return [self.cloud_correct.get(p.id) for p in problems]
