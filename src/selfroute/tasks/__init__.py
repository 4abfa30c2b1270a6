"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from selfroute.config import Choice, build
from selfroute.types import About, Problem, Split, Verdict

TASKS = {
    "countdown": "selfroute.tasks.countdown:Countdown",
    "addition": "selfroute.tasks.addition:Addition",
    "maths": "selfroute.tasks.maths:Maths",
    "choice": "selfroute.tasks.choice:MultipleChoice",
    "code": "selfroute.tasks.code:Code",
    "gym": "selfroute.tasks.gym:Gym",
    "judge": "selfroute.tasks.judge:Judge",
    "custom": "selfroute.tasks.custom:Custom",
}

T = TypeVar("T")


class Task(Protocol):
    """What a task gives.

    `ABOUT`: its data sets, for people. `load`: the problems of a split. `training_problems`: problems of the training
    split, drawn without end. `verify`: a verdict. `solution`: a right answer, None where there is none. `read`: a
    problem in a user's own words. `variants`: up to `count` questions that ask the same as a problem in other words.
    `canonical`: an answer in a form that equal answers share; it must not tell whether the answer is right.

    A task may have more: `verify_many`, where a verdict takes time or money; `pass_score`, where answers are graded; a
    setting `judge`, which names a provider as a run names its cloud, and is then handed `ask` (`types.AskJudge`).
    """

    config: Any
    ABOUT: tuple[About, ...]

    def load(self, split: Split) -> list[Problem]: ...

    def training_problems(self, rng: random.Random) -> Iterator[Problem]: ...

    def verify(self, answer: str, problem: Problem) -> Verdict: ...

    def solution(self, problem: Problem) -> str | None: ...

    def read(self, text: str) -> Problem: ...

    def variants(self, problem: Problem, count: int) -> list[str]: ...

    def canonical(self, answer: str) -> str: ...


def verdicts(task: Task, answers: Sequence[tuple[str, Problem]]) -> list[Verdict]:
    """The verdicts on answers, in their order: many at a time where a task's verifier has `verify_many`."""
    many = getattr(task, "verify_many", None)
    if many is None or not answers:
        return [task.verify(answer, problem) for answer, problem in answers]
    found: list[Verdict] = _run(many(answers))
    return found


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, for a caller that may be inside an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def pass_score(task: Task) -> float:
    """The score from which on an answer is correct: 1 where a task does not say otherwise."""
    score: float = getattr(task, "pass_score", 1.0)
    return score


def judge_of(task: Task) -> Choice | None:
    """The judge that a task's settings name; None where it verifies answers by itself."""
    named = getattr(task.config, "judge", None)
    return named if isinstance(named, Choice) else None


def make_task(choice: Choice) -> Task:
    """The task that a config names."""
    task: Task = build(choice, TASKS)
    return task
