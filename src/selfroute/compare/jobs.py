"""Parts of a comparison side by side, each in a process of its own.

A small model on a CPU gains little from a second thread and much from a second process. The parent starts
`python -m selfroute.compare.worker` for each part, at most `jobs` at a time; a worker reads its part from its standard
input as one line of JSON, and writes progress, or why it stopped, to its standard output, a line of JSON each. The end
of its input tells it that the parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from selfroute import errors
from selfroute.train.progress import stop_signals
from selfroute.types import Progress


def run_parts(parts: Sequence[Mapping[str, Any]], *, jobs: int, threads: int, progress: Progress) -> None:
    """Run each part in a worker with `threads` threads, at most `jobs` workers at a time, in order.

    The first part that fails stops the others after what they are at, as Ctrl-C does.

    Raises:
        SelfrouteError: as the worker raised it.
        KeyboardInterrupt: SIGINT or SIGTERM came; every worker has ended.
    """
    workers = _Workers(threads, progress)
    with stop_signals() as stop, ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(workers.run, part) for part in parts}
        failure: BaseException | None = None
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                failure = failure or next((e for future in done if (e := future.exception())), None)
                if stop.is_set() or failure:
                    workers.stop(signal.SIGINT)
        except KeyboardInterrupt:
            # The second signal.
            workers.stop(signal.SIGKILL)
            raise
    if failure:
        raise failure
    if stop.is_set():
        raise KeyboardInterrupt


class _Workers:
    """The processes at work."""

    def __init__(self, threads: int, progress: Progress) -> None:
        # What the parent can import, a user's own cloud too, its workers can.
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        self._progress = progress
        self._lock = threading.Lock()
        # Another one, since a terminal that is held up must not hold up Ctrl-C.
        self._progress_lock = threading.Lock()
        self._sent: signal.Signals | None = None
        self._live: set[subprocess.Popen[str]] = set()

    def run(self, part: Mapping[str, Any]) -> None:
        """One part, to its end; nothing once the workers were stopped."""
        with self._lock:
            if self._sent:
                return
            # A session of its own: Ctrl-C at the terminal reaches the parent alone, which passes it on once.
            worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "selfroute.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,
            )
            self._live.add(worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        failure: errors.SelfrouteError | None = None
        with worker:
            try:
                worker.stdin.write(json.dumps(part) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:
                # A worker that ended at once does not read; its exit status is the news.
                with suppress(BrokenPipeError):
                    worker.stdin.close()
            for line in worker.stdout:
                message = json.loads(line)
                if "error" in message:
                    failure = getattr(errors, message["error"])(message["text"])
                else:
                    with self._progress_lock:
                        self._progress(*message["progress"])
        with self._lock:
            self._live.remove(worker)
            stopped = self._sent
        if failure:
            raise failure
        if worker.returncode and not stopped:
            raise errors.RunError(f"a worker of the comparison ended with {worker.returncode}: see above")

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to every worker, each kind once, and start no more."""
        with self._lock:
            if self._sent == number:
                return
            self._sent = number
            for worker in self._live:
                worker.send_signal(number)
