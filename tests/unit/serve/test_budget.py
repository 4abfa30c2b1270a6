"""The budget, against a plain model of it, and with many at once: real processes on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete
from tests.store_worker import at_once

from selfroute.errors import StoreError
from selfroute.serve.account import DAY_S, Denied, Limits, Scope, nano
from selfroute.serve.budget import GATEWAY, Budget, Reservation, Usage
from selfroute.serve.store import Store
from selfroute.serve.tables import ACCOUNTS, RESERVATIONS


class Clock:
    def __init__(self) -> None:
        # Half an hour before a midnight (UTC).
        self.now = 20_000 * DAY_S - 1800.0

    def __call__(self) -> float:
        return self.now


LIMITS = {
    GATEWAY: Limits(share=0.8, window_s=120, min_requests=10, usd_per_day=1, calls_per_minute=7),
    "key:a": Limits(share=0.5, window_s=60, min_requests=8, usd_per_day=0.5),
    "key:b": Limits(calls_per_minute=2, requests_per_minute=4),
}
HOLD_S = 100.0


@dataclass
class Call:
    at: float
    scopes: tuple[str, ...]
    day: int
    nanos: int
    open: bool = True
    released: bool = False


@dataclass
class Model:
    """Everything that ever happened, in lists, with sums over all of them each time."""

    requests: list[tuple[float, str]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    kept: list[Counter[str]] = field(default_factory=lambda: [Counter(), Counter()])
    ended: list[list[tuple[Call, int | None]]] = field(default_factory=lambda: [[], []])

    def scopes(self, key: str) -> tuple[str, ...]:
        return (GATEWAY, key) if key else (GATEWAY,)

    def within(self, scope: str, now: float, length_s: int) -> tuple[int, int]:
        """Requests and calls since the slot began that was a length ago."""
        since = (now * 20 // length_s - 20) * length_s / 20
        calls = [c for c in self.calls if scope in c.scopes and c.at >= since and not c.released]
        return sum(at >= since and s == scope for at, s in self.requests), len(calls)

    def write(self, worker: int, scopes: tuple[str, ...], now: float) -> None:
        """Requests, and ends of calls, that only their worker knew of become known."""
        for call, nanos in self.ended[worker]:
            self.close(call, nanos or 0, released=nanos is None)
        self.ended[worker].clear()
        for scope in scopes:
            self.requests += [(now, scope)] * self.kept[worker].pop(scope, 0)

    def arrive(self, worker: int, key: str, now: float) -> bool:
        scopes = self.scopes(key)
        limits = [(scope, LIMITS[scope].requests_per_minute) for scope in scopes]
        if all(limit is None for _, limit in limits):
            self.kept[worker].update(scopes)
            return True
        if any(limit is not None and self.within(scope, now, 60)[0] >= limit for scope, limit in limits):
            return False
        self.requests += [(now, scope) for scope in scopes]
        return True

    def reserve(self, worker: int, key: str, worst: int, now: float) -> tuple[str, str] | None:
        scopes = self.scopes(key)
        self.write(worker, scopes, now)
        for scope in scopes:
            limits, day = LIMITS[scope], int(now // DAY_S)
            money = sum(c.nanos for c in self.calls if scope in c.scopes and c.day == day)
            if limits.usd_per_day is not None and money + worst > nano(limits.usd_per_day):
                return scope, "usd_per_day"
            if limits.calls_per_minute is not None and self.within(scope, now, 60)[1] >= limits.calls_per_minute:
                return scope, "calls_per_minute"
            requests, calls = self.within(scope, now, limits.window_s)
            if limits.share is not None and calls + 1 > limits.share * max(requests, limits.min_requests):
                return scope, "share"
        self.calls.append(Call(now, scopes, int(now // DAY_S), worst))
        return None

    def close(self, call: Call, nanos: int, *, released: bool = False) -> bool:
        if not call.open:
            return False
        call.open, call.nanos, call.released = False, nanos, released
        return True

    def usage(self, scope: str, now: float) -> Usage:
        mine = [c for c in self.calls if scope in c.scopes and c.day == int(now // DAY_S)]
        spent = sum(c.nanos for c in mine if not c.open)
        held = sum(c.nanos for c in mine if c.open)
        counts = self.within(scope, now, LIMITS[scope].window_s) + self.within(scope, now, 60)
        return Usage(*counts, spent / 1e9, held / 1e9)


workers = st.sampled_from([0, 1])
keys = st.sampled_from(["", "key:a", "key:b"])
usd = st.sampled_from([0.0, 0.01, 0.1, 0.3])
bursts = st.integers(1, 8)
steps = st.one_of(
    st.tuples(st.just("arrive"), workers, keys, bursts),
    st.tuples(st.just("reserve"), workers, keys, usd, bursts),
    st.tuples(st.just("settle"), workers, st.integers(0, 30), usd),
    st.tuples(st.just("release"), workers, st.integers(0, 30)),
    st.tuples(st.just("later"), workers, st.integers(0, 30), st.one_of(usd, st.none())),
    st.tuples(st.just("flush"), workers),
    st.tuples(st.just("sweep"), workers),
    st.tuples(st.just("wait"), st.sampled_from([0.3, 1.0, 7.0, 45.0, 110.0, 1800.0])),
)


def test_two_workers_decide_as_the_plain_model_does(store: Store) -> None:
    seen: Counter[tuple[str, ...]] = Counter()

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(st.lists(steps, min_size=10, max_size=30))
    def check(happens: list[tuple[Any, ...]]) -> None:
        with store.begin() as connection:
            connection.execute(delete(ACCOUNTS))
            connection.execute(delete(RESERVATIONS))
        asyncio.run(replay(store, happens, seen))

    check()
    # What was drawn met every limit, and each way that a reservation can end.
    assert set(seen) == {
        (GATEWAY, "usd_per_day"), (GATEWAY, "calls_per_minute"), (GATEWAY, "share"), ("key:a", "usd_per_day"),
        ("key:a", "share"), ("key:b", "calls_per_minute"), ("key:b", "requests_per_minute"), ("granted",),
        ("swept",), ("settle", "True"), ("settle", "False"), ("release", "True"), ("release", "False"),
        ("later", "True"), ("later", "False"),
    }  # fmt: skip


def once(happens: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Each step as often as its burst says."""
    for what, *rest in happens:
        if what in ("arrive", "reserve"):
            yield from [(what, *rest[:-1])] * rest[-1]
        else:
            yield (what, *rest)


async def replay(store: Store, happens: list[tuple[Any, ...]], seen: Counter[tuple[str, ...]]) -> None:
    clock, model = Clock(), Model()
    both = [Budget(store, LIMITS[GATEWAY], hold_s=HOLD_S, clock=clock) for _ in range(2)]
    scope = {name: Scope(name, limits) for name, limits in LIMITS.items() if name != GATEWAY}
    held: list[tuple[Reservation, Call]] = []
    for what, *rest in once(happens):
        if what == "wait":
            clock.now += rest[0]
            continue
        worker, *values = rest
        budget = both[worker]
        if what == "arrive":
            denied = await budget.arrive(scope.get(values[0]))
            assert (denied is None) == model.arrive(worker, values[0], clock.now)
            if denied:
                seen[denied.scope, denied.limit] += 1
        elif what == "reserve":
            reserved = await budget.reserve(values[1], scope.get(values[0]))
            refused = model.reserve(worker, values[0], nano(values[1]), clock.now)
            if isinstance(reserved, Denied):
                assert (reserved.scope, reserved.limit) == refused
                seen[reserved.scope, reserved.limit] += 1
            else:
                assert refused is None
                held.append((reserved, model.calls[-1]))
                seen[("granted",)] += 1
        elif what == "flush":
            await budget.flush()
            model.write(worker, tuple(model.kept[worker]), clock.now)
        elif what == "sweep":
            lost = [c for _, c in held if c.open and c.at + HOLD_S <= clock.now]
            assert await budget.sweep() == sum(model.close(c, c.nanos) for c in lost)
            if lost:
                seen[("swept",)] += 1
        elif held:
            reservation, call = held[values[0] % len(held)]
            if what == "settle":
                closed = await budget.settle(reservation, values[1])
                assert closed == model.close(call, nano(values[1]))
            elif what == "later":
                budget.settle_later(reservation, closed := values[1])
                model.ended[worker].append((call, None if closed is None else nano(closed)))
                closed = closed is not None
            else:
                closed = await budget.release(reservation)
                assert closed == model.close(call, 0, released=True)
            seen[what, str(closed)] += 1
    for name in LIMITS:
        assert await both[0].usage(scope.get(name)) == model.usage(name, clock.now)


CAP_USD = 0.37
WORK = {"worst_usd": 0.01, "requests": 25, "limits": {"usd_per_day": CAP_USD, "window_s": 3600}}


def usage(url: str, key: Scope | None = None) -> Usage:
    store = Store(url)
    try:
        return asyncio.run(Budget(store, Limits()).usage(key))
    finally:
        store.close()


def test_100_requests_in_4_processes_never_hold_back_more_than_the_cap(url: str) -> None:
    said = at_once(url, *({**WORK, "settle": [None], "seed": seed} for seed in range(4)))
    outcomes = sum((Counter(s["outcomes"]) for s in said), Counter())
    assert outcomes == {"open": 37, "usd_per_day": 63}
    used = usage(url)
    assert (used.calls, used.held_usd, used.spent_usd) == (37, CAP_USD, 0)


def test_100_requests_in_4_processes_settle_to_what_they_cost(url: str) -> None:
    key_limits = {"share": 0.5, "min_requests": 30}
    work = {**WORK, "key_limits": key_limits, "settle": [0.0, 0.25, 1.0, None]}
    said = at_once(url, *({**work, "seed": seed} for seed in range(4)))
    outcomes = sum((Counter(s["outcomes"]) for s in said), Counter())
    assert outcomes.total() == 100
    used = usage(url)
    assert used.spent_usd + used.held_usd == pytest.approx(sum(s["usd"] for s in said), abs=1e-9)
    assert used.spent_usd + used.held_usd <= CAP_USD
    assert used.held_usd == pytest.approx(0.01 * outcomes["open"])
    assert used.calls == outcomes["settled"] + outcomes["open"] <= 50
    of_key = usage(url, Scope("key:a", Limits(**key_limits)))
    assert (of_key.calls, of_key.spent_usd, of_key.held_usd) == (used.calls, used.spent_usd, used.held_usd)


def test_a_killed_workers_reservation_is_swept_at_its_worst_case(url: str, caplog: pytest.LogCaptureFixture) -> None:
    (lost,) = at_once(url, {**WORK, "requests": 1, "settle": [1.0], "seed": 0, "die": True})
    assert usage(url).held_usd == 0.01
    store = Store(url)
    early = Budget(store, Limits(), clock=lambda: lost["expires_at"] - 1)
    late = Budget(store, Limits(), clock=lambda: lost["expires_at"])
    assert asyncio.run(early.sweep()) == 0
    assert [asyncio.run(late.sweep()), asyncio.run(late.sweep())] == [1, 0]
    assert "1 reservations were never settled" in caplog.text
    used = asyncio.run(early.usage())
    assert (used.calls, used.held_usd, used.spent_usd) == (1, 0, 0.01)
    # It was only slow: what it says now comes too late, and costs nothing more.
    assert not asyncio.run(early.settle(Reservation(**lost), 0.001))
    assert asyncio.run(early.usage()) == used
    store.close()


def test_one_who_is_cancelled_while_reserving_has_reserved_nothing(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stop_first(connection: Connection) -> None:
        begun.set()
        assert go_on.wait(10)

    async def run() -> Usage:
        budget = Budget(store, Limits())
        if store.name.endswith("sqlite"):
            # The one writer is busy: the reservation stands in the queue.
            blocking = asyncio.create_task(store.write(stop_first))
            await asyncio.to_thread(begun.wait, 10)
        else:
            blocking = asyncio.create_task(asyncio.sleep(0))
        reserving = asyncio.create_task(budget.reserve(0.01))
        await asyncio.sleep(0)
        reserving.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reserving
        await blocking
        return await budget.usage()

    assert asyncio.run(run()) == Usage(0, 0, 0, 0, 0, 0)


def test_where_the_store_fails_nothing_is_granted(store: Store) -> None:
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TABLE reservations")
    budget = Budget(store, Limits())
    with pytest.raises(StoreError):
        asyncio.run(budget.reserve(0.01))
    used = asyncio.run(budget.usage())
    assert (used.calls, used.held_usd) == (0, 0)


def test_what_could_not_be_settled_is_settled_once_the_store_is_back(store: Store) -> None:
    def rename(old: str, new: str) -> None:
        with store.begin() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    async def run() -> None:
        budget = Budget(store, Limits())
        first, second = [await budget.reserve(0.01) for _ in range(2)]
        budget.settle_later(first, 0.004)
        budget.settle_later(second, None)
        rename("reservations", "gone")
        for failing in (budget.flush, lambda: budget.reserve(0.01)):
            with pytest.raises(StoreError):
                await failing()
        assert (await budget.usage()).held_usd == 0.02
        rename("gone", "reservations")
        await budget.flush()
        used = await budget.usage()
        assert (used.calls, used.held_usd, used.spent_usd) == (1, 0, 0.004)
        await budget.flush()
        assert await budget.usage() == used

    asyncio.run(run())


def test_a_key_that_is_drained_leaves_the_others_theirs(store: Store) -> None:
    async def run() -> None:
        budget = Budget(store, Limits(usd_per_day=10))
        greedy, other = Scope("key:a", Limits(usd_per_day=0.05)), Scope("key:b", Limits(usd_per_day=0.05))
        reserved = [await budget.reserve(0.01, greedy) for _ in range(8)]
        assert sum(isinstance(r, Reservation) for r in reserved) == 5
        assert isinstance(reserved[5], Denied)
        assert (reserved[5].scope, reserved[5].limit) == ("key:a", "usd_per_day")
        assert isinstance(await budget.reserve(0.01, other), Reservation)

    asyncio.run(run())


def test_it_flushes_and_sweeps_by_itself(store: Store) -> None:
    clock = Clock()

    async def run() -> None:
        budget = Budget(store, Limits(), hold_s=10, clock=clock)
        assert isinstance(await budget.reserve(0.01), Reservation)
        clock.now += 10
        await budget.arrive()
        running = asyncio.create_task(budget.run(flush_s=0.01))
        async with asyncio.timeout(10):
            while (await budget.usage()).requests == 0 or (await budget.usage()).held_usd:
                await asyncio.sleep(0.01)
        await budget.arrive()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        used = await budget.usage()
        assert (used.requests, used.spent_usd) == (2, 0.01)

    asyncio.run(run())
