"""Runs Python programs that nobody trusts: a model's answers to programming problems.

A program runs in a sandbox of its own (bubblewrap): namespaces of its own, no network, nothing of the host but a
read-only /usr, an unprivileged user without capabilities, a filter on system calls, sized memory file systems, limits
on processor time, time, memory, processes, files and output. Inside, a fresh process starts for each case, so that a
sandbox is paid for once a program. Nothing of it is alive or on disk afterwards.

Left out on purpose: what an answer should print, which never enters the sandbox (that is `code.py`'s).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from selfroute.errors import TaskError
from selfroute.tasks.box import Box, Limits, Ran
from selfroute.tasks.isolation import NOBODY

_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Job:
    """One program and its cases, which run in order, each in a fresh process.

    `mode` says what a case is: `script`, its text is the standard input; `call`, `function` is called with the case's
    arguments (`inside.wire.pack`, as JSON), and what it returns is in `Ran.answers`; `tests`, it holds tests that run
    in a second sandbox and ask the program in the first. Except for `script`, `setup` runs before the program.
    """

    program: str
    cases: Sequence[str]
    mode: Literal["script", "call", "tests"] = "script"
    function: str = ""
    setup: str = ""
    limits: Limits = _LIMITS
    total_s: float = 60.0
    """Seconds of the program's own time after which no further case begins."""
    goes_on: Callable[[int, Ran], bool] | None = None
    """Whether to go on after a case (numbered from 0); by default always."""


_PROBE = """
import os, socket
for path in ("/proc/self/status", "/proc/net/dev"):
    print(open(path).read())
print("RootFiles:", *sorted(os.listdir("/")))
print("Pid:", os.getpid())
try:
    socket.socket()
except OSError as error:
    print("Socket:", error.errno)
"""


class Sandbox:
    """Runs jobs; safe to use from several threads.

    Args:
        unsafe: where there is no isolation, run with resource limits only, as a process of this machine.
    """

    def __init__(self, *, unsafe: bool = False) -> None:
        self.unsafe = unsafe
        self._lock = threading.Lock()
        self._isolated: bool | None = None

    def isolated(self) -> bool:
        """Whether programs are isolated; found out once, by running one.

        Raises:
            TaskError: they cannot be isolated, and `unsafe` was not set.
        """
        with self._lock:
            if self._isolated is None:
                try:
                    _probe()
                    self._isolated = True
                except TaskError as error:
                    if not self.unsafe:
                        raise TaskError(
                            f"what a model writes cannot be run or scored in isolation here: {error}. To do so with "
                            "resource limits only, free to read this machine's files and use its network, set "
                            "task.unsafe_sandbox=true (or: selfroute train --unsafe-sandbox)"
                        ) from error
                    self._isolated = False
            return self._isolated

    def run(self, job: Job) -> list[Ran]:
        """Run a job's cases in order, until `goes_on` says no; what became of each.

        Raises:
            TaskError: the sandbox itself could not be started. It is never taken for a fault of the program.
        """
        return _run(job, self.isolated())

    async def run_many(self, jobs: Sequence[Job], concurrency: int | None = None) -> list[list[Ran]]:
        """Run jobs at a time, by default as many as there are cores; the results in the jobs' order.

        Raises:
            TaskError: as from `run`.
        """
        self.isolated()
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(concurrency or cores())
        try:
            return list(await asyncio.gather(*(loop.run_in_executor(threads, self.run, job) for job in jobs)))
        finally:
            # After a failure, jobs that have begun end by themselves, and no further one begins.
            threads.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _probe() -> None:
    """Run a program that looks around, and check that it sees nothing.

    Raises:
        TaskError: isolation does not work, and why.
    """
    [ran] = _run(Job(_PROBE, [""], limits=Limits(cpu_s=10, wall_s=30)), isolated=True)
    seen = {name.strip(): value.split() for line in ran.stdout.splitlines() for name, _, value in [line.partition(":")]}
    wanted = {
        "RootFiles": [
            ["bin", "dev", "lib", "lib64", "proc", "tmp", "usr"],
            ["bin", "dev", "lib", "proc", "tmp", "usr"],
        ],
        "Seccomp": [["2"]],
        "NoNewPrivs": [["1"]],
        "CapEff": [["0" * 16]],
        "Socket": [["1"]],
        "Uid": [[str(NOBODY)] * 4],
    }
    wrong = [
        f"{name} is {' '.join(seen.get(name, ['unknown']))}" for name in wanted if seen.get(name) not in wanted[name]
    ]
    if ran.status != 0 or wrong:
        raise TaskError(f"a sandbox is not tight ({', '.join(wrong) or ran.stderr.strip()[-300:]})")


def _run(job: Job, isolated: bool) -> list[Ran]:
    results: list[Ran] = []
    with ExitStack() as boxes:
        box: Box | None = None
        for number, case in enumerate(job.cases):
            if sum(ran.own_s for ran in results) > job.total_s:
                break
            if job.mode == "tests":
                ran = _test(job, case, isolated)
            else:
                if box is None:
                    box = boxes.enter_context(
                        Box(
                            job.mode, job.program, setup=job.setup, function=job.function, limits=job.limits,
                            isolated=isolated,
                        )
                    )  # fmt: skip
                box.begin(case)
                ran = box.result()
                if not ran.clean:
                    # No case may see what another left behind, or go on in a sandbox that is at its end.
                    boxes.pop_all().close()
                    box = None
            results.append(ran)
            if job.goes_on is not None and not job.goes_on(number, ran):
                break
    return results


def _test(job: Job, case: str, isolated: bool) -> Ran:
    """Tests in one sandbox, the program in another: the program's fate, with the tests' word in `answers`."""
    ask, answer = os.pipe(), os.pipe()
    with ExitStack() as stack:
        try:
            program = stack.enter_context(
                Box(
                    "serve",
                    job.program,
                    setup=job.setup,
                    limits=job.limits,
                    isolated=isolated,
                    link=(ask[0], answer[1]),
                )
            )
            tests = stack.enter_context(
                Box("tests", "", limits=job.limits, isolated=isolated, link=(answer[0], ask[1]))
            )
        finally:
            # The two ends must see it when the other one dies.
            for number in (*ask, *answer):
                os.close(number)
        program.begin("")
        tests.begin(case)
        said = tests.result(program)
        # Where the tests came to no verdict, how they failed is all there is.
        return replace(program.result(), answers=said.answers) if said.answers else said
