"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from selfroute.config import Choice, build
from selfroute.types import About, Problem, Split, Verdict

TASKS = {
    "countdown": "selfroute.tasks.countdown:Countdown",
    "addition": "selfroute.tasks.addition:Addition",
    "maths": "selfroute.tasks.maths:Maths",
    "choice": "selfroute.tasks.choice:MultipleChoice",
    "code": "selfroute.tasks.code:Code",
}


class Task(Protocol):
    """What a task gives.

    `ABOUT`: its data sets, for people. `load`: the problems of a split. `training_problems`: problems of the training
    split, drawn without end. `verify`: a verdict. `solution`: a right answer, None where there is none. `read`: a
    problem in a user's own words. `variants`: up to `count` questions that ask the same as a problem in other words.
    `canonical`: an answer in a form that equal answers share; it must not tell whether the answer is right.
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
    """The verdicts on answers, in their order: many at a time where a task's verifier costs time and has `verify_many`.

    Not for use inside an event loop.
    """
    many = getattr(task, "verify_many", None)
    if many is None or not answers:
        return [task.verify(answer, problem) for answer, problem in answers]
    found: list[Verdict] = asyncio.run(many(answers))
    return found


def make_task(choice: Choice) -> Task:
    """The task that a config names."""
    task: Task = build(choice, TASKS)
    return task
