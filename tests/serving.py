"""Devices, clouds and accounts for tests of the gateway; each implements a protocol that serving asks for."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from selfroute.config import Config
from selfroute.errors import CloudError, DeviceError, StoreError
from selfroute.protocol import HELP_CALL
from selfroute.serve.account import DAY_S, Account, Denied, Limits, Scope, nano
from selfroute.serve.connections import Connection
from selfroute.serve.history import RequestRecord
from selfroute.serve.metrics import Metrics
from selfroute.serve.server import listening
from selfroute.types import (
    POLICIES,
    Bill,
    CloudAnswer,
    CloudChunk,
    CloudClient,
    CloudRequest,
    DeviceChunk,
    DeviceRequest,
)

Step = str | DeviceChunk | Exception | None
"""Text, a whole chunk, a failure, or None: nothing more, for as long as anybody waits."""


def said(*texts: str, finish: Any = "stop", score: float | None = 1.5) -> list[Step]:
    """A response in pieces, and its end."""
    return [*texts, DeviceChunk(finish=finish, score=score, prompt_tokens=10, completion_tokens=len(texts))]


class ScriptedDevice:
    """Answers each request with the next script, and the last one again; implements `types.DeviceEngine`."""

    honours = frozenset({"top_p"})

    def __init__(self, *scripts: Sequence[Step], pause_s: float = 0.0) -> None:
        self.scripts, self.pause_s = list(scripts), pause_s
        self.requests: list[DeviceRequest] = []
        self.stopped = self.open = 0
        self.waiting = asyncio.Event()
        self.failure: Exception | None = None

    async def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        self.requests.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        ended = False
        self.open += 1
        try:
            for step in script:
                await asyncio.sleep(self.pause_s)
                if step is None:
                    self.waiting.set()
                    await asyncio.Event().wait()
                if isinstance(step, Exception):
                    raise step
                chunk = step if isinstance(step, DeviceChunk) else DeviceChunk(text=str(step))
                ended = bool(chunk.finish)
                yield chunk
        finally:
            self.open -= 1
            self.stopped += not ended

    async def ready(self) -> None:
        if self.failure:
            raise self.failure

    async def aclose(self) -> None:
        """Nothing is held open."""


class ScriptedCloud:
    """Answers in the pieces of its script at a price; implements the part of `types.CloudClient` that serving uses."""

    identity: Mapping[str, Any] = {}
    concurrency = 8

    def __init__(
        self, *script: str | CloudChunk | Exception | None, usd: float = 0.002, worst_usd: float = 0.01
    ) -> None:
        self.script, self.usd, self._worst_usd = script, usd, worst_usd
        self.requests: list[CloudRequest] = []
        self.waiting = asyncio.Event()
        self.cancelled = 0
        self.final = CloudAnswer("", "", True, 20, 5, usd, 0.1)
        """How it ends, but for the text."""

    def carry(self, spent_usd: float) -> None:
        """It has no limit."""

    def abandoned_usd(self) -> float:
        return 0.0

    def worst_usd(self, request: CloudRequest) -> float:
        return self._worst_usd

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        raise NotImplementedError

    async def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        self.requests.append(request)
        assert bill is not None
        begun = ended = False
        try:
            for step in self.script:
                await asyncio.sleep(0)
                if step is None:
                    begun = True
                    self.waiting.set()
                    await asyncio.Event().wait()
                if isinstance(step, Exception):
                    raise step
                chunk = step if isinstance(step, CloudChunk) else CloudChunk(text=str(step))
                begun = True
                yield chunk
            ended = True
            bill.usd += self.usd
            text = "".join(s for s in self.script if isinstance(s, str))
            yield CloudChunk(final=replace(self.final, text=text), finish_reason="stop")
        finally:
            if begun and not ended:
                self.cancelled += 1
                bill.usd += self._worst_usd

    async def aclose(self) -> None:
        """Nothing is held open."""


@dataclass
class MemoryBudget:
    """`budget.Budget` in one process, by the same arithmetic."""

    limits: Limits = field(default_factory=Limits)
    gateway: Account = field(default_factory=Account)
    under_way: dict[int, float] = field(default_factory=dict)
    settled: list[float] = field(default_factory=list)
    released: int = 0
    down: bool = False

    async def arrive(self, key: Scope | None = None) -> Denied | None:
        now, scope = self._now(), Scope("gateway", self.limits)
        refused = self.gateway.refuses_request(scope, now)
        if not refused:
            self.gateway = self.gateway.arrive(now, 1)
        return refused

    async def reserve(self, worst_usd: float, key: Scope | None = None) -> Any:
        if self.down:
            raise StoreError("the store is down")
        now = self._now()
        refused = self.gateway.refuses_call(Scope("gateway", self.limits), now, nano(worst_usd))
        if refused:
            return refused
        self.gateway = self.gateway.hold(now, nano(worst_usd))
        number = len(self.settled) + self.released + len(self.under_way) + 1
        self.under_way[number] = worst_usd
        return number

    def settle_later(self, reservation: Any, cost_usd: float | None) -> None:
        self._close(reservation, cost_usd or 0.0)
        if cost_usd is None:
            self.gateway = self.gateway.take_back(self._now())
            self.released += 1
        else:
            self.settled.append(cost_usd)

    def _close(self, reservation: Any, cost_usd: float) -> None:
        worst = self.under_way.pop(reservation)
        self.gateway = self.gateway.pay(self.gateway.day, nano(worst), nano(cost_usd))

    def _now(self) -> float:
        now = time.time()
        self.gateway = self.gateway.on(int(now // DAY_S), self.limits.window_s, now)
        return now


@dataclass
class MemoryRecorder:
    """`recorder.Recorder` into a list."""

    records: list[RequestRecord] = field(default_factory=list)

    def record(self, record: RequestRecord) -> None:
        self.records.append(record)


@dataclass
class ScriptedFinder:
    """Finds one text, as EMAIL, and the rules whose names stand in a text; implements `border.Finder`."""

    text: str
    blocked: str = ""
    failure: Exception | None = None
    slow: bool = False
    asked: list[tuple[list[str], bool]] = field(default_factory=list)

    async def find(self, texts: Sequence[str], redact: bool) -> Mapping[str, Any]:
        self.asked.append((list(texts), redact))
        if self.failure:
            raise self.failure
        if self.slow:
            await asyncio.Event().wait()
        if self.blocked and any(self.blocked in text for text in texts):
            return {"blocked": self.blocked, "spans": []}
        found = [re.finditer(re.escape(self.text), text) if redact else () for text in texts]
        return {"blocked": "", "spans": [[(*m.span(), "EMAIL") for m in matches] for matches in found]}


DOWN = DeviceError("the engine is down")
UNREACHABLE = CloudError("the cloud cannot be reached")


@dataclass(frozen=True)
class FakeKey:
    """A key that may do what it says."""

    policies: frozenset[str] = frozenset(POLICIES)
    models: frozenset[str] | None = None
    scope: Scope = field(default_factory=lambda: Scope("key:k1", Limits()))
    admin: bool = False


@dataclass
class FakeKeys:
    """`keys.Keyring` from a table of headers."""

    keys: Mapping[str, FakeKey]
    down: bool = False

    async def check(self, authorization: str | None) -> FakeKey | None:
        if self.down:
            raise StoreError("the store is down")
        return self.keys.get(authorization or "")


@contextmanager
def serving(app: ASGIApp, *clouds: CloudClient) -> Iterator[str]:
    """An application on a free port of loopback, in a thread of its own; its URL. Its clouds are closed in the end."""
    http: Any = partial(Connection, refused=Metrics().refuse)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="warning", timeout_graceful_shutdown=5))
    with listening("127.0.0.1", 0) as listener:

        async def serve() -> None:
            await server.serve(sockets=[listener])
            for cloud in clouds:
                await cloud.aclose()

        def run() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def command(*args: object, **settings: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`selfroute serve` with these arguments, once it serves; the process and its URL. It is killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "selfroute", "serve", "port=0", *map(str, args)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http" in line, process.communicate(timeout=20)
        yield process, next(word for word in line.split() if word.startswith("http"))
    finally:
        process.kill()
        process.communicate()


class NamedConfig(Config):
    """What the device does."""

    pause_s: float = 0.0
    """Seconds before each piece."""
    asks: bool = False
    """Whether it asks the cloud, while it may."""
    broken_by: str = ""
    """A file; while it is there, no device can be made."""
    tells_pid: bool = False
    """Whether its answer is the number of its process."""


class NamedDevice(ScriptedDevice):
    """A device that a config names by its dotted path."""

    Config = NamedConfig

    def __init__(self, config: NamedConfig) -> None:
        if config.broken_by and os.path.exists(config.broken_by):
            raise DeviceError("the device is broken")
        answer = str(os.getpid()) if config.tells_pid else "5"
        super().__init__(said("2+3=5", "<answer>", answer, "</answer>"), pause_s=config.pause_s)
        self._asks = config.asks

    async def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        if self._asks and not request.forbid_help:
            self.scripts = [said("2+3=6", HELP_CALL), *self.scripts[-1:]]
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk
