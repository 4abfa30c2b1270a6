from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.api import turned
from selfroute.device.base import Sampling
from selfroute.errors import ConfigError
from selfroute.evaluate.calibrate import calibrate

SCORES = st.lists(st.none() | st.floats(-20, 20), min_size=1, max_size=60)


def test_the_bias_stays_one_standard_error_below_the_budget() -> None:
    # sqrt(0.5 * 0.5 / 100) = 0.05: 45 of 100 are asked.
    found = calibrate([float(s) for s in range(100)], 0.5, num_problems=100)
    assert found.bias == -54.5
    assert found.call_rate == pytest.approx(0.45)
    assert found.low < 0.45 < found.high
    # Twice the draws are not twice the problems.
    twice = calibrate([float(s) for s in range(100) for _ in range(2)], 0.5, num_problems=100)
    assert (twice.bias, twice.call_rate, twice.low, twice.high) == (-54.5, 0.45, found.low, found.high)


def test_about_one_dial_in_six_overspends() -> None:
    """Over many calibration sets of normal scores, by the share that each dial truly spends."""
    rng = np.random.default_rng(0)
    biases = [calibrate(rng.normal(size=200).tolist(), 0.3, num_problems=200).bias for _ in range(400)]
    assert 0.10 < sum(NormalDist().cdf(bias) > 0.3 for bias in biases) / 400 < 0.22


@given(SCORES.filter(lambda s: any(x is not None for x in s)), st.floats(0, 1))
def test_it_never_passes_the_budget(scores: list[float | None], budget: float) -> None:
    count = len(scores)
    if budget > 0 and budget * count - math.sqrt(budget * (1 - budget) * count) < 1 - 1e-9:
        with pytest.raises(ConfigError, match="too few"):
            calibrate(scores, budget, num_problems=count)
        return
    found = calibrate(scores, budget, num_problems=count)
    asked = [s is not None and s + found.bias > 0 for s in scores]
    assert sum(asked) / count <= budget + 1e-9
    assert found.call_rate == pytest.approx(sum(asked) / count)


def test_ends_and_faults(tmp_path: Path) -> None:
    scores = [float(s) for s in range(4)]
    assert calibrate(scores, 0.0, num_problems=4).call_rate == 0
    assert calibrate(scores, 1.0, num_problems=4).call_rate == 1
    for budget in (-0.1, 1.1, 30.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            turned(Sampling(), tmp_path, budget)
        with pytest.raises(ConfigError, match="between 0 and 1"):
            calibrate(scores, budget, num_problems=4)
    with pytest.raises(ConfigError, match="nothing to turn"):
        calibrate([None] * 9, 0.5, num_problems=9)
    with pytest.raises(ConfigError, match="4 calibration problems are too few"):
        calibrate(scores, 0.2, num_problems=4)
    with pytest.raises(ConfigError, match="no calibration problem"):
        calibrate([], 0.3, num_problems=0)
