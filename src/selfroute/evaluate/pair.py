"""A device model and its cloud, ready for questions in the task's own words."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfroute.cloud.memory import Cloud
from selfroute.device.base import Sampling
from selfroute.evaluate.run import handed_over, judge, route_of
from selfroute.protocol import chat, cloud_request, parse
from selfroute.tasks import make_task
from selfroute.train.config import TrainConfig
from selfroute.types import HelpCall, Route

if TYPE_CHECKING:
    from selfroute.device.hf import HFEngine


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the pair to one question."""

    question: str
    reasoning: str
    route: Route
    score: float | None
    answer: str | None
    correct: bool
    reason: str
    cost_usd: float
    device_tokens: int
    seconds: float


class Pair:
    """A device model and its cloud, ready to answer; close it, or use it in a `with` block."""

    def __init__(self, config: TrainConfig, engine: HFEngine, cloud: Cloud, sampling: Sampling) -> None:
        self.engine, self.cloud, self.sampling, self.handoff = engine, cloud, sampling, config.evaluation.handoff
        self.task = make_task(config.task)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the cloud, its cache and its ledger."""
        self.cloud.close()

    def answer(self, question: str, *, seed: int = 0) -> Reply:
        """Answer a question in the task's own words; the device decides whether the cloud is asked."""
        started = time.perf_counter()
        problem = self.task.read(question)
        prompt = self.engine.encode(chat(problem.question))
        [[response]] = self.engine.generate([prompt], [[f"{seed}/ask/{problem.id}"]], self.sampling)
        decision = parse(response.text, finished=response.finished)
        text, finished, cost = response.text, response.finished, 0.0
        if isinstance(decision, HelpCall):
            before = self.cloud.spent().cost_usd
            request = cloud_request(problem.question, handed_over(response, self.handoff))
            [given] = self.cloud.ask([(problem.id, request)], phase="ask")
            text, finished, cost = given.text, given.finished, self.cloud.spent().cost_usd - before
        answer, correct, reason = judge(self.task, problem, text, finished)
        return Reply(
            question=problem.question,
            reasoning=response.text,
            route=route_of(decision),
            score=response.score,
            answer=answer,
            correct=correct,
            reason=reason,
            cost_usd=cost,
            device_tokens=len(response.token_ids),
            seconds=time.perf_counter() - started,
        )
