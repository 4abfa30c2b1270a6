"""Several workers of one gateway on one machine, and the parent that keeps them.

The parent holds the socket that is listened on, and serves nobody itself. A worker (`worker`) is a process of its own
that takes connections from that socket; budgets, keys and records they share through the store. Its standard input is a
pipe that the parent never closes: when the parent is gone, however it died, the worker sees the pipe's end and drains.
Left out on purpose: reloading, for which replicas are restarted one after the other (docs/deploy.md).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from selfroute.errors import ConfigError
from selfroute.serve.config import GatewayConfig

BACK_OFF_S = 0.1
"""Wait before a worker that died at once is replaced; twice as long after each further one that does."""

MAX_BACK_OFF_S = 30.0

LIVED_S = 10.0
"""A worker that served for so long died of something else than its start."""

CLOSING_S = 15.0
"""What a worker may take beyond `drain_s`, to write its last records; then it is killed."""

METRICS_VAR = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client looks for the folder in which workers add up their metrics, when it is imported."""

_log = logging.getLogger(__name__)


def run(config: GatewayConfig, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Keep `config.workers` workers on a socket until SIGINT or SIGTERM; they then have `drain_s`, or until the second.

    `ready` is called once all of them serve.

    Raises:
        ConfigError: a worker cannot start while no other serves.
    """
    # Metrics of workers that are gone count on, and those of an earlier gateway must not.
    with tempfile.TemporaryDirectory(prefix="selfroute-metrics-", ignore_cleanup_errors=True) as metrics:
        asyncio.run(_Parent(config, listener, ready, Path(metrics)).run())


class _Parent:
    def __init__(
        self, config: GatewayConfig, listener: socket.socket, ready: Callable[[], None], metrics: Path
    ) -> None:
        self._config, self._listener, self._ready, self._metrics = config, listener, ready, metrics
        self._processes: set[Process] = set()
        self._serving: set[int] = set()
        self._told = False
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.workers):
                    group.create_task(self._keep())
        except* ConfigError as errors:
            raise errors.exceptions[0] from None

    def _stop(self) -> None:
        self._stopping.set()
        # Else the system would take connections that nobody serves any more.
        self._listener.close()
        for process in self._processes:
            _signal(process, signal.SIGTERM)

    async def _keep(self) -> None:
        """One worker, and another in its place each time that it dies."""
        wait_s = BACK_OFF_S
        while not self._stopping.is_set():
            async with self._worker() as process:
                cause = await self._begin(process)
                began = time.monotonic()
                status = await process.wait()
            if self._stopping.is_set():
                return
            if cause and not self._serving:
                raise ConfigError(f"no worker can be started: {cause}")
            wait_s = BACK_OFF_S if time.monotonic() - began > LIVED_S else min(2 * wait_s, MAX_BACK_OFF_S)
            _log.error(
                "worker %d ended (%s) and is replaced in %.1f s", process.pid, cause or _in_words(status), wait_s
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)

    @asynccontextmanager
    async def _worker(self) -> AsyncGenerator[Process]:
        """A worker; one that still runs in the end is told to drain, and killed if it does not."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "selfroute.serve.worker", str(self._listener.fileno())),
            stdin=PIPE,
            stdout=PIPE,
            pass_fds=(self._listener.fileno(),),
            # A terminal's Ctrl-C is for the parent, which passes it on once.
            process_group=0,
            env={**os.environ, METRICS_VAR: str(self._metrics)},
        )
        self._processes.add(process)
        try:
            if self._stopping.is_set():
                _signal(process, signal.SIGTERM)
            yield process
        finally:
            _signal(process, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), self._config.drain_s + CLOSING_S)
            except TimeoutError:
                _log.error("worker %d does not end, and is killed", process.pid)
                _signal(process, signal.SIGKILL)
                await process.wait()
            self._processes.discard(process)
            self._serving.discard(process.pid)
            # As prometheus_client has it for a worker that is gone: what it has at this moment it has no more.
            for gauge in self._metrics.glob(f"gauge_live*_{process.pid}.db"):
                gauge.unlink(missing_ok=True)

    async def _begin(self, process: Process) -> str:
        """Tell a worker what to serve, and wait until it does; what kept it from that, or ""."""
        assert process.stdin is not None
        assert process.stdout is not None
        told = {"config": self._config.model_dump(mode="json"), "path": sys.path}
        with suppress(ConnectionError):
            process.stdin.write(json.dumps(told).encode() + b"\n")
            await process.stdin.drain()
        said = await process.stdout.readline()
        if not said:
            return _in_words(await process.wait())
        if cause := json.loads(said)["error"]:
            return str(cause)
        self._serving.add(process.pid)
        if not self._told and len(self._serving) == self._config.workers:
            self._told = True
            self._ready()
        return ""


def _signal(process: Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(number)


def _in_words(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}; its own messages are above"
