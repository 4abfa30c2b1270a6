"""What one query reads, for all who ask at a time: anybody may make a gateway look something up, and not many times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """The newest result of `read`, of which one is under way at a time.

    Where it fails, all who wait hear of it then: each with one of its own, one after the other, they would wait the
    longer the more they are.
    """

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._result: T
        self._began = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def since(self, moment: float) -> T:
        """A result that was read at `moment` of the monotonic clock, or later.

        Raises:
            StoreError: as `read`.
        """
        while self._began < moment:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._read_once())
                # If all who wait go away, nobody else hears of a failure.
                self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Whoever goes away does not take it from the others.
            await asyncio.shield(self._reading)
        return self._result

    async def _read_once(self) -> None:
        began = time.monotonic()
        self._result = await self._read()
        # As old as its beginning: what changed while it ran may not be in it.
        self._began = began
