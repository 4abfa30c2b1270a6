"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Protocol

from selfroute.config import Choice, build
from selfroute.types import Problem, Split, Verdict

TASKS = {
    "countdown": "selfroute.tasks.countdown:Countdown",
    "addition": "selfroute.tasks.addition:Addition",
    "code": "selfroute.tasks.code:Code",
}


class Task(Protocol):
    """What a task gives.

    `load`: the problems of a split. `training_problems`: problems of the training split, drawn without end. `verify`: a
    verdict. `read`: a problem in a user's own words. `variants`: up to `count` questions that ask the same as a problem
    in other words. `canonical`: an answer in a form that equal answers share; it must not tell whether the answer is
    right.
    """

    config: Any

    def load(self, split: Split) -> list[Problem]: ...

    def training_problems(self, rng: random.Random) -> Iterator[Problem]: ...

    def verify(self, answer: str, problem: Problem) -> Verdict: ...

    def read(self, text: str) -> Problem: ...

    def variants(self, problem: Problem, count: int) -> list[str]: ...

    def canonical(self, answer: str) -> str: ...


def make_task(choice: Choice) -> Task:
    """The task that a config names."""
    task: Task = build(choice, TASKS)
    return task
