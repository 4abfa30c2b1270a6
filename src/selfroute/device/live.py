"""The in-process engine that serves: one thread decodes the responses of many clients together.

A request's tokens are made in a thread of their own, so that a long conversation keeps nobody waiting; then it waits
for a place, joins the others between two steps, and its text comes back piece by piece. One that is closed leaves
before the next step. An error of the model fails the requests that it met, and no later ones, if the model still runs.
Left out on purpose: how rows are decoded (`batch`), and captured graphs, whose shapes are fixed.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from pydantic import Field

from selfroute.config import Config
from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.batch import Batch, Event, Row, failure
from selfroute.device.hf import HFEngine
from selfroute.device.wording import Prompt, Wording
from selfroute.errors import DeviceError
from selfroute.types import DeviceChunk, DeviceRequest

_log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Seconds that what the model is at has to end when the engine is closed."""

_CLOSED = "the device engine was closed"


class LiveConfig(Config):
    """A device model in the gateway's process."""

    model: str = "countdown-1m"
    """A shipped model, a local folder, such as RUN/checkpoints/step-000200, or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the weights in memory."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where it runs; `auto` takes the first of these that is there."""
    thinking: bool = False
    """Whether a model whose chat template can think before it answers (Qwen3, SmolLM3) does."""
    early_exit: bool = False
    """Whether the model was trained with `sampling.early_exit`: a help call that is declined goes on reasoning."""
    context: int | None = Field(None, ge=1)
    """Most tokens of a conversation and its response together; None: as many as the model takes."""
    max_streams: int = Field(32, ge=1)
    """Responses decoded together; each takes memory for its conversation."""
    max_waiting: int = Field(256, ge=0)
    """Requests that may wait for a place among them; further ones are refused."""


class LiveEngine:
    """A model and the thread that owns it; implements `types.DeviceEngine`.

    Args:
        config: its settings.
        engine: the model, where it is loaded already.

    Raises:
        DeviceError: it cannot be loaded.
    """

    Config = LiveConfig

    def __init__(self, config: LiveConfig, engine: HFEngine | None = None) -> None:
        self.config = config
        if engine is None:
            settings = config.model_dump(include={"model", "dtype", "device", "thinking"})
            engine = HFEngine.load(DeviceConfig(**settings))
        self._engine = engine
        # A tokenizer does not serve two threads.
        reads = HFEngine(engine.model, copy.deepcopy(engine.tokenizer), thinking=engine.thinking)
        context = min((n for n in (config.context, engine.context) if n is not None), default=None)
        self._wording = Wording(reads, context, merges=not config.early_exit)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="selfroute-reads")
        self._batch = Batch(self._engine, early_exit=config.early_exit)
        # Guards all below.
        self._wake = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._inboxes: dict[Row, _Inbox] = {}
        self._open = 0
        self._stopping = False
        self._broken, self._doubted = "", False
        self._thread = threading.Thread(target=self._work, name="selfroute-device", daemon=True)
        self._thread.start()

    @property
    def honours(self) -> frozenset[str]:
        """Fields of the API that it takes beside those of a request."""
        # What is drawn in the place of a declined help call comes from the model's whole distribution.
        return frozenset() if self.config.early_exit else frozenset({"top_p"})

    async def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        """The response as it comes; closing the generator stops its generation before the next token.

        Raises:
            ContextError: the conversation and `max_tokens` do not fit the model; before the first chunk.
            DeviceError: too many requests wait, or the model failed.
        """
        loop = asyncio.get_running_loop()
        top_p, sampling = _top_p(request), self._sampling(request)
        self._enter()
        row: Row | None = None
        try:
            prompt: Prompt = await loop.run_in_executor(self._reader, self._wording.read, request)
            row, inbox = Row(prompt, request.seed, request.max_tokens, sampling, top_p), _Inbox(loop)
            self._put(row, inbox)
            while True:
                event = await inbox.events.get()
                if isinstance(event, DeviceError):
                    raise event
                yield event
                if event.finish:
                    return
        finally:
            self._leave(row)

    async def ready(self) -> None:
        """Return once it can serve; after an error of the model each call tries it again.

        Raises:
            DeviceError: it was closed, or the model does not run any more.
        """
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise DeviceError(_CLOSED)
            if self._broken:
                self._doubted = True
                self._wake.notify()
                raise DeviceError(f"{self._broken} (it is tried again; restart the gateway if this lasts)")

    async def aclose(self) -> None:
        """Stop what is under way, and end the thread; one that hangs in the model is left to the process's end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        if self._thread.is_alive():
            _log.error("what the device model is at has not ended in %g s, and nobody waits for it any more", CLOSE_S)
        self._reader.shutdown(wait=False)

    def _sampling(self, request: DeviceRequest) -> Sampling:
        return Sampling(
            temperature=request.temperature,
            decide=request.decide,
            bias=request.bias,
            forbid_help=request.forbid_help,
            early_exit=self.config.early_exit,
        )

    def _enter(self) -> None:
        most = self.config.max_streams + self.config.max_waiting
        with self._wake:
            if self._stopping or not self._thread.is_alive():
                raise DeviceError(_CLOSED)
            if self._open >= most:
                raise DeviceError(f"the device is busy: {self._open} requests are under way, which is the most")
            self._open += 1

    def _put(self, row: Row, inbox: _Inbox) -> None:
        with self._wake:
            if self._stopping:
                raise DeviceError(_CLOSED)
            self._inboxes[row] = inbox
            self._waiting.append(row)
            self._wake.notify()

    def _leave(self, row: Row | None) -> None:
        with self._wake:
            self._open -= 1
            if row is None:
                return
            row.closed = True
            self._inboxes.pop(row, None)
            if row in self._waiting:
                self._waiting.remove(row)

    def _work(self) -> None:
        """The thread: steps until it is to end."""
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        finally:
            with self._wake:
                self._stopping = True
                rows = [*self._batch.clear(), *self._waiting]
                self._waiting.clear()
            self._tell((row, DeviceError(_CLOSED)) for row in rows)

    def _turn(self) -> bool:
        """One step of all rows, with those that came and without those that went; False when it is to end."""
        batch = self._batch
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or self._doubted or self._waiting or batch.rows)
            if self._stopping:
                return False
        events: list[Event] = []
        joining: list[Row] = []
        try:
            batch.drop_closed()
            joining = self._next(self.config.max_streams - len(batch.rows))
            events += batch.join(joining)
            events += batch.step()
        except Exception as error:
            _log.exception("the device model failed")
            over = {row for row, event in events if isinstance(event, DeviceError)}
            failed = [row for row in {*batch.clear(), *joining} if row not in over]
            events += [(row, failure(error)) for row in failed]
        # Outside, where no traceback holds on to memory any more.
        if self._doubted or any(isinstance(event, DeviceError) for _, event in events):
            self._try()
        self._tell(events)
        return True

    def _next(self, count: int) -> list[Row]:
        """Those that wait longest."""
        with self._wake:
            rows: list[Row] = []
            while self._waiting and len(rows) < count:
                rows.append(self._waiting.popleft())
            return rows

    def _try(self) -> None:
        """See whether the model still runs: after some errors nothing does."""
        broken = ""
        try:
            if self._engine.model.device.type == "cuda":
                torch.cuda.empty_cache()
            self._engine.generate([[self._engine.pad] * 2], [["ready"]], Sampling(max_tokens=1))
        except Exception as error:
            broken = str(failure(error))
            _log.error("the device model does not run any more: %s", broken)
        with self._wake:
            self._broken, self._doubted = broken, False

    def _tell(self, events: Iterable[Event]) -> None:
        """Give each event to its client's event loop, which is woken once for all of its own."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Inbox, DeviceChunk | DeviceError]]] = {}
        for row, event in events:
            inbox = self._inboxes.get(row)
            if inbox is not None:
                by_loop.setdefault(inbox.loop, []).append((inbox, event))
        for loop, mail in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_in, mail)
            except RuntimeError:
                # That loop ended without closing its generators.
                continue


class _Inbox:
    """Where a client waits for what comes next."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.events: asyncio.Queue[DeviceChunk | DeviceError] = asyncio.Queue()


def _put_in(mail: Sequence[tuple[_Inbox, DeviceChunk | DeviceError]]) -> None:
    for inbox, event in mail:
        inbox.events.put_nowait(event)


def _top_p(request: DeviceRequest) -> float:
    """The request's `top_p`, never 0: the likeliest token always stays."""
    value: Any = request.extra.get("top_p")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DeviceError(f"top_p is a number from 0 to 1, not {value!r:.80}")
    return max(float(value), 1e-6)
