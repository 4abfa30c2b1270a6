"""One HTTP request to the cloud and its answer: what each wait may take, what a failure means, what it costs."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.cloud.spending import Spending
from selfroute.cloud.transport import BrokenError, Incoming, Transport
from selfroute.cloud.wire import EVENT, Event, Reply, message_of, parse_retry_after
from selfroute.errors import CloudError
from selfroute.types import Bill

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 2**20
"""An answer longer than this is a fault."""

DRAIN_S = 0.05
"""Seconds for a body to end after its last event."""

MAX_RETRY_AFTER_S = 120.0
"""A provider that asks to be left alone for longer is an error at once."""


@dataclass(frozen=True, slots=True)
class Line:
    """What the requests to one endpoint share."""

    config: OpenAIConfig
    key: str
    http: Transport
    spending: Spending


class TransientError(CloudError):
    """A failure that another attempt may mend: `retry_after_s` is what the provider asks to wait, `down` that it is
    a failure of the provider, not its asking for patience."""

    def __init__(
        self, text: str, retry_after_s: float | None = None, *, status: int | None = None, down: bool = True
    ) -> None:
        super().__init__(text, status=status, retry_after_s=retry_after_s)
        self.down = down


class UnreadableError(TransientError):
    """An answer came, and is none."""

    def __init__(self, text: str) -> None:
        super().__init__(text, down=False)


class Exchange:
    """One HTTP request and its answer, each piece waited for no longer than it may take.

    Args:
        line: where to.
        body: the request's JSON.
        worst_usd: the most that it may cost; held back while it is under way.
        bill: what it costs is added to this when it has ended.
    """

    def __init__(self, line: Line, body: Mapping[str, Any], worst_usd: float, bill: Bill | None = None) -> None:
        self._line = line
        self._body = json.dumps(body).encode()
        self._response: Incoming | None = None
        self._deadline = self._first_byte_by = 0.0
        self._started, self._size = False, 0
        self._patience_s = line.config.first_byte_timeout_s if body.get("stream") else line.config.whole_timeout_s
        self.events = self._events()
        self._worst_usd, self._bill = worst_usd, bill
        self._held = self._taken_on = False
        self.cost_usd = 0.0
        """What it costs, as far as is known: the worst, nothing where it was not sent or the provider did not take it
        on, or its bill."""
        self.billed = False

    async def __aenter__(self) -> Exchange:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Send the request and read the status.

        Raises:
            CloudError: it is not 200, or none came.
        """
        line, c = self._line, self._line.config
        await line.spending.reserve(self._worst_usd)
        self._held = True
        now = time.monotonic()
        self._deadline, self._first_byte_by = now + c.total_timeout_s, now + self._patience_s
        sending = line.http.send("POST", f"{c.base_url}/chat/completions", self._body, self._sent)
        self._response = await self._wait(sending)
        if not self._taken_on:
            # Whoever answers has had the body, whatever the transport says of it.
            self._sent()
        status = self._response.status
        if status != 200:
            # A gateway's time-out or its bad upstream may come after the model has run.
            if (status < 500 and status != 408) or status == 503:
                self.cost_usd, self._taken_on = 0.0, False
            said = b""
            while len(said) <= 4096 and (piece := await self.piece()):
                said += piece
            raise refusal(c, line.key, status, said, self._response.header("Retry-After"))

    def _sent(self) -> None:
        self.cost_usd, self._taken_on = self._worst_usd, True

    def bill(self, cost_usd: float) -> None:
        """The whole answer came, and this is what it costs."""
        self.cost_usd, self.billed = cost_usd, True

    async def close(self) -> None:
        """Let go of the connection, which cancels an answer that is still coming, and settle the bill."""
        if self._held:
            self._held = False
            if self._bill:
                self._bill.usd += self.cost_usd
                self._bill.called |= self._taken_on
            await self._line.spending.settle(self._worst_usd, self.cost_usd, abandoned=not self.billed)
        await self.events.aclose()
        if self._response is not None:
            self._response.close()

    async def whole(self) -> Reply:
        """An answer that is no stream.

        Raises:
            CloudError: as from `piece`, it is an error, or cannot be read.
        """
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return self._read(b"".join(pieces))

    async def piece(self) -> bytes:
        """All of the body that has come since the last piece; empty at its end.

        Raises:
            CloudError: it stalls, breaks off, or is too long.
        """
        assert self._response is not None
        if self._response.ended:
            return b""
        # A time-out costs more than reading what is there.
        piece = self._response.at_hand() or await self._wait(self._response.piece())
        self._started = True
        self._size += len(piece)
        if self._size > MAX_BODY_BYTES:
            raise CloudError(f"{self._line.config.where} sent more than {MAX_BODY_BYTES // 2**20} MiB in one answer")
        return piece

    async def _events(self) -> AsyncGenerator[list[Event]]:
        """The stream's events, those that came together in one list. Comments keep it alive and are no events; an end
        without `[DONE]` is one too.

        Raises:
            CloudError: as from `piece`, or the provider sends an error in the stream.
        """
        rest = b""
        while piece := await self.piece():
            *lines, rest = (rest + piece).split(b"\n")
            events, done, failed = [], False, None
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if done := data == b"[DONE]":
                    break
                try:
                    events.append(self._event(data))
                except CloudError as error:
                    failed = error
                    break
            # What came before a failure is there all the same.
            if events:
                yield events
            if failed:
                raise failed
            if done:
                await self._drain()
                return
        if rest.startswith(b"data:") and (data := rest.removeprefix(b"data:").strip()) != b"[DONE]":
            yield [self._event(data)]

    async def _drain(self) -> None:
        """Read the end of the body, which comes at once: only then can the connection be used again."""
        assert self._response is not None
        with suppress(TimeoutError, BrokenError):
            async with asyncio.timeout(DRAIN_S):
                while await self._response.piece():
                    pass

    def _read(self, data: bytes) -> Reply:
        reply = self._valid(Reply.model_validate_json, data)
        self._check(reply.error, data)
        return reply

    def _event(self, data: bytes) -> Event:
        event = self._valid(EVENT.validate_json, data)
        self._check(event.get("error"), data)
        return event

    def _valid(self, read: Callable[[bytes], T], data: bytes) -> T:
        try:
            return read(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise UnreadableError(f"the cloud's answer cannot be read: {first['msg']}") from None

    def _check(self, error: Any, data: bytes) -> None:
        if error is not None:
            code = error.get("code") if isinstance(error, dict) else None
            raise refusal(self._line.config, self._line.key, code if isinstance(code, int) else 500, data)

    async def _wait(self, what: Awaitable[T]) -> T:
        c, where = self._line.config, self._line.config.where
        now = time.monotonic()
        by, name, allowed_s = self._first_byte_by, "for the first byte", self._patience_s
        if self._started:
            by, name, allowed_s = now + c.idle_timeout_s, "between two pieces", c.idle_timeout_s
        if self._deadline < by:
            by, name, allowed_s = self._deadline, "in all", c.total_timeout_s
        try:
            async with asyncio.timeout(max(0.0, by - now)):
                return await what
        except TimeoutError:
            raise TransientError(f"{where} took longer than {allowed_s:g} s {name}") from None
        except BrokenError as error:
            if error.slow:
                raise TransientError(f"{where} took longer than {c.connect_timeout_s:g} s to connect") from None
            raise TransientError(f"{where} cannot be reached: {error}") from error


def refusal(config: OpenAIConfig, key: str, status: int, body: bytes, retry_after: str | None = None) -> CloudError:
    """What a status other than 200 means, and the way out; some send it in the body of a 200. Never holds the key."""
    # Some providers repeat it.
    said = message_of(body.replace(key.encode(), b"***") if key else body)
    where = config.where
    if status in (401, 403):
        used = (
            f"the key in ${config.api_key_var}" if config.api_key_var else "a request without a key (set api_key_var)"
        )
        return CloudError(f"{where} refuses {used} ({status}): {said}", status=status)
    if status == 404:
        asked = f"{config.base_url}/chat/completions was asked"
        # Some have more behind the version: /v1beta/openai.
        if not re.search(r"/v\d[^/]*(/|$)", config.base_url):
            asked += "; a base_url usually ends in /v1"
        return CloudError(
            f"{where} knows no model {config.model!r}, or no such path (404): {said} ({asked})", status=status
        )
    if status in (408, 409, 425, 429) or status >= 500:
        wait_s = parse_retry_after(retry_after)
        if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
            said = f"{where} asks to wait for {wait_s:.0f} s ({status}): {said}"
            return CloudError(said, status=status, retry_after_s=wait_s)
        return TransientError(f"{where} answers {status}: {said}", wait_s, status=status, down=status >= 500)
    return CloudError(f"{where} rejects the request ({status}): {said}", status=status, said=said)
