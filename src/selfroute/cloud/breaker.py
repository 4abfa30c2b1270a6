"""A circuit breaker: a provider that fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after `failures` failures in a row, for `cooldown_s`; then one request tries, and the rest wait for it."""

    def __init__(self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._cooldown_s, self._clock = failures, cooldown_s, clock
        self._failures = 0
        self._closed_again = 0.0

    def wait_s(self) -> float:
        """Seconds to wait before asking again; at 0 the caller may ask, and must tell how it went."""
        if self._failures < self._limit:
            return 0.0
        left = self._closed_again - self._clock()
        if left <= 0:
            # This caller tries; the others wait for another cooldown, or until it succeeds.
            self._closed_again = self._clock() + self._cooldown_s
            return 0.0
        return left

    def succeeded(self) -> None:
        """The provider answered."""
        self._failures = 0

    def failed(self) -> None:
        """The provider did not answer, or not with an answer."""
        self._failures += 1
        if self._failures >= self._limit:
            self._closed_again = self._clock() + self._cooldown_s
