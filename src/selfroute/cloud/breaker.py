"""A circuit breaker: a provider that fails again and again is left alone for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

_log = logging.getLogger(__name__)

Outcome = Literal["up", "down", "unknown"]


class Attempt:
    """One request; `outcome` is what it told of the provider, `cause` how it failed."""

    outcome: Outcome = "unknown"
    cause = ""


class Breaker:
    """Opens after `failures` failures in a row, for `cooldown_s`; then one request tries, and the rest wait for it.

    A request that has waited for `patience` such tries to fail waits no longer; with a patience of 0 none ever waits.
    Each opening is a line in the log, or nobody knew what is waited for.
    """

    def __init__(self, failures: int, cooldown_s: float, patience: int) -> None:
        self._limit, self._cooldown_s, self._patience = failures, cooldown_s, patience
        self._failures = 0
        self._closed_until = 0.0
        self._trying = False
        self._changed = asyncio.Condition()
        self.failed_tries = 0
        """How many of those requests failed."""
        self.cause = ""
        """How the last failure came about."""

    @property
    def open(self) -> bool:
        """Whether the provider is left alone, but for one request that tries."""
        return self._failures >= self._limit

    @asynccontextmanager
    async def attempt(self, since: int | None = None) -> AsyncIterator[Attempt]:
        """Wait until the provider may be asked. The caller sets the outcome.

        Patience is counted from `since`, the `failed_tries` of when a request of several attempts came.

        Raises:
            TimeoutError: it stayed down.
        """
        trying = await self._admitted(self.failed_tries if since is None else since)
        attempt = Attempt()
        try:
            yield attempt
        finally:
            if attempt.outcome == "up":
                self._failures = 0
            elif attempt.outcome == "down":
                self._failures += 1
                self.failed_tries += trying
                self._closed_until = time.monotonic() + self._cooldown_s
                self.cause = attempt.cause
                if self._failures == self._limit:
                    self._tell()
            if trying:
                self._trying = False
            async with self._changed:
                self._changed.notify_all()

    def _tell(self) -> None:
        waits_s = self._patience * self._cooldown_s
        then = f"a request gives up after about {waits_s:g} s" if waits_s else "no request waits for it"
        _log.warning(
            "%s; after %d failures in a row it is asked again every %g s, and %s",
            self.cause, self._limit, self._cooldown_s, then,
        )  # fmt: skip

    async def _admitted(self, seen: int) -> bool:
        """Wait; True for the request that tries whether the provider is up again."""
        while self.open:
            left_s = self._closed_until - time.monotonic()
            if not self._trying and left_s <= 0:
                self._trying = True
                return True
            if self.failed_tries - seen >= self._patience:
                raise TimeoutError
            # A try under way may take long; the provider may only be slow.
            try:
                async with asyncio.timeout(None if self._trying else left_s), self._changed:
                    await self._changed.wait()
            except TimeoutError:
                continue
        return False
