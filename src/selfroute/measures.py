"""Measures of routing, pure: accuracy, rates, curves, gains, and 95 % intervals.

Everything takes one `Columns` (an entry a problem) and gives a `Measure`. Left out on purpose: reading records, and
drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measure:
    """A value with its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float] | None:
        """`{"value", "low", "high"}`, or None where the value is not defined."""
        if math.isnan(self.value):
            return None
        low, high = (self.value if math.isnan(x) else x for x in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class Columns:
    """Evaluation records as arrays of N problems.

    `score` is l, -inf where the device never decided; `asked` is what happened; `device` and `cloud` are the
    correctness of the two answers that each problem could get; `untrained` is the untrained device's correctness on the
    same problems, where it is known. `device_score` and `cloud_score` are what both answers are worth, in [0, 1], where
    the task grades them.
    """

    score: Floats
    asked: Floats
    device: Floats
    cloud: Floats
    untrained: Floats | None = None
    device_score: Floats | None = None
    cloud_score: Floats | None = None

    def take(self, index: NDArray[np.int64]) -> Columns:
        more = (None if c is None else c[index] for c in (self.untrained, self.device_score, self.cloud_score))
        taken = Columns(self.score[index], self.asked[index], self.device[index], self.cloud[index], *more)
        # A bootstrap need not sort each of its draws.
        taken.__dict__["places"] = self.places[index]
        return taken

    def graded(self, device: Sequence[float | None], cloud: Sequence[float | None]) -> Columns:
        """These columns with scores: the grades of both sides' answers, or where one has none its correctness. As they
        are where no answer has a grade."""
        if all(grade is None for grade in (*device, *cloud)):
            return self

        def scores(grades: Sequence[float | None], correct: Floats) -> Floats:
            return np.array([c if g is None else g for g, c in zip(grades, correct, strict=True)])

        return replace(self, device_score=scores(device, self.device), cloud_score=scores(cloud, self.cloud))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Of each problem by its l, the highest first; those that tie share one. Some places may be nobody's."""
        return np.unique(-self.score, return_inverse=True)[1]

    @cached_property
    def curve(self) -> tuple[Floats, Floats]:
        """Call rate and accuracy along the dial, N + 1 points: the problems with the highest l are asked first."""
        n = len(self.score)
        gain = accumulated(self.places, self.cloud - self.device)
        return np.arange(n + 1) / n, (self.device.sum() + gain) / n

    @property
    def final(self) -> Floats:
        """Correctness of the complete response."""
        return np.where(self.asked > 0, self.cloud, self.device)

    @property
    def final_score(self) -> Floats | None:
        """What the complete response is worth; None where the task is not graded."""
        if self.device_score is None or self.cloud_score is None:
            return None
        return np.where(self.asked > 0, self.cloud_score, self.device_score)


def proportion(values: Floats) -> Measure:
    """A share with its Wilson interval.

    >>> m = proportion(np.array([1.0, 1.0, 0.0, 1.0])); round(m.low, 3), m.value, round(m.high, 3)
    (0.301, 0.75, 0.954)
    """
    n = len(values)
    if n == 0:
        return Measure(math.nan, math.nan, math.nan)
    z, p = 1.959964, float(values.mean())
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 rounding would put an end on the wrong side of the share.
    return Measure(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def difference(first: Floats, second: Floats) -> Measure:
    """Mean of `first` less that of `second`, over the same problems, with its normal interval.

    >>> m = difference(np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0]))
    >>> round(m.low, 3), m.value, round(m.high, 3)
    (0.01, 0.5, 0.99)
    """
    apart = first - second
    mean, half = float(apart.mean()), 1.959964 * float(apart.std()) / len(apart) ** 0.5
    return Measure(mean, mean - half, mean + half)


def bootstrap(columns: Columns, measure: Callable[[Columns], float], *, resamples: int = 1000) -> Measure:
    """A measure with its percentile-bootstrap interval over problems; the resamples are the same every time."""
    rng = np.random.default_rng(0)
    n = len(columns.score)
    values = np.array([measure(columns.take(rng.integers(0, n, n))) for _ in range(resamples)])
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (math.nan, math.nan)
    return Measure(measure(columns), float(low), float(high))


def accumulated(places: NDArray[np.int64], values: Floats) -> Floats:
    """Sums of the values of the problems in the first places: of none, of one, ... of all N.

    Problems that tie are asked in no order, so each of them counts as the mean of them all.

    >>> accumulated(np.array([1, 0, 1]), np.array([4.0, 1.0, 0.0])).tolist()
    [0.0, 1.0, 3.0, 5.0]
    """
    counts, total = np.bincount(places), np.bincount(places, weights=values)
    counts, total = counts[counts > 0], total[counts > 0]
    return np.concatenate([[0.0], np.cumsum(np.repeat(total / counts, counts))])


def accuracy_at(columns: Columns, call_rate: float) -> float:
    """Accuracy read off the method's own curve at exactly a call rate."""
    return float(np.interp(call_rate, *columns.curve))


def random_accuracy(columns: Columns, call_rate: float) -> float:
    """Accuracy of sending a random share: (1 - b) * acc_local + b * acc_cloud."""
    return float((1 - call_rate) * columns.device.mean() + call_rate * columns.cloud.mean())


def oracle_accuracy(columns: Columns, call_rate: float) -> float:
    """Accuracy of knowing the device's correctness, not the cloud's: acc_local + q_w * min(b, 1 - acc_local)."""
    local = float(columns.device.mean())
    wrong = columns.device == 0
    cloud_on_wrong = float(columns.cloud[wrong].mean()) if wrong.any() else 0.0
    return local + cloud_on_wrong * min(call_rate, 1 - local)


def clairvoyant_accuracy(columns: Columns, call_rate: float) -> float:
    """Accuracy of foreseeing both sides' errors: the bound that is shown and never divided by."""
    rescued = float(((columns.device == 0) & (columns.cloud == 1)).mean())
    return float(columns.device.mean()) + min(call_rate, rescued)


def routing_gain_captured(columns: Columns) -> float:
    """(acc - acc_random) / (acc_oracle - acc_random) at the realised call rate; NaN where the two are within 0.01."""
    rate = float(columns.asked.mean())
    low, high = random_accuracy(columns, rate), oracle_accuracy(columns, rate)
    return (float(columns.final.mean()) - low) / (high - low) if abs(high - low) >= 0.01 else math.nan


def performance_gap_recovered(accuracy: float, device: float, cloud: float) -> float:
    """PGR: (acc - acc_device) / (acc_cloud - acc_device); NaN where the cloud is not better by 0.01."""
    return (accuracy - device) / (cloud - device) if cloud - device >= 0.01 else math.nan


def pgr_vs_trained(columns: Columns) -> float:
    """PGR of the complete response against the method's own device model."""
    return performance_gap_recovered(*(float(x.mean()) for x in (columns.final, columns.device, columns.cloud)))


def pgr_vs_untrained(columns: Columns) -> float:
    """PGR of the complete response against the untrained device model; NaN where that was not evaluated."""
    if columns.untrained is None:
        return math.nan
    return performance_gap_recovered(*(float(x.mean()) for x in (columns.final, columns.untrained, columns.cloud)))


def _pgr_curve(columns: Columns) -> tuple[Floats, Floats]:
    rates, accuracy = columns.curve
    gap = accuracy[-1] - accuracy[0]
    return rates, (accuracy - accuracy[0]) / gap if gap >= 0.01 else np.full_like(accuracy, math.nan)


def average_pgr(columns: Columns) -> float:
    """APGR: mean PGR over call rates from 0 to 100 %, the method's own device model as the 0 % end."""
    rates, recovered = _pgr_curve(columns)
    return float(np.trapezoid(recovered, rates))


def call_rate_for(columns: Columns, recovered: float) -> float:
    """CPT(x): the least call rate whose PGR reaches x (the first crossing; `dips_below` tells of later dips)."""
    rates, reached = _pgr_curve(columns)
    above = np.flatnonzero(reached >= recovered - 1e-12)
    return float(rates[above[0]]) if len(above) else math.nan


def dips_below(columns: Columns, recovered: float) -> bool:
    """Whether the PGR falls below x again after it has reached it: a curve that is not monotone there."""
    _, reached = _pgr_curve(columns)
    above = np.flatnonzero(reached >= recovered - 1e-12)
    return bool(len(above) and (reached[above[0] :] < recovered - 1e-12).any())


def area(columns: Columns) -> float:
    """Area under the curve of accuracy against call rate: its mean accuracy over call rates from 0 to 100 %."""
    rates, accuracy = columns.curve
    return float(np.trapezoid(accuracy, rates))


def decision_auc(columns: Columns, decided: NDArray[np.bool_] | None = None) -> float:
    """Probability that a problem which the device fails has a higher l than one which it solves; ties count half.

    Problems without a decision are left out (those whose l is not finite, unless `decided` says which have one); NaN
    where either kind is missing.
    """
    if decided is None:
        decided = np.isfinite(columns.score)
    places, failed = columns.places[decided], columns.device[decided] == 0
    positives, negatives = int(failed.sum()), int((~failed).sum())
    if not positives or not negatives:
        return math.nan
    counts = np.bincount(places)
    # From the lowest l; those that tie share the mean of their ranks.
    rank = positives + negatives - np.cumsum(counts) + (counts + 1) / 2
    total = float(rank[places][failed].sum())
    return (total - positives * (positives + 1) / 2) / (positives * negatives)
