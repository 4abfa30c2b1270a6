"""The queue in front of the store: it never waits, writes in batches, drains, and says what it drops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from selfroute.errors import SilentStoreError, StoreError
from selfroute.serve import history
from selfroute.serve.history import RequestRecord
from selfroute.serve.recorder import Recorder
from selfroute.serve.store import Store

RECORD = RequestRecord(id="r", at=1.8e9, request="the question", response="the answer")


class Dropped:
    def __init__(self) -> None:
        self.count = 0.0

    def inc(self, amount: float = 1) -> None:
        self.count += amount


class Watched(Store):
    """Another store; its writes are counted, wait for a gate, and fail as often as they are told, before they are made
    or `after`."""

    def __init__(self, store: Store, failures: int = 0, silent: bool = False, after: bool = False) -> None:
        self.store, self.failures, self.silent, self.writes, self.after = store, failures, silent, 0, after
        self.again = list[bool]()
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, work: Any, *, brief: bool = False) -> Any:
        self.writes += 1
        self.again.append(work.keywords["again"])
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            if self.after:
                await self.store.write(work, brief=brief)
            raise SilentStoreError("no answer") if self.silent else StoreError("the store x failed: disk full")
        return await self.store.write(work, brief=brief)


def records(number: int) -> list[RequestRecord]:
    return [replace(RECORD, id=f"r{i:05d}") for i in range(number)]


def written(store: Store) -> list[RequestRecord]:
    with store.begin(write=False) as connection:
        return history.latest(connection, 100_000)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def drained(recorder: Recorder, running: asyncio.Task[None]) -> None:
    recorder.close()
    async with asyncio.timeout(10):
        await running


def test_records_are_written_in_batches_and_all_of_them_on_closing(store: Store) -> None:
    async def run() -> None:
        watched, dropped = Watched(store), Dropped()
        recorder = Recorder(watched, dropped, batch=100, interval_s=0.001)
        running = asyncio.create_task(recorder.run())
        for record in records(1000):
            recorder.record(record)
        await until(lambda: watched.writes >= 10)
        recorder.record(replace(RECORD, id="last"))
        await drained(recorder, running)
        assert (watched.writes, dropped.count) == (11, 0)

    asyncio.run(run())
    assert len(written(store)) == 1001


def test_few_records_do_not_wait_for_an_interval(store: Store) -> None:
    async def run() -> None:
        watched = Watched(store)
        recorder = Recorder(watched, Dropped(), few=3, interval_s=3600)
        running = asyncio.create_task(recorder.run())
        # Again, where it has waited before; and what comes while they are written.
        for group in (records(3), records(6)[3:]):
            before = watched.writes
            for record in group[:2]:
                recorder.record(record)
            await asyncio.sleep(0.02)
            assert watched.writes == before
            recorder.record(group[2])
            await until(lambda before=before: watched.writes > before)
        watched.gate.clear()
        for record in records(9)[6:]:
            recorder.record(record)
        await until(lambda: watched.writes == 3)
        for record in records(13)[9:]:
            recorder.record(record)
        watched.gate.set()
        await until(lambda: watched.writes >= 4)
        await drained(recorder, running)
        assert watched.writes == 4

    asyncio.run(run())
    assert len(written(store)) == 13


def test_fewer_records_wait_for_an_interval(store: Store) -> None:
    async def run() -> None:
        watched = Watched(store)
        recorder = Recorder(watched, Dropped(), few=3, interval_s=0.2)
        running = asyncio.create_task(recorder.run())
        began = time.monotonic()
        for record in records(2):
            recorder.record(record)
        await until(lambda: watched.writes)
        assert time.monotonic() - began > 0.19
        await drained(recorder, running)
        assert watched.writes == 1

    asyncio.run(run())
    assert len(written(store)) == 2


def test_content_goes_at_its_interval(store: Store) -> None:
    async def run() -> None:
        watched = Watched(store)
        recorder = Recorder(watched, Dropped(), content=True, few=3, batch=5, interval_s=3600)
        running = asyncio.create_task(recorder.run())
        for record in records(4):
            recorder.record(record)
        await asyncio.sleep(0.02)
        assert watched.writes == 0
        recorder.record(records(5)[4])
        await until(lambda: watched.writes)
        await drained(recorder, running)

    asyncio.run(run())
    assert len(written(store)) == 5


def test_another_try_waits_its_time_whatever_comes(store: Store) -> None:
    async def run() -> None:
        watched = Watched(store, failures=1)
        recorder = Recorder(watched, Dropped(), few=3, interval_s=0.001, retry_s=0.2)
        running = asyncio.create_task(recorder.run())
        began = time.monotonic()
        for number, record in enumerate(records(20)):
            recorder.record(record)
            if number > 3:
                await asyncio.sleep(0.005)
        await until(lambda: watched.writes >= 2)
        assert time.monotonic() - began > 0.2
        await drained(recorder, running)

    asyncio.run(run())
    assert len(written(store)) == 20


def test_what_was_written_before_the_store_failed_is_not_written_again(store: Store) -> None:
    async def run() -> None:
        watched, dropped = Watched(store, failures=1, after=True), Dropped()
        recorder = Recorder(watched, dropped, interval_s=0.001, retry_s=0.001)
        running = asyncio.create_task(recorder.run())
        recorder.record(RECORD)
        await until(lambda: watched.writes >= 2)
        await drained(recorder, running)
        assert (watched.again, dropped.count) == ([False, True], 0)

    asyncio.run(run())
    assert len(written(store)) == 1
    with store.begin(write=False) as connection:
        [(_, sums)] = history.timeline(connection, RECORD.at, 1)
    assert sums.requests == 1


def test_closing_does_not_wait_for_an_interval(store: Store) -> None:
    async def run() -> None:
        recorder = Recorder(store, Dropped(), interval_s=3600)
        running = asyncio.create_task(recorder.run())
        recorder.record(RECORD)
        await asyncio.sleep(0)
        await drained(recorder, running)

    asyncio.run(run())
    assert len(written(store)) == 1


def test_what_comes_while_it_closes_does_not_wait_for_an_interval_either(store: Store) -> None:
    async def run() -> None:
        watched = Watched(store)
        watched.gate.clear()
        recorder = Recorder(watched, Dropped(), batch=1, interval_s=3600)
        running = asyncio.create_task(recorder.run())
        for record in records(8):
            recorder.record(record)
        await until(lambda: watched.writes)
        recorder.close()
        recorder.record(replace(RECORD, id="last"))
        watched.gate.set()
        await drained(recorder, running)

    asyncio.run(run())
    assert len(written(store)) == 9


def test_content_is_kept_only_where_that_was_asked_for(store: Store) -> None:
    async def run(content: bool) -> None:
        recorder = Recorder(store, Dropped(), content=content)
        running = asyncio.create_task(recorder.run())
        recorder.record(replace(RECORD, id=str(content)))
        await drained(recorder, running)

    asyncio.run(run(True))
    asyncio.run(run(False))
    kept = {r.id: (r.request, r.response) for r in written(store)}
    assert kept == {"True": ("the question", "the answer"), "False": (None, None)}


def test_a_full_queue_drops_what_comes_and_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        watched, dropped = Watched(store), Dropped()
        watched.gate.clear()
        recorder = Recorder(watched, dropped, capacity=10, batch=1, interval_s=0.001)
        running = asyncio.create_task(recorder.run())
        recorder.record(replace(RECORD, id="under way"))
        await until(lambda: watched.writes)
        for record in records(13):
            recorder.record(record)
        assert dropped.count == 3
        watched.gate.set()
        await drained(recorder, running)
        assert dropped.count == 3

    asyncio.run(run())
    assert len(written(store)) == 11
    assert "3 request records were dropped: the store is slower" in caplog.text


def test_a_store_that_fails_for_a_while_loses_nothing(store: Store) -> None:
    async def run() -> None:
        watched, dropped = Watched(store, failures=3), Dropped()
        recorder = Recorder(watched, dropped, interval_s=0.001, retry_s=0.02)
        running = asyncio.create_task(recorder.run())
        recorder.record(RECORD)
        began = time.monotonic()
        await until(lambda: watched.writes >= 4)
        assert time.monotonic() - began > 0.02 * (1 + 3 + 9)
        await drained(recorder, running)
        assert dropped.count == 0

    asyncio.run(run())
    assert len(written(store)) == 1


def test_a_store_that_stays_down_costs_the_batch_and_not_the_next(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def run() -> None:
        watched, dropped = Watched(store, failures=3), Dropped()
        recorder = Recorder(watched, dropped, interval_s=0.001, retry_s=0.001, tries=3)
        running = asyncio.create_task(recorder.run())
        for record in records(2):
            recorder.record(record)
        await until(lambda: dropped.count >= 2)
        recorder.record(replace(RECORD, id="next"))
        await drained(recorder, running)
        assert dropped.count == 2

    asyncio.run(run())
    assert [r.id for r in written(store)] == ["next"]
    assert "2 request records were dropped: the store x failed: disk full" in caplog.text
    assert "the answer" not in caplog.text


@pytest.mark.parametrize(("silent", "writes"), [(True, 2), (False, 26)])
def test_closing_while_the_store_is_down_ends(silent: bool, writes: int, store: Store) -> None:
    async def run() -> None:
        watched, dropped = Watched(store, failures=1000, silent=silent), Dropped()
        recorder = Recorder(watched, dropped, batch=10, interval_s=0.001)
        running = asyncio.create_task(recorder.run())
        for record in records(250):
            recorder.record(record)
        await drained(recorder, running)
        assert dropped.count == 250
        # One before it was told to close, and of each batch one after; a silent store is not waited for with each.
        assert watched.writes <= writes

    asyncio.run(run())
