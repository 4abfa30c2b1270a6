"""A chat-completions server on loopback that misbehaves as it is told, on real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

Fault = Callable[["Exchange"], Awaitable[None]]


def reply(text: str = "four", **changes: Any) -> dict[str, Any]:
    """The body of an answer."""
    message = {"role": "assistant", "content": text, **changes.pop("message", {})}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        **changes,
    }


def event(text: str = "", finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """An event of a stream."""
    return {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish_reason}]}


class Exchange:
    """One request, and the connection to answer it on."""

    def __init__(self, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.headers, self.body, self.writer = headers, body, writer
        self.ended = False
        """Whether the connection ends here."""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Content-Type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    async def begin_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")

    async def events(self, *events: Any) -> None:
        for e in events:
            await self.send(f"data: {e if isinstance(e, str) else json.dumps(e)}\r\n\r\n".encode())

    async def answer(self, *events: dict[str, Any], cut: bool = False) -> None:
        """What these events say, streamed or in one as the request has it; `cut`: and then the connection ends."""
        if self.body.get("stream"):
            await self.begin_stream()
            await self.events(*events, *([] if cut else ["[DONE]"]))
            return
        data = json.dumps(whole_of(*events)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data) + cut}\r\nConnection: close\r\n\r\n"
        await self.send(head.encode() + data)
        self.ended = True


def whole_of(*events: dict[str, Any]) -> dict[str, Any]:
    """What a stream's events say, in one; a tool call's pieces are of one call."""
    message: dict[str, Any] = {"content": ""}
    body: dict[str, Any] = {}
    for one in events:
        for choice in one["choices"]:
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    [piece] = value
                    [call] = message.setdefault(name, [{"function": {"arguments": ""}}])
                    function = {**call["function"], **piece["function"]}
                    function["arguments"] = call["function"]["arguments"] + piece["function"]["arguments"]
                    message[name] = [{**call, **piece, "function": function}]
                else:
                    message[name] = message.get(name, "") + value
            body["choices"] = [{"index": 0, "message": message, "finish_reason": choice["finish_reason"]}]
        body["usage"] = one.get("usage")
    for call in message.get("tool_calls", ()):
        del call["index"]
    return body


async def hang(exchange: Exchange) -> None:
    """Nothing, for as long as the client stays."""
    await asyncio.sleep(60)


class Server:
    """Answers each request with the next fault of `script`, and with `otherwise` when there is none left."""

    def __init__(self, *script: Fault, otherwise: Fault | None = None) -> None:
        self.script = list(script)
        self.otherwise: Fault = otherwise or (lambda exchange: exchange.status(200, reply()))
        self.requests: list[Exchange] = []
        self.at_once = self.most_at_once = self.left_early = 0

    def __enter__(self) -> Server:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = started.result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def stop() -> None:
            self._server.close()
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def soon(self, call: Callable[[], object]) -> None:
        """Call it where the server runs."""
        self._loop.call_soon_threadsafe(call)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                path, *lines = head.decode().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                exchange = Exchange({**headers, ":path": path}, body, writer)
                self.requests.append(exchange)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    answer = asyncio.ensure_future((self.script.pop(0) if self.script else self.otherwise)(exchange))
                    gone = asyncio.ensure_future(reader.read(1))
                    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        self.left_early += 1
                        answer.cancel()
                        return
                    gone.cancel()
                    await asyncio.gather(gone, return_exceptions=True)
                    answer.result()
                finally:
                    self.at_once -= 1
                if writer.is_closing() or exchange.ended or exchange.body.get("stream"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()
