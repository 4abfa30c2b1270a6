"""Mean token log-probability: a response that the model found unlikely is asked about."""

from __future__ import annotations

from collections.abc import Sequence

from selfroute.routers.base import Attempt, Routed, scored


class Confidence:
    """score = 1 - exp(mean log-probability of the response's tokens)."""

    prompt_only = False

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Nothing to learn."""

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        return scored(attempts, [1 - a.confidence for a in attempts])
