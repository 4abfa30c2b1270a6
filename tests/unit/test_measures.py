from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute import measures as m
from selfroute.measures import Columns


def columns(score: list[float], asked: list[int], device: list[int], cloud: list[int]) -> Columns:
    return Columns(*(np.array(x, dtype=float) for x in (score, asked, device, cloud)))


# Ten problems: the device solves six; l puts three of its four failures first; the cloud fails on one problem.
C = columns(
    [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 1, 1, 1, 0, 1, 1],
    [1, 1, 1, 1, 1, 1, 1, 0, 1, 1],
)


def test_the_curve_asks_the_highest_scores_first() -> None:
    rates, accuracy = C.curve
    assert rates.tolist() == pytest.approx([k / 10 for k in range(11)])
    assert accuracy.tolist() == pytest.approx([0.6, 0.7, 0.8, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])
    assert m.accuracy_at(C, 0.3) == pytest.approx(0.8)
    assert m.accuracy_at(C, 0.35) == pytest.approx(0.85)


def test_ties_are_asked_in_no_order() -> None:
    # Four problems tie, two of them rescued by a call: each call in the tie is worth half of one.
    tied = columns([5, 1, 1, 1, 1], [0] * 5, [0, 1, 0, 1, 0], [1] * 5)
    assert tied.curve[1].tolist() == pytest.approx([0.4, 0.6, 0.7, 0.8, 0.9, 1.0])
    same = columns([0] * 10, [0] * 10, [1] * 4 + [0] * 6, [1] * 10)
    assert m.accuracy_at(same, 0.3) == pytest.approx(m.random_accuracy(same, 0.3))


def test_bounds_by_hand() -> None:
    assert m.random_accuracy(C, 0.3) == pytest.approx(0.7 * 0.6 + 0.3 * 0.9)
    # The cloud is right on 3 of the 4 problems that the device fails.
    assert m.oracle_accuracy(C, 0.3) == pytest.approx(0.6 + 0.75 * 0.3)
    assert m.oracle_accuracy(C, 0.9) == pytest.approx(0.6 + 0.75 * 0.4)
    assert m.clairvoyant_accuracy(C, 0.2) == pytest.approx(0.8)
    assert m.clairvoyant_accuracy(C, 0.9) == pytest.approx(0.9)


def test_gains_by_hand() -> None:
    assert C.final.mean() == pytest.approx(0.8)
    assert m.routing_gain_captured(C) == pytest.approx((0.8 - 0.69) / (0.825 - 0.69))
    assert m.performance_gap_recovered(0.8, 0.6, 0.9) == pytest.approx(2 / 3)
    assert math.isnan(m.performance_gap_recovered(0.8, 0.9, 0.905))
    # A cloud that is worse than the device leaves no gap to recover.
    assert math.isnan(m.performance_gap_recovered(0.7, 0.8, 0.5))
    worse = columns([1, 2], [0, 0], [1, 1], [0, 1])
    assert math.isnan(m.average_pgr(worse))
    assert math.isnan(m.call_rate_for(worse, 0.5))
    nobody = columns([1, 2], [0, 0], [1, 1], [1, 1])
    assert math.isnan(m.routing_gain_captured(nobody))


def test_curve_measures_by_hand() -> None:
    # PGR along the curve: 0, 1/3, 2/3, 2/3, then 1.
    assert m.average_pgr(C) == pytest.approx((0 + 1 / 3 + 2 / 3 + 2 / 3 + 1 * 6 + 0.5) / 10)
    assert m.call_rate_for(C, 0.5) == pytest.approx(0.2)
    assert m.call_rate_for(C, 0.8) == pytest.approx(0.4)
    assert math.isnan(m.average_pgr(columns([1, 2], [0, 0], [1, 1], [1, 1])))
    assert math.isnan(m.call_rate_for(columns([1, 2], [0, 0], [1, 1], [1, 1]), 0.5))
    assert m.pgr_vs_trained(C) == pytest.approx(2 / 3)
    assert math.isnan(m.pgr_vs_untrained(C))
    paired = Columns(C.score, C.asked, C.device, C.cloud, np.array([1.0] * 4 + [0.0] * 6))
    assert m.pgr_vs_untrained(paired) == pytest.approx((0.8 - 0.4) / (0.9 - 0.4))


def test_auc_by_hand() -> None:
    # Failures at 9, 8, 6, 2 against solved at 7, 5, 4, 3, 1, 0: 6 + 6 + 5 + 2 of 24 pairs.
    assert m.decision_auc(C) == pytest.approx(19 / 24)
    tied = columns([1, 1, 1, 1], [0] * 4, [0, 1, 0, 1], [1] * 4)
    assert m.decision_auc(tied) == pytest.approx(0.5)
    undecided = columns([-math.inf, 2, 1], [0] * 3, [0, 0, 1], [1] * 3)
    assert m.decision_auc(undecided) == 1.0
    assert math.isnan(m.decision_auc(columns([1, 2], [0, 0], [1, 1], [1, 1])))


def test_undecided_problems_are_asked_last() -> None:
    c = columns([-math.inf, 1.0], [0, 0], [0, 1], [1, 1])
    assert c.curve[1].tolist() == [0.5, 0.5, 1.0]


def test_intervals() -> None:
    wilson = m.proportion(np.ones(100))
    assert wilson.value == 1
    assert wilson.low == pytest.approx(0.963, abs=1e-3)
    assert m.proportion(np.array([])).json() is None
    for n in range(1, 200):
        for share in (np.zeros(n), np.ones(n)):
            found = m.proportion(share)
            assert found.low <= found.value <= found.high
    big = Columns(*(np.tile(x, 100) for x in (C.score, C.asked, C.device, C.cloud)))
    interval = m.bootstrap(big, m.routing_gain_captured, resamples=200)
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.low < 0.4
    assert m.bootstrap(big, m.routing_gain_captured, resamples=200) == interval
    assert m.bootstrap(columns([1, 2], [0, 0], [1, 1], [1, 1]), m.decision_auc).json() is None


def test_a_bootstrap_interval_covers() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        device = (rng.random(200) < 0.6).astype(float)
        c = Columns(rng.random(200), np.zeros(200), device, np.ones(200))
        interval = m.bootstrap(c, lambda part: float(part.device.mean()), resamples=200)
        covered += interval.low <= 0.6 <= interval.high
    assert covered >= 88


ARRAYS = st.lists(
    st.tuples(st.floats(-5, 5), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=30
).map(lambda rows: columns(*map(list, zip(*rows, strict=True))))  # type: ignore[arg-type]


@given(ARRAYS, st.floats(0, 1))
def test_no_order_beats_foresight_and_ends_meet(c: Columns, rate: float) -> None:
    assert m.accuracy_at(c, 0) == pytest.approx(c.device.mean())
    assert m.accuracy_at(c, 1) == pytest.approx(c.cloud.mean())
    assert m.accuracy_at(c, rate) <= m.clairvoyant_accuracy(c, rate) + 1e-9
    assert m.random_accuracy(c, rate) <= m.clairvoyant_accuracy(c, rate) + 1e-9
    assert m.oracle_accuracy(c, rate) <= m.clairvoyant_accuracy(c, rate) + 1e-9


def test_random_routing_has_an_apgr_of_one_half() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    device, cloud = (rng.random(n) < 0.5).astype(float), (rng.random(n) < 0.95).astype(float)
    values = [m.average_pgr(Columns(rng.random(n), np.zeros(n), device, cloud)) for _ in range(20)]
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)
    # A score that says nothing at all, by definition.
    assert m.average_pgr(Columns(np.zeros(n), np.zeros(n), device, cloud)) == pytest.approx(0.5, abs=1e-9)


def test_area_by_hand() -> None:
    # Trapezoids over 0.6, 0.7, 0.8, 0.8 and seven times 0.9.
    assert m.area(C) == pytest.approx((0.3 + 0.7 + 0.8 + 0.8 + 6 * 0.9 + 0.45) / 10)
    assert m.area(columns([1.0], [0], [0], [1])) == pytest.approx(0.5)


def test_a_curve_that_is_not_monotone_is_told() -> None:
    # A call rescues, a call hurts, a call rescues, a call rescues: accuracy 1/4, 2/4, 1/4, 2/4, 3/4.
    dipping = columns([4, 3, 2, 1], [0] * 4, [0, 1, 0, 0], [1, 0, 1, 1])
    assert dipping.curve[1].tolist() == pytest.approx([0.25, 0.5, 0.25, 0.5, 0.75])
    assert m.call_rate_for(dipping, 0.5) == pytest.approx(0.25)
    assert m.dips_below(dipping, 0.5)
    assert not m.dips_below(dipping, 0.8)
    assert not m.dips_below(C, 0.5)


def test_one_problem_and_an_empty_class() -> None:
    one = columns([0.5], [1], [0], [1])
    assert one.curve[1].tolist() == [0.0, 1.0]
    assert m.average_pgr(one) == pytest.approx(0.5)
    assert m.call_rate_for(one, 0.5) == 1.0
    assert m.oracle_accuracy(one, 0.3) == pytest.approx(0.3)
    assert math.isnan(m.decision_auc(one))
    # The device solves everything: there is nothing to gain, and no gap to recover.
    solved = columns([2, 1], [1, 0], [1, 1], [1, 1])
    assert math.isnan(m.average_pgr(solved))
    assert math.isnan(m.call_rate_for(solved, 0.5))
    assert not m.dips_below(solved, 0.5)
    assert math.isnan(m.routing_gain_captured(solved))
    assert m.area(solved) == 1.0
