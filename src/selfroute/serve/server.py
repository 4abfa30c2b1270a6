"""A gateway that runs: what its config names is opened, served until a signal, and closed in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from selfroute.errors import ConfigError, StoreError
from selfroute.serve import history, workers
from selfroute.serve.app import Gateway, is_ready, make_app
from selfroute.serve.budget import Budget
from selfroute.serve.config import GatewayConfig, make_device, make_serving_cloud
from selfroute.serve.connections import Connection
from selfroute.serve.database import without_password
from selfroute.serve.handoff import Pair
from selfroute.serve.keys import Keyring
from selfroute.serve.metrics import Counted, Metrics
from selfroute.serve.recorder import Recorder
from selfroute.serve.search import open_border
from selfroute.serve.sessions import Sessions
from selfroute.serve.store import Store
from selfroute.trace import wanted

if TYPE_CHECKING:
    from selfroute.serve.tracing import Tracing

HOLD_S = 3600.0
"""Longer than any call to the cloud may take, its repetitions included."""

FORGET_S = 3600.0

COME_S = 2.0
"""The longest that connections are still taken after a signal, where there is no end of them."""

SAY_S = 0.1
"""What the last ones have to send their request."""

SETTLE_S = 5.0
"""What requests that are broken off may take to tell their clients, to settle and to be recorded."""

UNREAD_S = 60
"""A client that takes nothing of its answer for so long is gone, and what it held is free for others."""

BACKLOG = 2048
"""Connections that may wait to be taken."""

CLOSING_ANSWER_S = 2.5
"""Seconds that the store has for each answer when the gateway ends."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def opened(config: GatewayConfig) -> AsyncGenerator[Gateway]:
    """The gateway of a config, with its store, its device and its cloud; they are closed in the end.

    Raises:
        ConfigError: what the config names cannot be made.
        DeviceError: the device's model cannot be loaded.
        StoreError: the store cannot be opened.
    """
    async with AsyncExitStack() as stack:
        tracing = _tracing()
        if tracing:
            stack.push_async_callback(tracing.aclose)
        store = Store(config.store)
        stack.callback(store.close)
        device = await asyncio.to_thread(make_device, config.device)
        stack.push_async_callback(device.aclose)
        border, search = await asyncio.to_thread(open_border, config.privacy)
        if search:
            stack.callback(search.close)
        cloud = make_serving_cloud(config.cloud)
        stack.push_async_callback(cloud.aclose)
        budget = Budget(store, config.budget, hold_s=HOLD_S)
        metrics = Metrics()
        recorder = Recorder(store, metrics.dropped, content=config.log_content)
        for work in (budget.run(), _forgetting(store, config.retention_days)):
            stack.push_async_callback(_ended, _begun(work))
        writing = _begun(recorder.run())
        stack.push_async_callback(lambda: writing)
        stack.callback(recorder.close)
        pair = Pair(
            tracing.device(device, config.device) if tracing else device,
            tracing.cloud(cloud, config.cloud) if tracing else cloud,
            budget,
            Counted(tracing.recorder(recorder) if tracing else recorder, metrics, cloud),
            max_tokens=config.max_tokens,
            decide=config.decide,
            idle_s=config.device_idle_s,
            log_content=config.log_content,
            border=border,
        )
        ring = Keyring(store) if config.keys else None
        sessions = Sessions(store, ring) if ring else None
        if ring and not await ring.anybody():
            _log.warning(
                "nobody can ask yet: no key in the store %s is valid (selfroute keys new NAME --store %s)",
                store.name, without_password(config.store),
            )  # fmt: skip
        around = tracing.app if tracing else None
        # First of all in the end: what is left asks it five times, one after the other, within `workers.CLOSING_S`.
        stack.callback(setattr, store, "answer_s", CLOSING_ANSWER_S)
        yield Gateway(config, pair, budget, ring, sessions, store, metrics, around=around)


def _tracing() -> Tracing | None:
    """Traces, if the environment asks for them; without their libraries the gateway serves all the same."""
    if not wanted(os.environ):
        return None
    try:
        from selfroute.serve.tracing import Tracing, exporting
    except ModuleNotFoundError as error:
        _log.error(
            "no traces: OTEL_* variables ask for them, and %s is missing: pip install 'selfroute[otel]'", error.name
        )
        return None
    return Tracing(exporting())


def _begun(work: Coroutine[None, None, None]) -> asyncio.Task[None]:
    """A task that runs as long as the gateway does; one that fails says so, when it does."""
    task = asyncio.create_task(work)
    task.add_done_callback(_told)
    return task


def _told(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.critical("a part of the gateway has ended: restart it", exc_info=error)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _forgetting(store: Store, days: float) -> None:
    """Delete what is too old, now and every hour."""
    while True:
        try:
            await history.forget(store, days * 86_400)
        except StoreError as error:
            _log.error("old requests are still there: %s", error)
        await asyncio.sleep(FORGET_S)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Nothing: uvicorn would raise the signal again at its end, before what is open is closed."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take one connection a turn of the loop, so that what waits is left for workers that have less to do."""
        # For asyncio, the number that may wait is the number that is taken in a turn, too.
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve first whoever has come: the system cuts off who waits, and uvicorn who has said nothing yet."""
        waiting = select.poll()
        for listener in sockets or ():
            waiting.register(listener, select.POLLIN)
        by = time.monotonic() + COME_S
        while waiting.poll(0) and time.monotonic() < by:
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        await asyncio.sleep(SAY_S)
        await super().shutdown(sockets)
        # It cancels what is left after `drain_s` (the second time, nothing) and waits for none of it.
        if left := set(self.server_state.tasks):
            for task in left if self.force_exit else ():
                task.cancel()
            await asyncio.wait(left, timeout=SETTLE_S)

    def stop(self) -> None:
        """Take nobody new, and end when the others have; the second time, at once."""
        self.force_exit, self.should_exit = self.should_exit, True


def run(config: GatewayConfig, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests under way then have `drain_s` to end. `ready` is told the base URL.

    Raises:
        ConfigError: the address cannot be listened on; and as from `opened`.
    """
    with listening(config.host, config.port) as listener:
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        work = serve if config.workers == 1 else workers.run
        work(config, listener, lambda: ready(url))


def serve(config: GatewayConfig, listener: socket.socket, ready: Callable[[], None], parent: int | None = None) -> None:
    """Serve in this process, on a socket, until SIGINT or SIGTERM, or until the pipe `parent` ends.

    Raises:
        ConfigError, DeviceError, StoreError: as from `opened`.
    """
    asgi = uvicorn.Config("", loop="auto", log_config=None)
    with asyncio.Runner(loop_factory=asgi.get_loop_factory()) as runner:
        runner.run(_serve(config, listener, ready, parent))


async def _serve(config: GatewayConfig, listener: socket.socket, ready: Callable[[], None], parent: int | None) -> None:
    async with opened(config) as gateway:
        await is_ready(gateway.pair.device)
        server = _Server(
            uvicorn.Config(
                make_app(gateway),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(config.drain_s),
                backlog=1,
                http=partial(Connection, refused=gateway.metrics.refuse),  # type: ignore[arg-type]
            )
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        if parent is not None:
            loop.add_reader(parent, _orphaned, server, parent)
        # What is there now stays: the collector need not go through it again and again, milliseconds at a time.
        gc.collect()
        gc.freeze()
        ready()
        await server.serve(sockets=[listener])


def _orphaned(server: _Server, parent: int) -> None:
    _log.error("the parent is gone: this worker drains and ends")
    asyncio.get_running_loop().remove_reader(parent)
    server.stop()


@contextmanager
def listening(host: str, port: int) -> Generator[socket.socket]:
    """A socket that listens.

    Raises:
        ConfigError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        # The address stands there once more.
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise ConfigError(
            f"cannot listen on {host} port {port}: {why} (others: host=ADDRESS, port=NUMBER; port=0 takes a free one)"
        ) from error
    with listener:
        # Else an answer's second packet waits for the client's delayed acknowledgement, 40 ms. Connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Of Linux alone.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
        yield listener
