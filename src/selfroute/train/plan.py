"""What a batch teaches: verdicts -> rewards -> D1 u D2 -> advantages and decisions -> the rows of the update.

Nothing here samples or touches weights, so that our loop and TRL's trainer plan alike.

Axes: P problems, G responses.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfroute.cloud.memory import Cloud
from selfroute.errors import TrainingError
from selfroute.protocol import (
    HELP_CALL,
    DecisionPoint,
    boundaries,
    cloud_request,
    find_decision,
    last_boundary,
    parse,
)
from selfroute.tasks import Task, judge_of, pass_score, verdicts
from selfroute.train import gapg
from selfroute.train.algorithms import ALGORITHMS, next_dual
from selfroute.train.config import TrainConfig
from selfroute.train.ranks import Ranks
from selfroute.train.reward import reward
from selfroute.train.rows import Row
from selfroute.types import Answer, Decision, HelpCall, Problem, Response, Undecided


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
    """A problem's G responses, what they decide, which answers are correct, and their scores (0 without an answer)."""

    responses: Sequence[Response]
    decisions: Sequence[Decision]
    correct: Sequence[bool]
    scores: Sequence[float]


@dataclass(frozen=True, slots=True)
class EarlyExit:
    """Where a response could have asked before its end: `place` tokens stand before it. It is one of `places`, and its
    term weighs `weight`."""

    place: int
    places: int
    weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch teaches. `cloud_score_P`, the score of the cloud's answer, is None where it was never needed,
    `exits_PG` where a response is not kept or had no early exit."""

    judged: Sequence[Judged]
    cloud_score_P: Sequence[float | None]
    rewards_PG: Tensor
    selection: gapg.Selection
    advantages_PG: Tensor
    call_rate: float
    exits_PG: Sequence[Sequence[EarlyExit | None]] = ()

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
        # The end token counts.
        self.help_tokens = len(tokenizer.encode(HELP_CALL, add_special_tokens=False)) + 1
        self.pass_score = pass_score(task)
        self.cloud_scores: dict[str, float] = {}
        self.dual = 0.0

    def judge(self, problems: Sequence[Problem], groups: Sequence[Sequence[Response]]) -> list[Judged]:
        """What each problem's responses decide, and what their answers are worth.

        Each rank judges its share, as one batch; where a judge is paid, the first judges all.
        """
        if judge_of(self.task):
            return self.ranks.from_first(lambda: self._judge(problems, groups))
        return self.ranks.gather(lambda: self._judge(self.ranks.share(problems), self.ranks.share(groups)))

    def _judge(self, problems: Sequence[Problem], groups: Sequence[Sequence[Response]]) -> list[Judged]:
        decisions = [[parse(r.text, finished=r.finished) for r in group] for group in groups]
        answers = [
            (d.text, p) for p, group in zip(problems, decisions, strict=True) for d in group if isinstance(d, Answer)
        ]
        found = iter(verdicts(self.task, answers))
        judged = []
        for responses, group in zip(groups, decisions, strict=True):
            read = [next(found) if isinstance(d, Answer) else None for d in group]
            correct = [v is not None and v.correct for v in read]
            judged.append(Judged(responses, group, correct, [v.score if v else 0.0 for v in read]))
        return judged

    def plan(self, step: int, problems: Sequence[Problem], judged: Sequence[Judged]) -> Plan:
        """The plan of a batch; asks the cloud where its verdict is needed.

        Raises:
            CloudError: the cloud failed.
            TrainingError: a reward is not finite.
        """
        config = self.config
        cloud_score_P = self._ask_cloud(step, problems, self._needed(judged))
        rewards_PG = torch.tensor(
            [
                [
                    reward(d, score=score, cloud_score=cloud_score, weights=config.reward, tokens=len(r.token_ids))
                    for r, d, score in zip(one.responses, one.decisions, one.scores, strict=True)
                ]
                for one, cloud_score in zip(judged, cloud_score_P, strict=True)
            ],
            dtype=torch.float64,
        )
        if not torch.isfinite(rewards_PG).all():
            raise TrainingError(f"a reward is not finite at step {step}: check the task's verifier and the weights")
        selection = gapg.select(
            [one.correct for one in judged],
            [None if score is None else score >= self.pass_score for score in cloud_score_P],
            budget=config.budget,
            rule=config.d1,
            rng=random.Random(f"{config.seed}/{step}/d2"),
        )
        if not self.algorithm.filters:
            selection = replace(selection, kept=tuple(range(len(problems))))
        asks_PG = torch.tensor([[isinstance(d, HelpCall) for d in one.decisions] for one in judged]).double()
        advantages_PG = self.algorithm.advantages(rewards_PG, asks_PG, self.dual)
        exits_PG = self._exits(step, problems, judged, selection.kept) if config.sampling.early_exit else ()
        return Plan(judged, cloud_score_P, rewards_PG, selection, advantages_PG, asks_PG.mean().item(), exits_PG)

    def state(self) -> dict[str, Any]:
        """What is remembered, for a checkpoint."""
        return {"cloud_scores": self.cloud_scores, "dual": self.dual}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Remember what a checkpoint holds; one of an earlier version says only which cloud answers were correct."""
        self.cloud_scores = state["cloud_scores"] if "cloud_scores" in state else state["cloud_correct"]
        self.dual = state["dual"]

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
                early = self.early(plan, p, g)
                if early is not None:
                    rows.append(replace(early, problem=number))
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
            ids, index, point, boundary = self._asking(ids, last_boundary(ids, self.tokenizer))
        else:
            return None
        gap = gapg.decision_gap(
            self._earned(plan, p, g),
            cloud_score=plan.cloud_score_P[p],
            cloud_share=self.cloud_share(),
            cloud_reward=self.config.reward.cloud,
        )
        declined = self._declined(plan, p, g)
        return Row(p, ids[: index + 1], 0.0, gap, index, point, boundary, declined) if gap or declined else None

    def early(self, plan: Plan, p: int, g: int) -> Row | None:
        """A response up to a place where it could have asked before its end, and the help call there; None without."""
        exit_ = plan.exits_PG[p][g] if plan.exits_PG else None
        if exit_ is None:
            return None
        response, config = plan.judged[p].responses[g], self.config
        gap = gapg.early_gap(
            self._earned(plan, p, g),
            cloud_score=plan.cloud_score_P[p],
            cloud_share=self.cloud_share(),
            cloud_reward=config.reward.cloud,
            token_cost=config.reward.token_cost,
            saved=len(response.token_ids) - exit_.place - self.help_tokens,
        )
        ids, index, point, boundary = self._asking(response.token_ids, exit_.place)
        # One place stands for all of them.
        declined = exit_.places * self._declined(plan, p, g)
        return Row(p, ids, 0.0, exit_.weight * gap, index, point, boundary, declined) if gap or declined else None

    def _declined(self, plan: Plan, p: int, g: int) -> float:
        """What a help call that could not come weighs in the policy loss: the advantage of what went on instead."""
        sampling = self.config.sampling
        return plan.advantages_PG[p, g].item() if sampling.forbid_help and sampling.early_exit else 0.0

    def _asking(self, ids: Sequence[int], place: int) -> tuple[tuple[int, ...], int, DecisionPoint, int]:
        """A response that asks at a place: its tokens up to the one that parts the tags, where that stands, under which
        form of the decision point, and where the help call begins."""
        point = self.points[0]
        head = tuple(ids[:place])
        if head and str(self.tokenizer.decode(list(point.prefix))).startswith("\n"):
            # This tokenizer merges the line break into the tag's first token.
            head = head[:-1]
        asking = (*head, *point.prefix, point.help)
        return asking, len(asking) - 1, point, len(head)

    def _earned(self, plan: Plan, p: int, g: int) -> float:
        """A response's reward without the price of its tokens."""
        one = plan.judged[p]
        return reward(
            one.decisions[g],
            score=one.scores[g],
            cloud_score=plan.cloud_score_P[p],
            weights=self.config.reward,
        )

    def _exits(
        self, step: int, problems: Sequence[Problem], judged: Sequence[Judged], kept: Sequence[int]
    ) -> list[list[EarlyExit | None]]:
        """For each response of a kept problem, one of the line breaks before its decision, drawn evenly.

        It stands for all B of them, so it weighs B, which makes each place of the batch count the same: the odds of
        asking after some reasoning then tend to the ratio of what is won and lost over all responses that go through
        it, however long they are. The weights are divided by their mean, which leaves the term of a response as
        large as that of its last decision. The draw follows from (seed, step, problem, index) alone.
        """
        places_PG: dict[int, list[list[int]]] = {
            p: [self._places(r, d) for r, d in zip(judged[p].responses, judged[p].decisions, strict=True)] for p in kept
        }
        counts = [len(places) for group in places_PG.values() for places in group if places]
        mean = sum(counts) / len(counts) if counts else 1.0
        exits: list[list[EarlyExit | None]] = []
        seen: Counter[str] = Counter()
        for p, problem in enumerate(problems):
            # A problem that a batch holds twice goes on counting.
            first = seen[problem.id]
            seen[problem.id] += len(judged[p].responses)
            group: list[EarlyExit | None] = [None] * len(judged[p].responses)
            for g, places in enumerate(places_PG.get(p, [])):
                if places:
                    rng = random.Random(f"{self.config.seed}/{step}/{problem.id}/{first + g}/exit")
                    group[g] = EarlyExit(rng.choice(places), len(places), len(places) / mean)
            exits.append(group)
        return exits

    def _places(self, response: Response, decision: Decision) -> list[int]:
        """The line breaks before the one at which a response decided, or was cut."""
        places = boundaries(response.token_ids, self.tokenizer)
        found = None
        if not isinstance(decision, Undecided):
            found = find_decision(response.token_ids, self.points, self.tokenizer)
        end = found[0] - len(found[1].prefix) if found else max(places, default=0)
        return [place for place in places if place < end]

    def cloud_share(self) -> float:
        """q: the mean score of the cloud's answers so far (the share of correct ones); 1 before the first."""
        return sum(self.cloud_scores.values()) / len(self.cloud_scores) if self.cloud_scores else 1.0

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

    def _ask_cloud(self, step: int, problems: Sequence[Problem], needed: Sequence[int]) -> list[float | None]:
        """The score of the cloud's answer to each problem of the batch; None where it was never needed."""
        fresh = [problems[i] for i in needed if problems[i].id not in self.cloud_scores]

        def scores() -> list[float]:
            assert self.cloud is not None
            asked = [(p.id, cloud_request(p.question)) for p in fresh]
            answers = self.cloud.ask(asked, phase="train", step=step)
            read = [parse(answer.text, finished=answer.finished) for answer in answers]
            given = [(r.text, p) for p, r in zip(fresh, read, strict=True) if isinstance(r, Answer)]
            found = iter(verdicts(self.task, given))
            return [next(found).score if isinstance(r, Answer) else 0.0 for r in read]

        for p, score in zip(fresh, self.ranks.from_first(scores), strict=True):
            self.cloud_scores[p.id] = score
        return [self.cloud_scores.get(p.id) for p in problems]
