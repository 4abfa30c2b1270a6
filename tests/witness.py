"""Runs programs in the sandbox as a witness, who sees what they start and what is left of it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

from selfroute.tasks.box import Limits, Ran
from selfroute.tasks.processes import family
from selfroute.tasks.sandbox import Job, Sandbox

LIMITS = Limits(cpu_s=1, wall_s=30, memory_mb=128, processes=8, output_kb=64)
# For programs that wait, or whose processes together take more than one core.
SHORT = replace(LIMITS, wall_s=1.5)


class Witness:
    """Sees every process that descends from this one while it is in use, and which of them are alive after."""

    def __enter__(self) -> Witness:
        self.before = set(family(os.getpid()))
        self.seen: dict[int, str] = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.is_set():
            for number in set(family(os.getpid())) - self.before:
                started = self._started(number)
                if started:
                    self.seen[number] = started
            self.done.wait(0.01)

    @staticmethod
    def _started(number: int) -> str | None:
        """When a process started, in ticks; None where it has ended (a zombie has)."""
        try:
            state, *rest = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else rest[18]

    def __exit__(self, *exc: object) -> None:
        self.done.set()
        self.thread.join()

    def alive(self) -> list[int]:
        return [n for n, started in self.seen.items() if self._started(n) == started]


def judge(sandbox: Sandbox, program: str, cases: list[str] | None = None, limits: Limits = LIMITS) -> list[Ran]:
    """Run a program, and check what every program must leave behind: nothing, and in time."""
    open_files, started = len(os.listdir("/proc/self/fd")), time.monotonic()
    with Witness() as witness:
        runs = sandbox.run(Job(program, cases or [""], limits=limits))
    # Beside the limit, what starting and killing take on a busy machine.
    assert time.monotonic() - started < len(runs) * limits.wall_s + 5
    assert witness.alive() == []
    assert len(witness.seen) >= 2 or all(ran.wall_s < 1 for ran in runs)
    assert len(os.listdir("/proc/self/fd")) == open_files
    return runs
