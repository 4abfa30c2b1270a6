"""A device model and its cloud, ready for questions in the task's own words."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfroute.cloud.memory import Cloud, open_judge
from selfroute.device.base import Sampling
from selfroute.evaluate.run import handed_over, judge, route_of
from selfroute.protocol import chat, cloud_request, parse
from selfroute.tasks import make_task
from selfroute.train.config import TrainConfig
from selfroute.types import CloudAnswer, HelpCall, Response, Route

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
    extracted: str
    judged: bool
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
        memory = cloud.path if cloud.path.name == ":memory:" else cloud.path.with_name("judge.sqlite")
        self._judge = ExitStack()
        self._judge.enter_context(open_judge(self.task, memory, phase="ask"))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the cloud and the judge, their caches and their ledgers."""
        self._judge.close()
        self.cloud.close()

    def answer(self, question: str, *, seed: int = 0) -> Reply:
        """Answer a question in the task's own words; the device decides whether the cloud is asked."""
        started = time.perf_counter()
        problem = self.task.read(question)
        prompt = self.engine.encode(chat(problem.question))
        [[response]] = self.engine.generate([prompt], [[f"{seed}/ask/{problem.id}"]], self.sampling)
        decision = parse(response.text, finished=response.finished)
        last: Response | CloudAnswer = response
        cost = 0.0
        if isinstance(decision, HelpCall):
            before = self.cloud.spent().cost_usd
            request = cloud_request(problem.question, handed_over(response, self.handoff))
            [last] = self.cloud.ask([(problem.id, request)], phase="ask")
            cost = self.cloud.spent().cost_usd - before
        [read] = judge(self.task, [problem], [last])
        return Reply(
            question=problem.question,
            reasoning=response.text,
            route=route_of(decision),
            score=response.score,
            answer=read.answer,
            extracted=read.verdict.extracted,
            judged=read.verdict.judged,
            correct=read.verdict.correct,
            reason=read.verdict.reason,
            cost_usd=cost,
            device_tokens=len(response.token_ids),
            seconds=time.perf_counter() - started,
        )
