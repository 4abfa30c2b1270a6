"""Naive offloading: a random share of the problems goes to the cloud."""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfroute.routers.base import Attempt, Routed, scored


class Naive:
    """A uniform score, named by the seed and the problem."""

    prompt_only = True

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Nothing to learn."""

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        return scored(attempts, [random.Random(f"{self.seed}/naive/{a.problem.id}").random() for a in attempts])
