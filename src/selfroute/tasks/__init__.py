"""Tasks: where problems come from and how answers are judged."""

from __future__ import annotations

from typing import Any, Protocol

from selfroute.config import Choice, build
from selfroute.types import Problem, Split, Verdict

TASKS = {"countdown": "selfroute.tasks.countdown:Countdown"}


class Task(Protocol):
    """What a task gives: problems by split, verdicts, and problems in a user's own words."""

    config: Any

    def load(self, split: Split) -> list[Problem]: ...

    def verify(self, answer: str, problem: Problem) -> Verdict: ...

    def read(self, text: str) -> Problem: ...


def make_task(choice: Choice) -> Task:
    """The task that a config names."""
    task: Task = build(choice, TASKS)
    return task
