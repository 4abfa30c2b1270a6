"""One answer over HTTP, streamed or whole: the story runs in a task of its own, which ends when the client goes away.

A stream's headers go out with its first event, so that what fails before it has a status of its own; after
`KEEP_ALIVE_S` without one they go out all the same, and comments keep the connection alive.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from selfroute.serve.events import Course, Event, Tell, Turn
from selfroute.serve.refusal import RefusedError, shutting_down

KEEP_ALIVE_S = 15.0


def _json(value: Any) -> bytes:
    """JSON, in which no number is infinite: an engine's score may be."""
    return to_json(value, inf_nan_mode="null")


class Writer(Protocol):
    """How an API says the events of an answer."""

    def events(self, event: Event) -> list[Mapping[str, Any]]:
        """The stream's events for one of the story's."""
        ...

    def failure(self, refusal: RefusedError) -> list[Mapping[str, Any]]:
        """The stream's last events where the story broke off."""
        ...

    def whole(self) -> Mapping[str, Any]:
        """The answer in one, after all events."""
        ...

    @property
    def last(self) -> bytes:
        """What ends a stream that is complete."""
        ...

    @property
    def named(self) -> bool:
        """Whether the stream's events carry their `type` as a name."""
        ...


class Telling:
    """An ASGI application that tells a story.

    Args:
        story: runs it; what it tells goes to the client.
        writer: the API's form of it.
        course: what becomes of the request, for the headers.
        stream: piece by piece, or whole.
        headers: more of them.
    """

    def __init__(
        self,
        story: Callable[[Tell], Awaitable[None]],
        writer: Writer,
        course: Course,
        *,
        stream: bool,
        headers: Mapping[str, str],
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        self._story, self._writer, self._course, self._stream = story, writer, course, stream
        self._own, self._keep_alive_s = dict(headers), keep_alive_s
        self._turns: list[Event] = []
        self._begun = self._whole = False
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client goes away first, or the server ends: then with an error, if there is no answer."""
        work = asyncio.create_task(self._answer(send))
        ending = None
        try:
            await self._watch(work, receive, send)
        except asyncio.CancelledError:
            ending = shutting_down()
            self._course.status, self._course.error = ending.status, ending.code
        finally:
            if not work.done():
                work.cancel()
                # Stopping the device and settling take their time, and are waited for even by a server that shuts down.
                await asyncio.shield(asyncio.wait({work}))
        if not work.cancelled():
            work.result()
        elif ending and not self._whole:
            await self._fail(send, ending)

    async def _answer(self, send: Send) -> None:
        try:
            await self._story(lambda event: self._tell(event, send))
        except RefusedError as refusal:
            await self._fail(send, refusal)
            return
        self._whole = True
        if self._stream:
            await self._write(send, [], self._writer.last, more=False)
        else:
            body = _json(self._writer.whole())
            await self._start(send, "application/json", {**self._report(), "content-length": str(len(body))})
            await send({"type": "http.response.body", "body": body})

    async def _fail(self, send: Send, refusal: RefusedError) -> None:
        """An error with its status, or, where a stream has begun, as its last event."""
        if self._begun:
            await self._write(send, self._writer.failure(refusal), more=False)
        else:
            await refuse(send, refusal, self._own)

    async def _tell(self, event: Event, send: Send) -> None:
        if not self._stream:
            self._writer.events(event)
        elif isinstance(event, Turn) and not self._begun:
            # Nothing was said yet, and it may still become an error with a status.
            self._turns.append(event)
        else:
            turns, self._turns = self._turns, []
            await self._write(send, [e for t in (*turns, event) for e in self._writer.events(t)])

    async def _watch(self, work: asyncio.Task[None], receive: Receive, send: Send) -> None:
        """Until the answer is told or the client is gone; keeps a silent stream alive."""
        message = asyncio.ensure_future(receive())
        pause_s = self._keep_alive_s if self._stream else None
        try:
            while not work.done():
                done, _ = await asyncio.wait({work, message}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                if message in done:
                    if message.exception() or message.result()["type"] == "http.disconnect":
                        return
                    message = asyncio.ensure_future(receive())
                elif not done and time.monotonic() - self._sent_at >= self._keep_alive_s:
                    # Where the answer has ended meanwhile, the server takes no more.
                    with suppress(Exception):
                        await self._write(send, [], b": keep-alive\n\n")
        finally:
            message.cancel()

    async def _write(
        self, send: Send, events: list[Mapping[str, Any]], after: bytes = b"", *, more: bool = True
    ) -> None:
        self._sent_at = time.monotonic()
        if not self._begun:
            self._begun = True
            # nginx would gather events before it sends them on.
            await self._start(send, "text/event-stream; charset=utf-8", {**self._known(), "x-accel-buffering": "no"})
        # JSON holds no line break, so that no text of a model or a client can make an event of its own.
        named = self._writer.named
        body = b"".join(
            (b"event: " + e["type"].encode() + b"\n" if named else b"") + b"data: " + _json(e) + b"\n\n" for e in events
        )
        await send({"type": "http.response.body", "body": body + after, "more_body": more})

    async def _start(self, send: Send, content_type: str, report: Mapping[str, str]) -> None:
        own = {**self._own, **report, "content-type": content_type, "cache-control": "no-store"}
        raw = [(name.encode(), value.encode()) for name, value in own.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    def _known(self) -> dict[str, str]:
        """What is known before the first byte."""
        return {"x-selfroute-route": self._course.route} if self._course.route else {}

    def _report(self) -> dict[str, str]:
        c = self._course
        known = {
            "route": c.route,
            "score": "" if c.score is None else f"{c.score:.4f}",
            "cost-usd": f"{c.cost_usd:.9f}".rstrip("0").rstrip("."),
            "device-ms": "" if c.device_ms is None else f"{c.device_ms:.1f}",
            "cloud-ms": "" if c.cloud_ms is None else f"{c.cloud_ms:.1f}",
            "denied": c.denied,
        }
        return {f"x-selfroute-{name}": value for name, value in known.items() if value}


async def refuse(send: Send, refusal: RefusedError, headers: Mapping[str, str]) -> None:
    """Send a refusal."""
    body = _json(refusal.body())
    wait = {} if refusal.retry_after_s is None else {"retry-after": str(math.ceil(refusal.retry_after_s))}
    own = {"content-type": "application/json", "content-length": str(len(body)), **headers, **wait}
    raw = [(name.encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
