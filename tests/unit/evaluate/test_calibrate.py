from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.errors import ConfigError
from selfroute.evaluate.calibrate import calibrate

SCORES = st.lists(st.none() | st.floats(-20, 20), min_size=1, max_size=60)


def test_the_bias_spends_the_budget() -> None:
    found = calibrate([float(s) for s in range(10)], 0.3, num_problems=10)
    assert found.bias == -6.5
    assert found.call_rate == pytest.approx(0.3)
    assert found.low < 0.3 < found.high


@given(SCORES.filter(lambda s: any(x is not None for x in s)), st.floats(0, 1))
def test_it_never_passes_the_budget(scores: list[float | None], budget: float) -> None:
    found = calibrate(scores, budget, num_problems=len(scores))
    asked = [s is not None and s + found.bias > 0 for s in scores]
    assert sum(asked) / len(scores) <= budget + 1e-9
    assert found.call_rate == pytest.approx(sum(asked) / len(scores))


def test_ends_and_faults() -> None:
    scores = [float(s) for s in range(4)]
    assert calibrate(scores, 0.0, num_problems=4).call_rate == 0
    assert calibrate(scores, 1.0, num_problems=4).call_rate == 1
    for budget in (-0.1, 1.1, 30.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            calibrate(scores, budget, num_problems=4)
    with pytest.raises(ConfigError, match="nothing to turn"):
        calibrate([None], 0.3, num_problems=1)
