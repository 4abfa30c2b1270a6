"""Routers that know nothing: a random share of the problems goes to the cloud."""

from __future__ import annotations

import random
from collections.abc import Sequence

from selfroute.routers.base import Attempt, Routed, scored


class Naive:
    """Naive offloading: a uniform score, named by the seed and the problem."""

    prompt_only = True

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Nothing to learn."""

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        return scored(attempts, [random.Random(f"{self.seed}/naive/{a.problem.id}").random() for a in attempts])


class UnansweredFirst(Naive):
    """The same after the response: those without a readable answer go first, which anyone can see, and chance decides
    among the others. What other routers are worth beyond this is their own."""

    prompt_only = False
