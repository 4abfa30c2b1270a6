"""Whose time it is, on a clock of the test's own and on a processor that others keep busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from selfroute.tasks.box import Limits
from selfroute.tasks.pool import Pool
from selfroute.tasks.processes import OwnTime, times
from selfroute.tasks.sandbox import Job, Sandbox

SECOND = 10**9


def counted(*looks: tuple[float, dict[int, tuple[float, float]]]) -> OwnTime:
    """Looks at (seconds, {thread: seconds that it ran and was kept from running}), with limits of 1 and 10 s."""
    own = OwnTime(1.0, 10.0, looked=0.0)
    for now, seen in looks:
        own.count(now, {task: (round(ran * SECOND), round(kept * SECOND)) for task, (ran, kept) in seen.items()})
    return own


def every_tick(ran: float, kept: float, ticks: int = 20) -> OwnTime:
    """A thread that has a share of each tick, and is kept waiting for a share."""
    return counted(*((0.05 * n, {1: (0.05 * n * ran, 0.05 * n * kept)}) for n in range(1, ticks + 1)))


@pytest.mark.parametrize(
    ("ran", "kept", "own_s"),
    [
        (0.0, 0.0, 1.0),  # It sleeps.
        (1.0, 0.0, 1.0),  # It runs.
        (0.1, 0.9, 0.1),  # It has a tenth of a processor, and would have more.
        (0.1, 0.4, 0.6),  # It sleeps for the rest.
    ],
)
def test_time_that_others_take_is_not_its_own(ran: float, kept: float, own_s: float) -> None:
    # What was before the first look is not known.
    assert every_tick(ran, kept).seconds == pytest.approx(own_s, abs=0.051)


def test_what_the_processes_of_a_program_take_from_each_other_is_their_own() -> None:
    # Eight of them on two processors.
    own = counted(*((0.05 * n, dict.fromkeys(range(8), (0.05 * n / 4, 0.05 * n * 3 / 4))) for n in range(1, 21)))
    assert own.seconds == pytest.approx(2.0, abs=0.11)
    assert own.over


def test_threads_come_and_go_and_their_numbers_are_used_again() -> None:
    own = counted((0.05, {1: (50, 70)}), (0.1, {1: (50, 70), 2: (0.01, 0.04)}), (0.15, {1: (50, 70)}))
    assert own.seconds == pytest.approx(0.15 - 0.04)
    own.count(0.2, {1: (0, 0)})
    assert own.seconds == pytest.approx(0.2 - 0.04)


def test_who_looks_late_counts_one_look_and_in_the_end_the_clock_decides() -> None:
    assert counted((0.05, {}), (600.0, {})).seconds == pytest.approx(0.15)
    assert not every_tick(0.0, 1.0, ticks=199).over
    assert every_tick(0.0, 1.0, ticks=202).over


def test_the_kernel_tells_of_this_very_thread() -> None:
    number = os.getpid()
    before, _ = times([number])[number]
    while times([number])[number][0] == before:
        sum(range(1000))
    assert times([2**22 + 1]) == {}


@pytest.fixture
def busy() -> Iterator[None]:
    """This thread, and what it starts, on one processor that others keep busy."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    # They end by themselves where nobody is left to end them.
    command = [sys.executable, "-S", "-c", "import time\nby = time.monotonic() + 60\nwhile time.monotonic() < by: pass"]
    # In sessions of their own: the kernel may share a processor out to sessions (autogroup), and a program has one too.
    spin = [subprocess.Popen(command, start_new_session=True) for _ in range(6)]
    try:
        yield
    finally:
        for process in spin:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, before)


WORK = "import time\nwhile time.process_time() < 0.4: pass\nprint(6 * 7)"


def test_a_busy_machine_decides_no_verdict_of_a_program(sandbox: Sandbox, busy: None) -> None:
    limits = Limits(cpu_s=1.0, wall_s=1.2)
    # Nor does it decide how many cases are tried.
    runs = sandbox.run(Job(WORK, [""] * 2, limits=limits, total_s=1.2))
    assert [(ran.stdout, ran.limit) for ran in runs] == [("42\n", None)] * 2
    assert all(ran.wall_s > 1.2 > ran.own_s for ran in runs)
    # One that waits is late all the same.
    [ran] = sandbox.run(Job("import time\ntime.sleep(60)", [""], limits=limits))
    assert (ran.limit, ran.own_s < 2) == ("wall", True)


def work(seconds: float) -> float:
    """What a worker is told to do."""
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        pass
    return seconds


def test_nor_of_a_worker(busy: None) -> None:
    pool = Pool(f"{__name__}:work", size=1)
    pool.start()
    started = time.monotonic()
    done = pool.call(0.4, limit_s=1.2)
    assert done.failure == ""
    assert time.monotonic() - started > 1.2 > done.seconds
    pool.close()
