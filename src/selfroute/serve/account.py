"""What one scope has used, and whether it may use more: pure arithmetic, without a clock or a store.

A scope is a key, or the whole gateway. Its money is counted by the day (UTC), its requests and calls in two sliding
windows. Money is whole nano-USD (1e-9 USD), so that sums are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field

from selfroute.config import Config

SLOTS = 20
"""A sliding window moves on by this part of its length: 3 s of a minute, 3 minutes of an hour."""

DAY_S = 86_400

MOST_NANO = 10**15
"""A million USD: no single amount is more, so that sums stay far below what a database's integer holds."""


def nano(usd: float) -> int:
    """USD in nano-USD, rounded to the nearest.

    >>> nano(0.0000015)
    1500

    Raises:
        ValueError: it is negative, or not a number.
    """
    if not usd >= 0:
        raise ValueError(f"an amount of money is 0 or more, not {usd}")
    return round(min(usd * 1e9, MOST_NANO))


class Limits(Config):
    """What a scope may use. A limit that is not set is none."""

    share: float | None = Field(None, ge=0, le=1)
    """Help calls granted a request, over the last `window_s`: the budget as a share of requests."""
    window_s: int = Field(3600, ge=60, le=30 * DAY_S)
    """The length of the share's sliding window, in seconds."""
    min_requests: int = Field(20, ge=1)
    """With fewer requests than this in the window, the share is of this many; else the first could never ask."""
    usd_per_day: float | None = Field(None, ge=0)
    """USD from midnight to midnight (UTC), money held back for calls under way included."""
    calls_per_minute: int | None = Field(None, ge=0)
    """Help calls granted in any 60 s."""
    requests_per_minute: int | None = Field(None, ge=0)
    """Requests in any 60 s, whatever becomes of them."""


@dataclass(frozen=True, slots=True)
class Scope:
    """A name in the store, and what may be used under it."""

    name: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class Denied:
    """Which limit of which scope is reached, and when it may be so no longer, at the earliest (None: never)."""

    limit: Literal["share", "usd_per_day", "calls_per_minute", "requests_per_minute"]
    scope: str
    retry_after_s: float | None


class Window(NamedTuple):
    """Requests and calls in the slots of a sliding window: (slot, requests, calls), the oldest first.

    The slot that is leaving counts whole: the window is up to a slot longer than `length_s` and never shorter, so that
    in no stretch of that length there is more than the window said.
    """

    length_s: int
    slots: tuple[tuple[int, int, int], ...] = ()

    def add(self, now: float, requests: int = 0, calls: int = 0) -> Window:
        """With so many more, at `now`; by a clock that is behind, at the newest slot."""
        slot = self._slot(now)
        if self.slots and self.slots[-1][0] >= slot:
            *kept, (slot, old_requests, old_calls) = self.slots
            return Window(self.length_s, (*kept, (slot, old_requests + requests, old_calls + calls)))
        kept = [s for s in self.slots if slot - SLOTS <= s[0]]
        return Window(self.length_s, (*kept, (slot, requests, calls)))

    def take_back(self, at: float) -> Window:
        """With one call less in the slot of `at`, if it is still there."""
        gone = self._slot(at)
        return Window(self.length_s, tuple((s, r, c - (s == gone and c > 0)) for s, r, c in self.slots))

    def totals(self, now: float) -> tuple[int, int]:
        """Requests and calls in the window."""
        first = self._slot(now) - SLOTS
        requests = calls = 0
        for slot, in_slot, calls_in_slot in self.slots:
            if slot >= first:
                requests += in_slot
                calls += calls_in_slot
        return requests, calls

    def moves_on_in_s(self, now: float, calls: bool) -> float | None:
        """When its oldest calls (or requests) will have left; None when it holds none."""
        first = self._slot(now) - SLOTS
        oldest = next((s for s, r, c in self.slots if s >= first and (c if calls else r)), None)
        return None if oldest is None else (oldest + SLOTS + 1) * self.length_s / SLOTS - now

    def _slot(self, at: float) -> int:
        return int(at * SLOTS // self.length_s)


class Account(NamedTuple):
    """What a scope has used: nano-USD of one day, spent and held back for calls under way, and two windows."""

    day: int = 0
    spent: int = 0
    held: int = 0
    minute: Window = Window(60)
    window: Window = Window(3600)

    def on(self, day: int, window_s: int, now: float) -> Account:
        """On a day (since 1970) that is not before its own, with a share's window of that length.

        Money belongs to the day on which it was held back. Where the length changes, what is counted is of now: while
        replicas with both lengths run, none may begin anew with every transaction of another.
        """
        account = self if day == self.day else self._replace(day=day, spent=0, held=0)
        if window_s == self.window.length_s:
            return account
        counted = self.window.totals(now)
        return account._replace(window=Window(window_s).add(now, *counted) if any(counted) else Window(window_s))

    def arrive(self, now: float, requests: int) -> Account:
        """With so many more requests."""
        if not requests:
            return self
        return self._replace(minute=self.minute.add(now, requests), window=self.window.add(now, requests))

    def hold(self, now: float, worst: int) -> Account:
        """With one more call, for which `worst` nano-USD are held back."""
        return self._replace(
            held=self.held + worst,
            minute=self.minute.add(now, calls=1),
            window=self.window.add(now, calls=1),
        )

    def pay(self, day: int, worst: int, cost: int) -> Account:
        """With a call's cost in the place of the worst case that was held back on `day`; of a day that is over, nothing
        is kept."""
        return self._replace(held=self.held - worst, spent=self.spent + cost) if day == self.day else self

    def take_back(self, at: float) -> Account:
        """With one call less, of those that were granted at `at`."""
        return self._replace(minute=self.minute.take_back(at), window=self.window.take_back(at))

    def refuses_call(self, scope: Scope, now: float, worst: int) -> Denied | None:
        """The limit that one more call of at most `worst` nano-USD would pass, or None."""
        limits = scope.limits
        if limits.usd_per_day is not None and self.spent + self.held + worst > nano(limits.usd_per_day):
            # What is more than a whole day's money will not be there tomorrow either.
            tomorrow = None if worst > nano(limits.usd_per_day) else (self.day + 1) * DAY_S - now
            return Denied("usd_per_day", scope.name, tomorrow)
        _, calls = self.minute.totals(now)
        if limits.calls_per_minute is not None and calls + 1 > limits.calls_per_minute:
            return Denied("calls_per_minute", scope.name, self.minute.moves_on_in_s(now, calls=True))
        requests, calls = self.window.totals(now)
        if limits.share is not None and calls + 1 > whole(limits.share * max(requests, limits.min_requests)):
            return Denied("share", scope.name, self.window.moves_on_in_s(now, calls=True))
        return None

    def refuses_request(self, scope: Scope, now: float) -> Denied | None:
        """The limit that one more request would pass, or None."""
        limit = scope.limits.requests_per_minute
        if limit is not None and self.minute.totals(now)[0] + 1 > limit:
            return Denied("requests_per_minute", scope.name, self.minute.moves_on_in_s(now, calls=False))
        return None


def whole(number: float) -> int:
    """The whole part, where rounding in floating point does not cost one.

    >>> whole(0.29 * 100)
    29
    """
    return math.floor(number + 1e-9)
