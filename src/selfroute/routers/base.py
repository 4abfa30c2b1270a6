"""What an outside router sees of a problem, and what it says: a score in [0, 1] that grows with the need to ask.

A router never sees a test problem before it routes it: it is fitted on training problems, and its threshold is
calibrated on calibration problems, like our own dial.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from selfroute.types import Problem, Response


@dataclass(frozen=True, slots=True)
class Attempt:
    """A problem and the device's response to it, help forbidden.

    `confidence` is exp(mean log-probability of its tokens), in (0, 1]. `state` is the model's last hidden state where
    the response chose to answer (float32, hidden size); of a cut response, at its last line break. `prompt_state` is
    the state before the response's first token. `samples` are further responses to the same prompt, `variants`
    responses to prompts that ask the same in other words.
    """

    problem: Problem
    response: Response
    confidence: float
    state: NDArray[np.float32]
    prompt_state: NDArray[np.float32]
    samples: tuple[Response, ...] = ()
    variants: tuple[Response, ...] = ()


@dataclass(frozen=True, slots=True)
class Routed:
    """What a router makes of an attempt: its score, the answer that the device gives, and the device tokens of both."""

    score: float
    response: Response
    device_tokens: int


class Router(Protocol):
    """A way to route from outside. One that is `prompt_only` decides before the device has begun."""

    prompt_only: bool

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Learn from training problems and whether the device solved them; a training-free router does nothing."""
        ...

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        """A score in [0, 1] for each attempt; those above a threshold are asked."""
        ...


def scored(attempts: Sequence[Attempt], scores: Sequence[float]) -> list[Routed]:
    """Scores for the attempts' own responses."""
    return [
        Routed(float(score), a.response, len(a.response.token_ids)) for a, score in zip(attempts, scores, strict=True)
    ]


def alike(attempts: Sequence[Attempt], score: float) -> list[float]:
    """About the same score for all. Of equal ones a threshold takes all or none; by how little these differ, chance
    decides."""
    return [(1 - _LITTLE) * score + _LITTLE * chance(a.problem.id) for a in attempts]


_LITTLE = 1e-6


def chance(problem: str) -> float:
    """A number in [0, 1) that a problem's name decides."""
    return int.from_bytes(hashlib.sha256(problem.encode()).digest()[:6]) / 2**48
