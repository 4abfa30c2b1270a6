"""What the dashboard shows, read from the store in one transaction: everybody's requests, or one key's.

Sums come from a row a minute and key, percentiles from the newest requests, so that a page of a month costs no more
than what it shows. Left out on purpose: how it looks (`charts`, `pages/`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection

from selfroute.serve import history, keys
from selfroute.serve.account import Limits, Scope
from selfroute.serve.budget import GATEWAY, Usage, usages
from selfroute.serve.history import Health, Percentiles, RequestRecord, Totals

REQUESTS = 25
"""Requests on a page."""

HEALTH_S = 300.0
"""The cloud's health is of this last time."""


class Span(NamedTuple):
    """A stretch of time, and the steps in which charts show it."""

    name: str
    seconds: int
    step_minutes: int


SPANS: Mapping[str, Span] = {
    "1h": Span("Hour", 3600, 1),
    "6h": Span("6 hours", 6 * 3600, 6),
    "24h": Span("Day", 24 * 3600, 30),
    "7d": Span("Week", 7 * 86_400, 180),
    "30d": Span("30 days", 30 * 86_400, 720),
}
"""By what a page's address calls them."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A key, or the whole gateway, with what it has used."""

    id: str
    name: str
    limits: Limits
    usage: Usage


@dataclass(frozen=True, slots=True)
class Board:
    """One moment's dashboard, of all or one key; `owners` are the valid keys, where it is of all."""

    now: float
    span: Span
    of: Owner
    owners: tuple[Owner, ...]
    names: Mapping[str, str]
    totals: Totals
    steps: tuple[tuple[float, Totals], ...]
    latencies: Mapping[str, Percentiles]
    denials: Mapping[str, int]
    health: Health
    requests: tuple[RequestRecord, ...]
    more: bool


def read(connection: Connection, span: Span, limits: Limits, key: Scope | None = None, *, before: str = "") -> Board:
    """The board of the whole gateway, whose limits are given, or of one key.

    `before` is the id of the last request on the page before; what is unknown begins at the newest.
    """
    now = time.time()
    key_id = key.name.removeprefix("key:") if key else None
    known = {k.id: k for k in keys.everything(connection)}
    scopes = [key] if key else [Scope(GATEWAY, limits), *(k.scope for k in known.values() if k.valid(now))]
    owners = [
        Owner(
            owner := scope.name.removeprefix("key:"), known[owner].name if owner in known else "", scope.limits, usage
        )
        for scope, usage in zip(scopes, usages(connection, scopes, now), strict=True)
    ]
    step_s = span.step_minutes * 60
    since = (now - span.seconds) // step_s * step_s + step_s
    steps = filled(dict(history.timeline(connection, since, span.step_minutes, key_id)), since, now, step_s)
    last = history.find(connection, before) if before else None
    if last and key_id not in (None, last.key_id):
        last = None
    requests = history.latest(connection, REQUESTS + 1, key_id, before=last)
    return Board(
        now=now,
        span=span,
        of=owners[0],
        owners=tuple(sorted(owners[1:], key=lambda o: (-o.usage.spent_usd, -o.usage.requests, o.name))),
        names={k.id: k.name for k in known.values()},
        totals=sum((totals for _, totals in steps), Totals()),
        steps=steps,
        latencies=history.latencies(connection, since, key_id),
        denials=history.denials(connection, since, key_id),
        health=history.health(connection, now - HEALTH_S, key_id),
        requests=tuple(requests[:REQUESTS]),
        more=len(requests) > REQUESTS,
    )


def filled(steps: Mapping[float, Totals], since: float, now: float, step_s: float) -> tuple[tuple[float, Totals], ...]:
    """Every step of a stretch, also those in which nothing was.

    >>> [(at, totals.requests) for at, totals in filled({60.0: Totals(3)}, 0, 150, 60)]
    [(0, 0), (60, 3), (120, 0)]
    """
    number = int((now - since) // step_s) + 1
    return tuple((at, steps.get(at, Totals())) for at in (since + i * step_s for i in range(number)))
