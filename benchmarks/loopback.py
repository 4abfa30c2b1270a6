"""A fake upstream and a load generator on loopback, for the benchmarks of the gateway; each is a process of its own.

    python benchmarks/loopback.py upstream      writes its port, and serves until it is killed
    python benchmarks/loopback.py generate      takes a load on each line that it reads, and writes what came of it

Both speak HTTP over asyncio's bare protocols, since they share two cores with what they measure. What a request wants
stands in the user's last message, as JSON, which any proxy passes on:

    {"name": "a7", "pieces": 3, "every_ms": 0, "device": "answer"}      ->  "a7-0 a7-1 a7-2 "

one event a piece, in a segment of its own. A model called `device` answers in tags, or ends with a help call
(`"device": "help"`). The name is another for each request, so that a lost, doubled or foreign piece shows in the text.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

HELP_CALL = "<unknown> I need external assistance </unknown>"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked")
_CONTENT = re.compile(rb'"content": ?("(?:[^"\\]|\\.)+")')
_FIRST = re.compile(rb'content": ?"[^"]')


def text_of(wanted: Mapping[str, Any]) -> list[str]:
    """The pieces of the answer that is wanted."""
    return [f"{wanted['name']}-{i} " for i in range(wanted["pieces"])]


def event(delta: Mapping[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
    """An event of a stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps({**body, **more}).encode() + b"\n\n"


def usage_of(pieces: int) -> dict[str, int]:
    return {"prompt_tokens": 20, "completion_tokens": pieces, "total_tokens": 20 + pieces}


def answer_of(pieces: Sequence[str]) -> dict[str, Any]:
    """An answer that is not streamed."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": "stop"}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return {**whole, "usage": usage_of(len(pieces))}


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Upstream(asyncio.Protocol):
    """A connection of the upstream's; requests come one after the other."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self._read = transport, b""
        self.gone = False
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        length = int(match[1]) if (match := _LENGTH.search(head)) else 0
        if not found or len(body) < length:
            return
        self._read = body[length:]
        if head.startswith(b"GET"):
            models = [{"id": "device", "object": "model", "owned_by": "vllm"}]
            self.whole({"object": "list", "data": models})
            return
        asked = json.loads(body[:length])
        said = [message["content"] for message in asked["messages"] if message["role"] == "user"]
        self.asked(asked, json.loads(said[-1]))

    def asked(self, body: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Answer a request."""
        pieces = text_of(wanted)
        if body["model"] == "device":
            pieces = [*pieces, HELP_CALL] if wanted["device"] == "help" else ["<answer>", *pieces, "</answer>"]
        if not body.get("stream"):
            ready_s = len(pieces) * wanted["every_ms"] / 1000
            asyncio.get_running_loop().call_later(ready_s, self.whole, answer_of(pieces))
            return
        self.transport.write(STREAM + chunk(event({"role": "assistant", "content": ""})))
        self._go_on(self._events(body, pieces), wanted["every_ms"] / 1000)

    def _events(self, body: Mapping[str, Any], pieces: Sequence[str]) -> Iterator[bytes]:
        before, after = event({"content": "\0"}).split(b"\\u0000")
        for piece in pieces:
            yield chunk(before + json.dumps(piece)[1:-1].encode() + after)
        last = event({}, "stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            last += event({}, choices=[], usage=usage_of(len(pieces)))
        yield chunk(last + b"data: [DONE]\n\n") + chunk(b"")

    def _go_on(self, events: Iterator[bytes], every_s: float, at: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time() if at is None else at
        for data in events:
            self.transport.write(data)
            if every_s:
                # By the clock from the first on, so that a stream takes as long as the whole answer does.
                if not self.gone:
                    loop.call_at(at + every_s, self._go_on, events, every_s, at + every_s)
                return

    def whole(self, body: Any, status: int = 200, headers: bytes = b"") -> None:
        """Send JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
        self.transport.write(head % (status, len(data), headers) + data)


async def upstream() -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Connection(asyncio.Protocol):
    """A connection of the generator's: one request at a time."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._done: asyncio.Future[bytes] | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(f"the connection ended in mid-answer: {bytes(self._read)!r:.300}"))

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        if self.first_at is None and _FIRST.search(data):
            self.first_at = time.perf_counter()
        if self._size is None:
            if (end := read.find(b"\r\n\r\n")) < 0:
                return
            length = _LENGTH.search(read, 0, end)
            self._size = end + 4 + int(length[1]) if length else -1
        whole = read.endswith(b"0\r\n\r\n") if self._size < 0 else len(read) >= self._size
        if whole and self._done and not self._done.done():
            self._done.set_result(bytes(read))

    async def ask(self, request: bytes) -> bytes:
        """Send a request; its answer, head and body, the body as it was coded.

        Raises:
            ConnectionError: there is none, or no more of it.
        """
        if self.transport.is_closing():
            raise ConnectionError("the connection is closed")
        self._read, self._size = bytearray(), None
        self.first_at: float | None = None
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._done


def said(answer: bytes) -> str:
    """The text of an answer, its pieces put together."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if _CHUNKED.search(head):
        body = unchunked(body)
    return "".join(json.loads(text) for text in _CONTENT.findall(body))


def unchunked(body: bytes) -> bytes:
    """A body without HTTP's chunked coding."""
    pieces, at = [], 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:end], 16)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
    return b"".join(pieces)


class Generator:
    """Runs one load.

    `steps` are the calls of one request, one after the other: where to, in what name, and whether the text has to be
    the one that was wanted (`exact`) or hold it. Requests come from `connections` clients, each asking again as soon as
    it was answered; or, with a `rate`, at random moments, so many a second, whether or not others were answered. Those
    that began in the first `warm_s` do not count.
    """

    def __init__(self, load: Mapping[str, Any]) -> None:
        self.load = load
        self.free: list[Connection] = []
        self.ms: list[float] = []
        self.first_ms: list[float] = []
        self.asked = 0
        self.faults: list[str] = []

    async def run(self) -> dict[str, Any]:
        load = self.load
        self.from_s = time.perf_counter() + load["warm_s"]
        self.until_s = self.from_s + load["seconds"]
        began = time.perf_counter()
        await (self._paced(load["rate"]) if load.get("rate") else self._closed(load["connections"]))
        took_s = time.perf_counter() - began
        for connection in self.free:
            connection.transport.close()
        return {
            "asked": self.asked,
            "requests": len(self.ms),
            "per_second": round(self.asked / took_s, 1),
            "ms": quantiles_of(self.ms),
            "first_ms": quantiles_of(self.first_ms),
            "faults": len(self.faults),
            "fault": self.faults[0] if self.faults else "",
        }

    async def _closed(self, connections: int) -> None:
        async def client() -> None:
            while time.perf_counter() < self.until_s:
                await self._request()

        await asyncio.gather(*(client() for _ in range(connections)))

    async def _paced(self, rate: float) -> None:
        drawn, at, under_way = random.Random(0), time.perf_counter(), set()
        while at < self.until_s:
            at += drawn.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            task = asyncio.create_task(self._request())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _request(self) -> None:
        self.asked += 1
        began, first_at = time.perf_counter(), None
        wanted = {**self.load["wanted"], "name": f"{self.load['name']}.{self.asked}"}
        expected = "".join(text_of(wanted)).strip()
        try:
            for step in self.load["steps"]:
                connection = self.free.pop() if self.free else await self._connect()
                answer = await connection.ask(request_of(step, wanted))
                first_at = first_at or connection.first_at
                self.free.append(connection)
                text = said(answer).strip()
                right = text == expected if step["exact"] else expected in text
                if not right or not answer.startswith(b"HTTP/1.1 200"):
                    self.faults.append(f"{expected!r} became {answer[:2000]!r}")
        except OSError as error:
            self.faults.append(repr(error))
            return
        ended = time.perf_counter()
        if began >= self.from_s:
            self.ms.append((ended - began) * 1e3)
            if first_at is not None:
                self.first_ms.append((first_at - began) * 1e3)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, "127.0.0.1", self.load["port"]))[1]


def request_of(step: Mapping[str, Any], wanted: Mapping[str, Any]) -> bytes:
    """A request for a chat completion."""
    asked = {
        "model": step["model"],
        "messages": [{"role": "user", "content": json.dumps(wanted)}],
        "max_tokens": 512,
        "stream": step["stream"],
    }
    return posted(asked, step["key"])


def posted(asked: Mapping[str, Any], key: str) -> bytes:
    """A chat completion's request as it goes over the wire."""
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def quantiles_of(values: Sequence[float]) -> dict[str, float] | None:
    """The median and the 99th percentile."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: round(ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))], 3)
            for name, q in (("p50", 0.5), ("p99", 0.99))}  # fmt: skip


def generate() -> None:
    """A load on each line of the input, what came of it on each line of the output."""
    for line in sys.stdin:
        print(json.dumps(asyncio.run(Generator(json.loads(line)).run())), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(upstream()) if sys.argv[1] == "upstream" else generate()
