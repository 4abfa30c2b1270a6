from __future__ import annotations

import pytest

from selfroute.config import Choice
from selfroute.tasks import make_task
from selfroute.tasks.addition import Addition, AdditionConfig
from selfroute.tasks.check import Fault, check
from selfroute.types import Problem, Verdict


@pytest.mark.parametrize("name", ["countdown", "addition"])
def test_shipped_tasks_judge_as_they_should(name: str) -> None:
    task = make_task(Choice(name=name, train=1, calibration=1, test=50))
    assert list(check(task, task.load("test"))) == [None] * 50


class Lenient(Addition):
    """An addition that takes anything."""

    def verify(self, answer: str, problem: Problem) -> Verdict:
        return Verdict(True, "as you say", extracted=f"the sum {answer}")


class Strict(Addition):
    """An addition that takes nothing."""

    def verify(self, answer: str, problem: Problem) -> Verdict:
        return Verdict(False, "never")


def test_wrong_verifiers_are_found_out() -> None:
    config = AdditionConfig(train=1, calibration=1, test=3)
    problems = Addition(config).load("test")
    sums = [Addition(config).solution(p) for p in problems]
    assert list(check(Lenient(config), problems)) == [
        Fault(p.id, sums[(n + 1) % 3], False, "as you say", f"the sum {sums[(n + 1) % 3]}")
        for n, p in enumerate(problems)
    ]
    assert list(check(Strict(config), problems)) == [
        Fault(p.id, sums[n], True, "never", "") for n, p in enumerate(problems)
    ]
    # Nothing else to try it with.
    assert list(check(Lenient(config), problems[:1])) == [None]
