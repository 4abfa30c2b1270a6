"""Request records on their way to the store: a bounded queue that is written in batches.

A request puts its record in and goes on at once; nothing that streams ever waits for the store. When the store is
slower than the requests, or down, records are dropped, which the log and a counter say: the budget's accounts do not
depend on them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Protocol

from selfroute.errors import SilentStoreError, StoreError
from selfroute.serve import history
from selfroute.serve.asking import Ask
from selfroute.serve.events import Course
from selfroute.serve.history import RequestRecord
from selfroute.serve.store import Store

_log = logging.getLogger(__name__)


class Counter(Protocol):
    """Something that counts up, such as prometheus_client's `Counter`."""

    def inc(self, amount: float = 1) -> None:
        """Count so many more."""
        ...


class Recorder:
    """Writes records to the store `interval_s` after the first that waits; at most `batch` in a transaction.

    Without `content`, as soon as `few` wait: SQLite takes them in the event loop's thread then, and requests wait
    meanwhile. In a thread beside it each statement would wait for Python's lock, and the calls' reservations for the
    records. A store that is slower gets more at a time, for they come while it writes. The queue holds `capacity`
    records; further ones are dropped, and counted in `dropped`. A batch that the store refuses is tried `tries` times,
    at first after `retry_s`, then after three times as long each time, and dropped then. Without `content`, requests'
    and responses' texts never reach the queue.
    """

    def __init__(
        self,
        store: Store,
        dropped: Counter,
        *,
        content: bool = False,
        capacity: int = 10_000,
        few: int = 8,
        batch: int = 50,
        interval_s: float = 0.05,
        tries: int = 6,
        retry_s: float = 0.25,
    ) -> None:
        self._store, self._dropped, self._content = store, dropped, content
        self._capacity, self._batch, self._interval_s = capacity, batch, interval_s
        self._few = batch if content else few
        self._tries, self._retry_s = tries, retry_s
        self._queue: deque[RequestRecord] = deque()
        self._filled = asyncio.Event()
        self._enough = asyncio.Event()
        self._closing = asyncio.Event()
        self._refused = 0

    def record(self, record: RequestRecord) -> None:
        """Take a record, or drop it; never waits, never raises."""
        if len(self._queue) >= self._capacity:
            self._refused += 1
            self._dropped.inc()
            return
        if not self._content and (record.request, record.response) != (None, None):
            record = replace(record, request=None, response=None)
        self._queue.append(record)
        self._filled.set()
        if len(self._queue) >= self._few or self._closing.is_set():
            self._enough.set()

    async def run(self) -> None:
        """Write until `close`, and what is left then."""
        while not self._closing.is_set() or self._queue:
            await self._filled.wait()
            await _within(self._interval_s, self._enough)
            self._filled.clear()
            self._enough.clear()
            # Those that come meanwhile wait for the next time, or batches would be of one or two.
            for _ in range(math.ceil(len(self._queue) / self._batch)):
                if not self._queue:
                    break
                await self._write([self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))])
                await asyncio.sleep(0)
            if self._refused:
                _log.warning("%d request records were dropped: the store is slower than the requests", self._refused)
                self._refused = 0

    def close(self) -> None:
        """Let `run` end as soon as all is written, or dropped after one more try."""
        for event in (self._closing, self._filled, self._enough):
            event.set()

    async def _write(self, records: list[RequestRecord]) -> None:
        wait_s = self._retry_s
        for left in reversed(range(self._tries)):
            try:
                adding = partial(history.add, records=records, again=left < self._tries - 1)
                await self._store.write(adding, brief=not self._content)
                return
            except StoreError as error:
                if not left or self._closing.is_set():
                    lost = len(records)
                    if self._closing.is_set() and isinstance(error, SilentStoreError):
                        # It would be waited for with each batch, and the end with it.
                        lost += len(self._queue)
                        self._queue.clear()
                    _log.error("%d request records were dropped: %s", lost, error)
                    self._dropped.inc(lost)
                    return
            await _within(wait_s, self._closing)
            wait_s *= 3


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait so long for it, at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def record_of(ask: Ask, course: Course, *, content: bool) -> RequestRecord:
    """The record of a request, with what was asked and answered or without."""
    return RequestRecord(
        id=ask.id,
        at=course.at,
        key_id=ask.key.name.removeprefix("key:") if ask.key else "",
        model=ask.model,
        policy=ask.policy,
        request=json.dumps(ask.messages, ensure_ascii=False) if content else None,
        response="".join(course.said) if content else None,
        redacted=json.dumps(course.redacted) if course.redacted else "",
        **{name: getattr(course, name) for name in _RECORDED},
    )


_RECORDED = (
    *("decision", "route", "score", "denied", "rule", "status", "error"),
    *("cost_usd", "first_ms", "device_ms", "cloud_ms", "total_ms"),
    *("device_prompt_tokens", "device_completion_tokens", "cloud_prompt_tokens", "cloud_completion_tokens"),
)
