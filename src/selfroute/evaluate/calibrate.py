"""The budget dial: the bias on l that spends a budget, found on the calibration split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfroute.errors import ConfigError
from selfroute.measures import proportion


@dataclass(frozen=True, slots=True)
class Calibration:
    """A dial setting: ask when l + bias > 0.

    `call_rate` is what it spends on the calibration problems, `low` and `high` the 95 % interval of the share that it
    will spend on others like them.
    """

    budget: float
    bias: float
    call_rate: float
    low: float
    high: float
    problems: int


def calibrate(scores: Sequence[float | None], budget: float, *, num_problems: int) -> Calibration:
    """The bias for a budget.

    A budget is a ceiling, and a share measured on N problems has a standard error of up to sqrt(b (1 - b) / N). So the
    bias aims one standard error below the budget, and about five dials in six stay within it on other problems like
    these; of the biases it takes the one whose call rate comes closest to the aim without passing it.

    Args:
        scores: l of one or more responses to each calibration problem, in nats; None where none decided.
        budget: b, the share of problems that may go to the cloud, in [0, 1]; 0 never asks, 1 always does.
        num_problems: distinct problems behind the responses; the interval rests on them, not on the draws.

    Raises:
        ConfigError: the budget is not a share, the problems are too few for it, or no response reached a decision.
    """
    check_budget(budget)
    if num_problems < 1:
        raise ConfigError("there is no calibration problem: raise task.calibration")
    decided = np.sort(np.array([s for s in scores if s is not None], dtype=float))[::-1]
    if not len(decided):
        raise ConfigError(
            "no calibration response came to an answer or a help call, so that the dial has nothing to turn: raise "
            "evaluation.max_tokens, or train a model that follows the instruction (`selfroute tasks show` prints it)"
        )
    aim = budget - math.sqrt(budget * (1 - budget) / num_problems)
    if budget > 0 and aim * num_problems < 1:
        raise ConfigError(
            f"{num_problems} calibration problems are too few for a budget of {budget:g}: raise task.calibration"
        )
    most = min(math.floor(aim * len(scores) + 1e-9), len(decided))
    # Halfway between the last score that asks and the first that does not; ties answer.
    if most == len(decided):
        threshold = -_BEYOND
    elif most == 0:
        threshold = _BEYOND
    else:
        threshold = float(decided[most - 1] + decided[most]) / 2
    rate = float((decided > threshold).sum()) / len(scores)
    spread = proportion(np.full(num_problems, rate))
    return Calibration(budget, -threshold, rate, spread.low, spread.high, num_problems)


def check_budget(budget: float) -> None:
    """Refuse a budget that is no share, such as 30 for 0.3.

    Raises:
        ConfigError: it is not in [0, 1].
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"a budget is a share of problems between 0 and 1, such as 0.3; got {budget}")


_BEYOND = 1e4
"""A bias, in nats, that no score outweighs."""
