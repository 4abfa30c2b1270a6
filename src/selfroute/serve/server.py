"""A gateway that runs: what its config names is opened, served until a signal, and closed in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import uvicorn

from selfroute.errors import ConfigError, StoreError
from selfroute.serve import history
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.budget import Budget
from selfroute.serve.config import GatewayConfig, make_device, make_serving_cloud
from selfroute.serve.handoff import Pair
from selfroute.serve.keys import Keyring
from selfroute.serve.recorder import Recorder
from selfroute.serve.store import Store

HOLD_S = 3600.0
"""Longer than any call to the cloud may take, its repetitions included."""

FORGET_S = 3600.0

_log = logging.getLogger(__name__)


class Dropped:
    """Counts records that the store never got."""

    def __init__(self) -> None:
        self.count = 0.0

    def inc(self, amount: float = 1) -> None:
        """Count so many more."""
        self.count += amount


@asynccontextmanager
async def opened(config: GatewayConfig) -> AsyncGenerator[Gateway]:
    """The gateway of a config, with its store, its device and its cloud; they are closed in the end.

    Raises:
        ConfigError: what the config names cannot be made.
        DeviceError: the device's model cannot be loaded.
        StoreError: the store cannot be opened.
    """
    async with AsyncExitStack() as stack:
        store = Store(config.store)
        stack.callback(store.close)
        device = await asyncio.to_thread(make_device, config.device)
        stack.push_async_callback(device.aclose)
        cloud = make_serving_cloud(config.cloud)
        stack.push_async_callback(cloud.aclose)
        budget = Budget(store, config.budget, hold_s=HOLD_S)
        recorder = Recorder(store, Dropped(), content=config.log_content)
        for work in (budget.run(), _forgetting(store, config.retention_days)):
            stack.push_async_callback(_ended, asyncio.create_task(work))
        writing = asyncio.create_task(recorder.run())
        stack.push_async_callback(lambda: writing)
        stack.callback(recorder.close)
        pair = Pair(
            device,
            cloud,
            budget,
            recorder,
            max_tokens=config.max_tokens,
            decide=config.decide,
            idle_s=config.device_idle_s,
            log_content=config.log_content,
        )
        yield Gateway(config, pair, budget, Keyring(store) if config.keys else None)


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

    def stop(self) -> None:
        """Take nobody new, and end when the others have; the second time, at once."""
        self.force_exit, self.should_exit = self.should_exit, True


def run(config: GatewayConfig, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests under way then have `drain_s` to end. `ready` is told the base URL.

    Raises:
        ConfigError: the address cannot be listened on; and as from `opened`.
    """
    asgi = uvicorn.Config("", loop="auto")
    with asyncio.Runner(loop_factory=asgi.get_loop_factory()) as runner:
        runner.run(_serve(config, ready))


async def _serve(config: GatewayConfig, ready: Callable[[str], None]) -> None:
    with listening(config.host, config.port) as listener:
        async with opened(config) as gateway:
            server = _Server(
                uvicorn.Config(
                    make_app(gateway),
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=round(config.drain_s),
                )
            )
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, server.stop)
            host = f"[{config.host}]" if ":" in config.host else config.host
            # What is there now stays: the collector need not go through it again and again, milliseconds at a time.
            gc.collect()
            gc.freeze()
            ready(f"http://{host}:{listener.getsockname()[1]}/v1")
            await server.serve(sockets=[listener])


@contextmanager
def listening(host: str, port: int) -> Generator[socket.socket]:
    """A socket that listens.

    Raises:
        ConfigError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error} (host=, port=)") from error
    with listener:
        # Else an answer's second packet waits for the client's delayed acknowledgement, 40 ms. Connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener
