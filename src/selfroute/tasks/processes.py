"""A program's processes seen from outside: which they are, the memory they hold, and the time that was their own.

    own = max(processor time of all, time watched - time in which one was kept from running)

On an idle machine that is the time by the clock. On a busy one it stands still while a program only waits for its turn,
so that a limit on it decides the same whatever else runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TICK_S = 0.05
"""How often processes are to be looked at."""

Times = dict[int, tuple[int, int]]


def family(number: int) -> list[int]:
    """A process and all that descend from it."""
    found = [number]
    for parent in found:
        # It may just have ended.
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
    return found


def resident_mb(number: int) -> float:
    """Resident memory of a process that is no file's, in MiB. Shared memory is none of it: in a sandbox that is files'
    alone, whose file systems have a size."""
    try:
        pages = Path(f"/proc/{number}/statm").read_text().split()
    except OSError:
        return 0.0
    return (int(pages[1]) - int(pages[2])) * _page_mb()


@cache
def _page_mb() -> float:
    return os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@dataclass(slots=True)
class OwnTime:
    """A limit on the own time of some processes, from when this is made; to be looked at every `TICK_S`.

    `limit_s` is the limit, and `most_s` what they may take by the clock in the end. Where the kernel does not tell how
    long a process was kept from running, all time is its own.
    """

    limit_s: float
    most_s: float
    looked: float = field(default_factory=time.monotonic)
    _known: Times | None = None
    _watched_s: float = 0.0
    _ran_s: float = 0.0
    _kept_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Own time when it was last looked at."""
        return max(self._ran_s, self._watched_s - self._kept_s)

    @property
    def over(self) -> bool:
        """Whether a limit is reached."""
        return self.seconds > self.limit_s or self._watched_s > self.most_s

    def look(self, processes: Iterable[int]) -> None:
        """Count what has passed since the last look."""
        self.count(time.monotonic(), times(processes))

    def count(self, now: float, seen: Times) -> None:
        """Count what has passed until `now`, in seconds."""
        # Who looks late was kept waiting, too, or the machine was asleep: that is nobody's time.
        self._watched_s += min(now - self.looked, 2 * TICK_S)
        self.looked = now
        # What is there at the first look has a life before.
        known = seen if self._known is None else self._known
        before = {task: known.get(task, (0, 0)) for task in seen}
        self._ran_s += sum(max(0, ran - before[task][0]) for task, (ran, _) in seen.items()) / 1e9
        # Where one waits for its turn, all may wait for that one.
        self._kept_s += max([0, *(kept - before[task][1] for task, (_, kept) in seen.items())]) / 1e9
        self._known = seen


def times(processes: Iterable[int]) -> Times:
    """How long each thread of some processes ran, and was kept from running, in nanoseconds."""
    found: Times = {}
    for number in processes:
        # It may just have ended.
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{number}/task"):
                with suppress(OSError, ValueError):
                    ran, kept, _ = map(int, Path(f"/proc/{number}/task/{thread}/schedstat").read_text().split())
                    found[int(thread)] = ran, kept
    return found
