"""Who begins when: what is under way goes first, and of those that wait the first come.

An event loop begins all requests that have come before it goes on with any that the cloud has answered meanwhile, so
that a few that come together make each other late, and each waits for the others again with every step of its own.
Here one begins every few iterations of the loop; where many wait, several begin together, which takes less of the CPU.
"""

from __future__ import annotations

import asyncio
from collections import deque

BETWEEN = 4
"""Iterations from one beginning to the next: about as many as a request that has its answer takes to its end. They take
microseconds where there is nothing else to do."""

TOGETHER = 8
"""For so many that wait, one more begins."""


class Turns:
    """Lets tasks begin one after the other; to be used in one event loop."""

    def __init__(self) -> None:
        # Iterations to the next beginning; 0: nobody waits, and whoever comes may begin.
        self._left = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def mine(self) -> None:
        """Wait for the caller's turn, which whoever is cancelled gives up."""
        loop = asyncio.get_running_loop()
        if not self._left:
            self._left = BETWEEN
            loop.call_soon(self._go_on, loop)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count an iteration, and let those begin that have waited longest."""
        self._left -= 1
        if not self._left and self._begin():
            self._left = BETWEEN
        if self._left:
            loop.call_soon(self._go_on, loop)

    def _begin(self) -> bool:
        """Whether anybody begins."""
        most, begun = 1 + len(self._waiting) // TOGETHER, 0
        while self._waiting and begun < most:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                begun += 1
        return begun > 0
