"""The budget dial: the bias on l that spends a budget, found on the calibration split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfroute.errors import ConfigError
from selfroute.evaluate.run import Outcome, columns
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


def calibrate(outcomes: Sequence[Outcome], budget: float, *, num_problems: int) -> Calibration:
    """The bias whose call rate on these outcomes comes closest to the budget without passing it.

    Args:
        outcomes: one or more draws for each calibration problem.
        budget: share of problems that may go to the cloud, in [0, 1].
        num_problems: distinct problems behind the outcomes; the interval rests on them, not on the draws.

    Raises:
        ConfigError: the budget is not a share, or no response reached a decision.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"a budget is a share of problems between 0 and 1, such as 0.3; got {budget}")
    score = np.sort(columns(outcomes).score)[::-1]
    decided = score[np.isfinite(score)]
    if not len(decided):
        raise ConfigError("no calibration response reached a decision point: the dial has nothing to turn")
    most = min(math.floor(budget * len(score) + 1e-9), len(decided))
    # Halfway between the last score that asks and the first that does not; ties answer.
    if most == len(decided):
        threshold = decided[-1] - 1.0
    elif most == 0:
        threshold = decided[0] + 1.0
    else:
        threshold = (decided[most - 1] + decided[most]) / 2
    asked = score > threshold
    spread = proportion(np.repeat(asked.mean(), num_problems))
    return Calibration(budget, -float(threshold), float(asked.mean()), spread.low, spread.high, num_problems)
