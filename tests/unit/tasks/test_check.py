from __future__ import annotations

import math

import pytest

from selfroute.config import Choice
from selfroute.tasks import make_task
from selfroute.tasks.addition import Addition, AdditionConfig
from selfroute.tasks.check import Fault, agreement, check
from selfroute.types import Problem, Verdict


@pytest.mark.parametrize("name", ["countdown", "addition"])
def test_shipped_tasks_judge_as_they_should(name: str) -> None:
    task = make_task(Choice(name=name, train=1, calibration=1, test=50))
    assert list(check(task, task.load("test"))) == [None] * 50


class Lenient(Addition):
    """An addition that takes anything."""

    def verify(self, answer: str, problem: Problem) -> Verdict:
        return Verdict(True, "as you say")


class Strict(Addition):
    """An addition that takes nothing."""

    def verify(self, answer: str, problem: Problem) -> Verdict:
        return Verdict(False, "never")


def test_wrong_verifiers_are_found_out() -> None:
    config = AdditionConfig(train=1, calibration=1, test=3)
    problems = Addition(config).load("test")
    sums = [Addition(config).solution(p) for p in problems]
    assert list(check(Lenient(config), problems)) == [
        Fault(p.id, sums[(n + 1) % 3], False, "as you say") for n, p in enumerate(problems)
    ]
    assert list(check(Strict(config), problems)) == [
        Fault(p.id, sums[n], True, "never") for n, p in enumerate(problems)
    ]
    # Nothing else to try it with.
    assert list(check(Lenient(config), problems[:1])) == [None]


def test_agreement_by_hand() -> None:
    grades, labels = [1.0, 0.8, 0.5, 0.4, 0.0, 0.9], [1.0, 0.7, 0.6, 0.1, 0.2, 0.3]
    found = agreement(grades, labels, 0.7)
    # Three pass of ours, two of the labels, and five of six are alike; by chance 3/6 * 2/6 + 3/6 * 4/6 would be.
    assert found.alike.value == pytest.approx(5 / 6)
    assert found.alike.low < 5 / 6 < found.alike.high
    assert found.kappa == pytest.approx((5 / 6 - 1 / 2) / (1 - 1 / 2))
    # Ranks 6 4 3 2 1 5 and 6 5 4 1 2 3: 1 - 6 * 8 / (6 * 35).
    assert found.rank == pytest.approx(1 - 6 * 8 / 210)


def test_agreement_with_what_never_varies_is_of_the_share_alone() -> None:
    found = agreement([1.0, 1.0], [1.0, 0.5], 1.0)
    assert found.alike.value == 0.5
    assert math.isnan(found.kappa)
    assert math.isnan(found.rank)
