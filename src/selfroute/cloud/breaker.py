"""A circuit breaker: a provider that fails again and again is left alone for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

Outcome = Literal["up", "down", "unknown"]


class Attempt:
    """One request; `outcome` is what it told of the provider."""

    outcome: Outcome = "unknown"


class Breaker:
    """Opens after `failures` failures in a row, for `cooldown_s`; then one request tries, and the rest wait for it.

    A request that has waited for `patience` such tries to fail waits no longer; with a patience of 0 none ever waits.
    """

    def __init__(self, failures: int, cooldown_s: float, patience: int) -> None:
        self._limit, self._cooldown_s, self._patience = failures, cooldown_s, patience
        self._failures = self._failed_tries = 0
        self._closed_until = 0.0
        self._trying = False
        self._changed = asyncio.Condition()

    @property
    def open(self) -> bool:
        """Whether the provider is left alone, but for one request that tries."""
        return self._failures >= self._limit

    @asynccontextmanager
    async def attempt(self) -> AsyncIterator[Attempt]:
        """Wait until the provider may be asked. The caller sets the outcome.

        Raises:
            TimeoutError: it stayed down.
        """
        trying = await self._admitted()
        attempt = Attempt()
        try:
            yield attempt
        finally:
            if attempt.outcome == "up":
                self._failures = 0
            elif attempt.outcome == "down":
                self._failures += 1
                self._failed_tries += trying
                self._closed_until = time.monotonic() + self._cooldown_s
            if trying:
                self._trying = False
            async with self._changed:
                self._changed.notify_all()

    async def _admitted(self) -> bool:
        """Wait; True for the request that tries whether the provider is up again."""
        seen = self._failed_tries
        while self.open:
            left_s = self._closed_until - time.monotonic()
            if not self._trying and left_s <= 0:
                self._trying = True
                return True
            if self._failed_tries - seen >= self._patience:
                raise TimeoutError
            # A try under way may take long; the provider may only be slow.
            try:
                async with asyncio.timeout(None if self._trying else left_s), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                continue
        return False
