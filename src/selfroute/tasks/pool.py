"""A function in processes that can be killed: for work that may hang, crash, or take all memory.

Nothing starts before the first call; threads share the workers. Left out on purpose: time limits by signals, which work
in a main thread alone.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from selfroute.errors import TaskError
from selfroute.tasks.processes import TICK_S, OwnTime, family

PATIENCE = 4
"""How many times its limit a call may take by the clock, where others keep its worker from running."""

START_S = 120.0
"""A worker that has not imported its function after so many seconds is given up."""

RECYCLE_AFTER = 2000
"""Calls after which a worker is replaced: the caches of what it runs may grow without end."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done:
    """How a call ended: its result, or why there is none ("" where there is one); and the seconds that it took."""

    result: Any
    failure: str = ""
    seconds: float = field(default=0.0, compare=False)


class Pool:
    """Runs one function in up to `size` workers; JSON goes in and comes out.

    Args:
        path: the function, `package.module:name`.
        size: most workers.
        memory_bytes: address space that a worker may take.
        folders: where the function's module may be, beside where this process finds modules.
        first: arguments of a call with which each worker begins, before it counts as started.
    """

    def __init__(
        self,
        path: str,
        *,
        size: int,
        memory_bytes: int = 2 * 2**30,
        folders: Sequence[str] = (),
        first: tuple[Any, ...] | None = None,
    ) -> None:
        self.path, self.size, self.memory_bytes, self.folders = path, size, memory_bytes, tuple(folders)
        self.first = first
        self._empty()
        atexit.register(self.close)

    def _empty(self) -> None:
        self._process = os.getpid()
        self._free = threading.BoundedSemaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._live: set[_Worker] = set()

    def start(self) -> None:
        """Have a worker that has started: a function that cannot be imported is found out before it is needed.

        Raises:
            TaskError: no worker can be started.
        """
        self._use(_Worker.start)

    def call(self, *arguments: Any, limit_s: float) -> Done:
        """What the function makes of the arguments, in at most `limit_s` seconds.

        A worker that is late or dies is replaced, and costs this call alone. Waiting for a free worker, or for its
        start, does not count; nor does what others keep the worker from running, up to `PATIENCE` times the limit.

        Raises:
            TaskError: no worker can be started.
        """
        return self._use(lambda worker: worker.call(arguments, limit_s))

    def _use(self, use: Callable[[_Worker], T]) -> T:
        if self._process != os.getpid():
            # In a fork they are the parent's: talking to them would mix up replies.
            self._empty()
        with self._free:
            worker = self._take()
            try:
                return use(worker)
            finally:
                # After a Ctrl-C too: a late reply must not answer the next call.
                self._give_back(worker)

    def close(self) -> None:
        """Kill all workers; a later call starts anew."""
        if self._process != os.getpid():
            return
        with self._lock:
            gone = list(self._live)
            self._live.clear()
            self._idle.clear()
        for worker in gone:
            worker.kill()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that live."""
        with self._lock:
            return sorted(worker.process.pid for worker in self._live)

    def _take(self) -> _Worker:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self.path, self.memory_bytes, self.folders, self.first)
            self._live.add(worker)
            return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if worker.usable and worker in self._live:
                self._idle.append(worker)
                return
            self._live.discard(worker)
        worker.kill()


class _Worker:
    """A process and the line to it; `usable` says whether it may be called again."""

    def __init__(
        self, path: str, memory_bytes: int, folders: Sequence[str], first: tuple[Any, ...] | None = None
    ) -> None:
        self.path, self.first, self.calls, self.ready, self.usable = path, first, 0, False, False
        ours, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            # A session of its own: Ctrl-C at the terminal reaches the parent alone.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selfroute.tasks.worker", number, path, str(memory_bytes)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # What the parent can import, its workers can.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path, *folders])},
                start_new_session=True,
            )
        self.line = Connection(ours.detach())
        self._ending = threading.Lock()

    def call(self, arguments: tuple[Any, ...], limit_s: float) -> Done:
        self.start()
        return self._ask(arguments, limit_s)

    def _ask(self, arguments: tuple[Any, ...], limit_s: float) -> Done:
        self.usable = False
        self.calls += 1
        started, own = time.monotonic(), OwnTime(limit_s, PATIENCE * limit_s)

        def done(result: Any, failure: str = "") -> Done:
            return Done(result, failure, min(time.monotonic() - started, own.seconds + TICK_S))

        try:
            self.line.send_bytes(json.dumps([PATIENCE * limit_s, arguments]).encode())
            while not self.line.poll(min(limit_s, TICK_S)):
                own.look(family(self.process.pid))
                if own.over:
                    return done(None, f"undecided after {limit_s:.3g} s")
            reply = json.loads(self.line.recv_bytes())
        except (EOFError, OSError):
            return done(None, "undecided: the worker died of it")
        if "error" in reply:
            # A lack of memory or of stack may leave it in a bad state.
            return done(None, f"undecided: {reply['error']}")
        self.usable = self.calls < RECYCLE_AFTER
        return done(reply["result"])

    def start(self) -> None:
        """Wait until it has imported the function and made its first call, where it has not yet."""
        if self.ready:
            return
        try:
            if not self.line.poll(START_S):
                raise TaskError(f"a worker for {self.path} did not start within {START_S:.0f} s")
            reply = json.loads(self.line.recv_bytes())
        except (EOFError, OSError) as error:
            raise TaskError(f"a worker for {self.path} died at its start: is there memory left?") from error
        if "error" in reply:
            raise TaskError(f"a worker for {self.path} cannot start: {reply['error']}")
        if self.first is not None and (failure := self._ask(self.first, START_S).failure):
            raise TaskError(f"a worker for {self.path} cannot start: {failure}")
        self.ready = self.usable = True

    def kill(self) -> None:
        # One thread may close a pool while another gives up a worker of it: a file's number is closed once.
        with self._ending:
            self.process.kill()
            self.process.wait()
            self.line.close()
