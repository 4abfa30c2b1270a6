"""What became of each request: written in batches, read by the dashboard, deleted when its time is up.

Every function takes the connection of a transaction (see `store`). Sums come from the tables `usage` and `usage_hours`,
one row a minute or hour and key, so that a page of a month costs what it shows and not what was served. Clients name
models and write texts, so whatever a database would refuse is made fit first: one bad record must not stop a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Any, Literal

from sqlalchemy import (
    Connection,
    Row,
    Select,
    Table,
    bindparam,
    delete,
    desc,
    func,
    insert,
    literal_column,
    select,
    tuple_,
)

from selfroute.serve.account import nano
from selfroute.serve.store import Prepared, Store
from selfroute.serve.tables import REQUESTS, USAGE, USAGE_HOURS, upsert

SAMPLE = 2000
"""Percentiles are of this many requests, the newest, at most."""

CLIENT_GONE = 499
"""The status of a request whose client went away."""

_LONGEST = 200
"""Characters of a name that a client chose."""

_MOST = 10**9
"""No count is more, whatever an upstream says: sums stay far below what a database's integer holds."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, as the dashboard and the accounts want it.

    `at` is when it arrived (seconds since 1970), `key_id` the virtual key's ("" without keys), `policy` what was asked
    for, `decision` what the device decided ("" where it was not asked, or failed), `route` where the answer came from,
    `score` l at the decision point, `denied` the limit that a help call met, `rule` the one of the rule file that kept
    it here, `redacted` what the cloud did not see (JSON: how many by kind), `status` the HTTP status and `error` its
    code, if it failed. Times count from the arrival, `first_ms` to the first byte of the answer; None where there was
    no such part. `request` and `response` are texts, and None unless content is logged.
    """

    id: str
    at: float
    key_id: str = ""
    model: str = ""
    policy: str = "auto"
    decision: Literal["answer", "help", "undecided", ""] = ""
    route: Literal["device", "cloud", "undecided", ""] = ""
    score: float | None = None
    denied: str = ""
    rule: str = ""
    redacted: str = ""
    status: int = 200
    error: str = ""
    device_prompt_tokens: int = 0
    device_completion_tokens: int = 0
    cloud_prompt_tokens: int = 0
    cloud_completion_tokens: int = 0
    cost_usd: float = 0.0
    first_ms: float | None = None
    device_ms: float | None = None
    cloud_ms: float | None = None
    total_ms: float = 0.0
    request: str | None = None
    response: str | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums. `calls` are requests that asked the cloud last, `denied` those whose call was denied or failed before the
    device went on, `errors` those that failed with neither, or with a call (`failed_calls`, which are among both): a
    status of 400 or more that is not `CLIENT_GONE`. What is left is the device's."""

    requests: int = 0
    calls: int = 0
    denied: int = 0
    errors: int = 0
    failed_calls: int = 0
    cost_usd: float = 0.0
    device_tokens: int = 0
    cloud_tokens: int = 0

    def __add__(self, other: Totals) -> Totals:
        """Both together."""
        return Totals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Totals)))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one latency in ms, over `count` requests that have it; None over none."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Health:
    """The cloud, as requests found it: how many asked it and how many in vain, and when it last answered one."""

    asked: int
    failed: int
    answered_at: float | None


def add(connection: Connection, records: Sequence[RequestRecord], *, again: bool = False) -> None:
    """Write records and their sums.

    An id that is there already fails them all; where it is tried `again`, such a record is left as it is.
    """
    rows = {row["id"]: row for row in map(_row, records)}
    for known in connection.execute(_KNOWN, {"ids": list(rows)}).scalars() if again else ():
        del rows[known]
    if not rows:
        return
    _INSERT.run(connection, *rows.values())
    for table, minutes in _SUMS:
        sums: dict[tuple[int, str], dict[str, Any]] = {}
        for row in rows.values():
            first = int(row["at"] // (60 * minutes)) * minutes
            total = sums.setdefault((first, row["key_id"]), dict.fromkeys(_SUMMED, 0))
            for name, value in _summed(row).items():
                total[name] += value
        # In one order, so that two replicas do not wait for each other in a circle.
        ordered = [{"minute": minute, "key_id": key_id, **sums[minute, key_id]} for minute, key_id in sorted(sums)]
        _adding(connection.dialect.name, table).run(connection, *ordered)


def timeline(
    connection: Connection, since: float, step_minutes: int, key_id: str | None = None
) -> list[tuple[float, Totals]]:
    """Sums by steps, each with its beginning (seconds since 1970), the oldest first; steps of nothing are left out.

    The first step may begin before `since`, by a minute, or an hour where steps are of whole hours.
    """
    table, minutes = _SUMS[step_minutes % 60 == 0]
    step = (table.c.minute - table.c.minute % step_minutes).label("step")
    query: Select[Any] = select(*(func.sum(table.c[name]).label(name) for name in _SUMMED), step)
    query = query.where(table.c.minute >= int(since // (60 * minutes)) * minutes)
    if key_id is not None:
        query = query.where(table.c.key_id == key_id)
    query = query.group_by("step").order_by("step")
    return [(row.step * 60.0, _totals(row)) for row in connection.execute(query)]


def latencies(connection: Connection, since: float, key_id: str | None = None) -> dict[str, Percentiles]:
    """Percentiles of `first_ms`, `device_ms`, `cloud_ms` and `total_ms` over the newest `SAMPLE` requests."""
    columns = [REQUESTS.c.first_ms, REQUESTS.c.device_ms, REQUESTS.c.cloud_ms, REQUESTS.c.total_ms]
    query = _of_key(select(*columns), key_id).where(REQUESTS.c.at >= since).order_by(desc(REQUESTS.c.at)).limit(SAMPLE)
    rows = connection.execute(query).all()
    return {
        column.name: _percentiles(sorted(row[i] for row in rows if row[i] is not None))
        for i, column in enumerate(columns)
    }


def denials(connection: Connection, since: float, key_id: str | None = None) -> dict[str, int]:
    """How many help calls were denied since then, by the limit that they met, the most first."""
    number = func.count().label("number")
    query = _of_key(select(REQUESTS.c.denied, number), key_id).where(_DENIED, REQUESTS.c.at >= since)
    rows = connection.execute(query.group_by(REQUESTS.c.denied).order_by(desc(number), REQUESTS.c.denied))
    return {row.denied: row.number for row in rows}


def health(connection: Connection, since: float, key_id: str | None = None) -> Health:
    """How the cloud did in the newest `SAMPLE` requests since then, those that asked it."""
    columns = REQUESTS.c.at, REQUESTS.c.route, REQUESTS.c.status, REQUESTS.c.denied
    query = _of_key(select(*columns), key_id).where(REQUESTS.c.at >= since).order_by(desc(REQUESTS.c.at)).limit(SAMPLE)
    asked = [row for row in connection.execute(query) if row.route == "cloud" or row.denied == "cloud"]
    failed = [row.denied == "cloud" or row.status == 429 or row.status >= 500 for row in asked]
    answered_at = next((row.at for row, bad in zip(asked, failed, strict=True) if not bad), None)
    return Health(len(asked), sum(failed), answered_at)


def latest(
    connection: Connection, number: int, key_id: str | None = None, *, before: RequestRecord | None = None
) -> list[RequestRecord]:
    """The newest requests, the newest first; with `before`, those that came before it (the next page)."""
    query = _of_key(select(REQUESTS), key_id)
    if before:
        query = query.where(tuple_(REQUESTS.c.at, REQUESTS.c.id) < tuple_(before.at, before.id))
    rows = connection.execute(query.order_by(desc(REQUESTS.c.at), desc(REQUESTS.c.id)).limit(number))
    return [_record(row) for row in rows]


def find(connection: Connection, request_id: str) -> RequestRecord | None:
    """One request."""
    row = connection.execute(select(REQUESTS).where(REQUESTS.c.id == request_id)).one_or_none()
    return None if row is None else _record(row)


async def forget(store: Store, older_than_s: float, *, batch: int = 1000, now: float | None = None) -> int:
    """Delete requests, content and sums that are older; how many requests those were.

    In small transactions, so that nobody waits long for one.

    Raises:
        StoreError: the store failed; what was deleted so far stays deleted.
    """
    before = (time.time() if now is None else now) - older_than_s
    old = select(REQUESTS.c.id).where(REQUESTS.c.at < before).limit(batch)
    forgotten = 0
    while True:
        deleted = await store.write(
            lambda c: c.execute(delete(REQUESTS).where(REQUESTS.c.id.in_(old.scalar_subquery()))).rowcount
        )
        forgotten += deleted
        if deleted < batch:
            break
    await store.write(lambda c: _forget_sums(c, before))
    if forgotten:
        await store.empty_log()
    return forgotten


def _forget_sums(connection: Connection, before: float) -> None:
    for table, minutes in _SUMS:
        connection.execute(delete(table).where(table.c.minute < int(before // (60 * minutes)) * minutes))


_SUMS = (USAGE, 1), (USAGE_HOURS, 60)
"""Tables of sums, and the minutes of their rows."""

# A literal, as the index has it.
_DENIED = REQUESTS.c.denied != literal_column("''")
_SUMMED = ("requests", "calls", "denied", "errors", "failed_calls", "cost_nano", "device_tokens", "cloud_tokens")

_KNOWN = select(REQUESTS.c.id).where(REQUESTS.c.id.in_(bindparam("ids", expanding=True)))
_INSERT = Prepared(insert(REQUESTS))


@cache
def _adding(dialect: str, table: Table) -> Prepared:
    adding = upsert(dialect, table)
    added = {name: table.c[name] + adding.excluded[name] for name in _SUMMED}
    return Prepared(adding.on_conflict_do_update(index_elements=["minute", "key_id"], set_=added))


def _summed(row: dict[str, Any]) -> dict[str, int]:
    called = row["route"] == "cloud"
    failed = row["status"] >= 400 and row["status"] != CLIENT_GONE and row["denied"] == ""
    return {
        "requests": 1,
        "calls": called,
        "denied": row["denied"] != "",
        "errors": failed,
        "failed_calls": failed and called,
        "cost_nano": row["cost_nano"],
        "device_tokens": row["device_prompt_tokens"] + row["device_completion_tokens"],
        "cloud_tokens": row["cloud_prompt_tokens"] + row["cloud_completion_tokens"],
    }


def _totals(row: Row[Any]) -> Totals:
    # PostgreSQL sums whole numbers to decimal ones.
    sums = {name: int(row._mapping[name]) for name in _SUMMED}
    return Totals(**{f.name: sums[f.name] for f in fields(Totals) if f.name in sums}, cost_usd=sums["cost_nano"] / 1e9)


def _of_key(query: Select[Any], key_id: str | None) -> Select[Any]:
    return query if key_id is None else query.where(REQUESTS.c.key_id == key_id)


def _percentiles(ordered: Sequence[float]) -> Percentiles:
    """By nearest rank: each is a latency that was measured."""

    def at(share: float) -> float | None:
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None

    return Percentiles(len(ordered), at(0.5), at(0.9), at(0.99))


_PLAIN = tuple(f.name for f in fields(RequestRecord) if f.name != "cost_usd")
_values = attrgetter(*_PLAIN)


def _row(record: RequestRecord) -> dict[str, Any]:
    row = dict(zip(_PLAIN, map(_fit, _values(record)), strict=True))
    for name in ("key_id", "model", "policy", "denied", "error", "rule"):
        row[name] = row[name][:_LONGEST]
    # These two are never missing.
    return {**row, "total_ms": row["total_ms"] or 0.0, "cost_nano": nano(max(0.0, record.cost_usd))}


def _fit(value: Any) -> Any:
    """A value that both databases take: no NUL, no half of a surrogate pair, no endless number."""
    if isinstance(value, str):
        if value.isascii() and value.isprintable():
            return value
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return max(-_MOST, min(value, _MOST)) if isinstance(value, int) else value


def _record(row: Row[Any]) -> RequestRecord:
    values = dict(row._mapping)
    cost_usd = values.pop("cost_nano") / 1e9
    return RequestRecord(**values, cost_usd=cost_usd)
