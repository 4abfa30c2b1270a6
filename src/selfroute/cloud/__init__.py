"""Clouds: providers of the cloud LLM, and the memory in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfroute.config import Choice, build, chosen, resolve
from selfroute.tasks import TASKS
from selfroute.types import CloudClient, Problem

CLOUDS = {"oracle": "selfroute.cloud.oracle:Oracle", "openai": "selfroute.cloud.client:OpenAICloud"}

SERVES = {"oracle": ("countdown", "addition")}
"""Clouds that answer some of the tasks that come with selfroute, and which; the others answer anything."""


def make_cloud(choice: Choice) -> CloudClient:
    """The cloud that a config names."""
    client: CloudClient = build(choice, CLOUDS)
    return client


def check_questions(choice: Choice, problems: Sequence[Problem]) -> None:
    """Stop, before anything is spent, where a cloud that has answers to some questions alone has none to one of these.

    Raises:
        CloudError: naming the question, and the way out.
    """
    check = getattr(chosen(choice, CLOUDS), "check_question", None)
    if check is not None:
        for problem in problems:
            check(problem.question)


def whole_task(choice: Choice) -> Choice:
    """A task with every default of its own and of its judge written out.

    Raises:
        ConfigError: no such task or judge, or settings that it does not take.
    """
    task = resolve(choice, TASKS, "task")
    judge = _judge_in(task)
    if judge is None:
        return task
    written = resolve(judge, CLOUDS, "task.judge").model_dump(mode="json")
    return Choice(name=task.name, **{**task.settings, "judge": written})


def free_settings(cloud: Choice, task: Choice) -> list[str]:
    """Keys of a run's settings that change no answer and no verdict, such as time-outs and limits of its cloud and of
    its task's judge: a run may go on with others."""
    judge = _judge_in(task)
    found = [
        ("cloud", cloud, CLOUDS),
        ("task", task, TASKS),
        *([("task.judge", judge, CLOUDS)] if judge else []),
    ]
    return [f"{table}.{key}" for table, choice, known in found for key in getattr(chosen(choice, known), "FREE", ())]


def _judge_in(task: Choice) -> Choice | None:
    """The judge among a task's settings."""
    judge: Any = task.settings.get("judge")
    return Choice(**judge) if isinstance(judge, dict) and "name" in judge else None
