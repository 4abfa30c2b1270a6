from __future__ import annotations

import math

import pytest

from selfroute.tasks.agreement import agreement


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
