"""Every row of the reward table (arXiv:2509.24050, section 3.2), by hand."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from selfroute.train.reward import RewardConfig, reward
from selfroute.types import Answer, Decision, HelpCall, Undecided

V1 = RewardConfig(answer=2.0, cloud=0.5, format=0.2)
GOOD, BAD = Answer("1+2", True), Answer("1+2", False)


@pytest.mark.parametrize(
    ("decision", "correct", "cloud_correct", "value"),
    [
        (GOOD, True, None, 2.2),
        (GOOD, True, True, 2.2),
        (GOOD, True, False, 2.2),
        (BAD, True, None, 2.0),
        (HelpCall(), False, True, 0.5),
        (HelpCall(), False, False, 0.0),
        (GOOD, False, None, 0.2),
        (GOOD, False, True, 0.2),
        (BAD, False, True, 0.0),
        (Undecided(), False, True, 0.0),
        (Undecided(), False, None, 0.0),
    ],
)
def test_table(decision: Decision, correct: bool, cloud_correct: bool | None, value: float) -> None:
    assert reward(decision, score=correct, cloud_score=cloud_correct, weights=V1) == pytest.approx(value)


def test_a_help_call_without_a_verdict_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="before the cloud's answer is judged"):
        reward(HelpCall(), score=False, cloud_score=None, weights=V1)


@pytest.mark.parametrize("weights", [(1, 1, 0.1), (1, 0.25, 0.25), (1, 0.25, 0.5), (0.2, 0.25, 0.1), (-1, -2, -3)])
def test_the_weights_are_ordered(weights: tuple[float, float, float]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig(answer=weights[0], cloud=weights[1], format=weights[2])


def test_accuracy_alone_needs_no_cloud() -> None:
    alone = RewardConfig(answer=1.0, cloud=0.0, format=0.0)
    assert reward(HelpCall(), score=False, cloud_score=None, weights=alone) == 0
    assert reward(GOOD, score=True, cloud_score=None, weights=alone) == 1
    assert reward(GOOD, score=False, cloud_score=None, weights=alone) == 0
