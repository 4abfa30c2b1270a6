"""How far an LLM judge's grades agree with those that people, or another reference, gave to the same answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from selfroute.measures import Measure, proportion


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far grades agree with labels: `alike`, the share that is on the same side of `pass_score`, with its interval;
    `kappa`, Cohen's, that share above what chance gives; `rank`, Spearman's, of the grades themselves. The last two are
    NaN where one side never varies."""

    alike: Measure
    kappa: float
    rank: float


def agreement(grades: Sequence[float], labels: Sequence[float], pass_score: float) -> Agreement:
    """How far the grades of some answers agree with their labels, both in [0, 1]."""
    ours, theirs = ([value >= pass_score for value in side] for side in (grades, labels))
    alike = [a == b for a, b in zip(ours, theirs, strict=True)]
    vary = len(set(ours)) > 1 and len(set(theirs)) > 1
    spread = len(set(grades)) > 1 and len(set(labels)) > 1
    return Agreement(
        proportion(np.array(alike, dtype=float)),
        float(cohen_kappa_score(ours, theirs)) if vary else math.nan,
        float(spearmanr(grades, labels).statistic) if spread else math.nan,
    )
