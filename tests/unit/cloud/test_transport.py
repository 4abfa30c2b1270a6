"""Connections to an endpoint: kept, closed, and what they never do."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.servers import event

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.cloud.transport import BrokenError, Incoming, Transport
from selfroute.types import CloudRequest

ASK = CloudRequest(messages=({"role": "user", "content": "two and two?"},))
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)


class Peer:
    """Answers each request on its connection, and counts both."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.connections = 0
        self.heads: list[str] = []

    async def __aenter__(self) -> Peer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
                await reader.readexactly(int(length or 0))
                await self._answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def four(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(chunk(sse(event("four", "stop")) + b"data: [DONE]\n\n"))
    await writer.drain()
    # The end of the body, after the last event and apart from it.
    await asyncio.sleep(0.005)
    writer.write(chunk(b""))


def test_a_connection_is_used_again_after_a_stream() -> None:
    async def run() -> int:
        async with Peer(four) as peer:
            cloud = OpenAICloud(OpenAIConfig(base_url=peer.url, model="gpt-4.1"))
            for _ in range(3):
                chunks = [c async for c in cloud.stream(ASK)]
                assert chunks[0].text == "four"
            await cloud.aclose()
            return peer.connections

    assert asyncio.run(run()) == 1


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    writer.write(sse(event("four", "stop")) + b"data: [DONE]\n\n")
    while True:
        writer.write(b": more\n\n")
        await writer.drain()
        await asyncio.sleep(0.01)


def test_what_comes_after_the_end_is_not_waited_for() -> None:
    async def run() -> None:
        async with Peer(endless) as peer:
            cloud = OpenAICloud(OpenAIConfig(base_url=peer.url, model="gpt-4.1"))
            async with asyncio.timeout(5):
                assert "".join([c.text async for c in cloud.stream(ASK)]) == "four"
            await cloud.aclose()

    asyncio.run(run())


async def elsewhere(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 307 X\r\nLocation: /v1/else\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize(("keep", "connections"), [(True, 1), (False, 2)])
def test_redirects_and_cookies_are_left_alone(keep: bool, connections: int) -> None:
    async def run() -> None:
        async with Peer(elsewhere) as peer:
            transport = Transport("sk-canary", 1, keep=keep, trust_env=False)
            for _ in range(2):
                answer = await transport.send("POST", f"{peer.url}/chat", b"{}")
                assert answer.status == 307
                assert await answer.piece() == b""
                answer.close()
            await transport.aclose()
            assert peer.connections == connections
            assert len(peer.heads) == 2
            assert all("Bearer sk-canary" in head and "ookie" not in head for head in peer.heads)

    asyncio.run(run())


async def whole(answer: Incoming) -> None:
    while await answer.piece():
        pass


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    writer.close()


def test_what_breaks_is_told_without_the_key() -> None:
    sent = []

    async def run() -> list[BrokenError]:
        seen = []
        transport = Transport("sk-canary", 1, keep=True, trust_env=False)
        async with Peer(cut) as peer:
            answer = await transport.send("POST", f"{peer.url}/chat", b"{}", lambda: sent.append("half"))
            with pytest.raises(BrokenError) as broken:
                await whole(answer)
            seen.append(broken.value)
        with pytest.raises(BrokenError) as refused:
            await transport.send("POST", "http://127.0.0.1:9/v1", b"{}", lambda: sent.append("nothing"))
        await transport.aclose()
        return [*seen, refused.value]

    for error in asyncio.run(run()):
        assert not error.slow
        assert error.__cause__ is None
        assert "sk-canary" not in f"{error!r} {error.__dict__}"
    assert sent == ["half"]


async def fine(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def test_no_connection_is_told_in_plain_words() -> None:
    async def run() -> str:
        transport = Transport("", 5.0, keep=False, trust_env=False)
        try:
            with pytest.raises(BrokenError) as caught:
                await transport.send("GET", "http://127.0.0.1:9/v1")
            return str(caught.value)
        finally:
            await transport.aclose()

    assert asyncio.run(run()) == "connection refused"


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> str:
        monkeypatch.setenv("http_proxy", "http://me:canary@127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        transport = Transport("", 5.0, keep=False, trust_env=True)
        try:
            with pytest.raises(BrokenError) as caught:
                await transport.send("GET", "http://cloud.example/v1")
            return str(caught.value)
        finally:
            await transport.aclose()

    assert asyncio.run(run()) == "the proxy at 127.0.0.1:9: connection refused"


@pytest.mark.parametrize("key", ["sk-canary", ""])
def test_passwords_of_the_environment_go_nowhere(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password canary-2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))

    async def run() -> str:
        async with Peer(fine) as peer:
            transport = Transport(key, 1, keep=True, trust_env=True)
            answer = await transport.send("POST", f"{peer.url}/chat", b"{}")
            assert answer.status == 200
            answer.close()
            await transport.aclose()
            return peer.heads[0]

    sent = [line for line in asyncio.run(run()).splitlines() if line.lower().startswith("authorization")]
    assert sent == ([f"Authorization: Bearer {key}"] if key else [])


@pytest.mark.parametrize(
    ("trust_env", "exempt", "proxied"), [(True, "", 1), (True, "cloud.invalid", 0), (False, "", 0)]
)
def test_a_proxy_of_the_environment(
    trust_env: bool, exempt: str, proxied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> list[str]:
        async with Peer(fine) as peer:
            monkeypatch.setenv("http_proxy", peer.url.removesuffix("/v1").replace("//", "//me:canary@"))
            monkeypatch.setenv("no_proxy", exempt)
            transport = Transport("sk-canary", 1, keep=True, trust_env=trust_env)
            with suppress(BrokenError):
                (await transport.send("POST", "http://cloud.invalid/v1/chat", b"{}")).close()
            await transport.aclose()
            return peer.heads

    heads = asyncio.run(run())
    assert len(heads) == proxied
    for head in heads:
        assert head.startswith("POST http://cloud.invalid/v1/chat ")
        assert f"Proxy-Authorization: Basic {base64.b64encode(b'me:canary').decode()}" in head


async def wants_a_password(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")


def test_a_proxy_that_refuses_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> str:
        async with Peer(wants_a_password) as peer:
            monkeypatch.setenv("https_proxy", peer.url.removesuffix("/v1").replace("//", "//me:canary@"))
            transport = Transport("sk-canary-2", 1, keep=True, trust_env=True)
            with pytest.raises(BrokenError, match="407") as broken:
                await transport.send("POST", "https://cloud.invalid/v1/chat", b"{}")
            await transport.aclose()
            return f"{broken.value!r} {broken.value.__dict__}"

    assert "canary" not in asyncio.run(run())
