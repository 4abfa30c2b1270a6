"""What a request begins with, on real sockets: in time, and not too long."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.types import Receive, Scope, Send
from tests.serving import serving

from selfroute.serve import connections

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = b"Connection: close\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says "slowly" in 0.8 s, or "well" at once."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    if scope["path"] == "/slowly":
        await send({"type": "http.response.body", "body": b"slo", "more_body": True})
        await asyncio.sleep(0.8)
        await send({"type": "http.response.body", "body": b"wly"})
    else:
        await send({"type": "http.response.body", "body": b"well!\n"})


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)


@contextmanager
def connected() -> Iterator[socket.socket]:
    with serving(app) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            yield connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    read = bytearray()
    while piece := connection.recv(65536):
        read += piece
    return bytes(read)


def refusal(answer: bytes) -> tuple[bytes, str]:
    """The status and the code of the last answer in these bytes."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    return head[head.rindex(b"HTTP/1.1") :].split()[1], json.loads(body)["error"]["code"]


@pytest.mark.usefixtures("hurried")
def test_who_says_nothing_is_let_go_of() -> None:
    with connected() as connection:
        assert rest(connection) == b""


@pytest.mark.usefixtures("hurried")
def test_headers_that_do_not_come_to_an_end() -> None:
    with connected() as connection:
        began = time.monotonic()
        connection.sendall(HEAD)
        for _ in range(4):
            connection.sendall(b"X-More: 1\r\n")
            time.sleep(0.05)
        assert refusal(rest(connection)) == (b"408", "timeout")
        assert time.monotonic() - began >= 0.3


@pytest.mark.usefixtures("hurried")
def test_the_next_request_has_as_long_again() -> None:
    with connected() as connection:
        connection.sendall(HEAD + b"\r\n")
        answer = b""
        while not answer.endswith(b"well!\n"):
            answer += connection.recv(65536)
        # The time for headers does not run between two requests.
        time.sleep(0.5)
        connection.sendall(HEAD)
        assert refusal(rest(connection)) == (b"408", "timeout")


@pytest.mark.usefixtures("hurried")
def test_an_answer_under_way_is_not_cut_off() -> None:
    with connected() as connection:
        connection.sendall(HEAD.replace(b"/ ", b"/slowly ") + b"\r\n" + HEAD)
        answer = rest(connection)
        assert b"slowly" in answer
        assert refusal(answer) == (b"408", "timeout")


@pytest.mark.parametrize(
    "endless",
    [b"GET /", HEAD + b"X-Long: ", HEAD + b"X-Short: 1\r\n"],
    ids=["a path", "a header", "headers"],
)
def test_headers_without_an_end(endless: bytes) -> None:
    more = (b"X-Short: 1\r\n" if endless.endswith(b"\n") else b"aaaaaaaaaaaa") * 1000
    with connected() as connection:
        connection.sendall(endless)
        sent = 0
        try:
            while sent < 50 * connections.MAX_HEAD:
                connection.sendall(more)
                sent += len(more)
                # Else all of it is in the system's buffers before the first is read.
                time.sleep(0.002)
        except OSError:
            return
        pytest.fail(f"{sent} bytes of headers were taken")


def test_headers_that_are_too_long_are_told_so() -> None:
    with connected() as connection:
        connection.sendall(HEAD)
        time.sleep(0.3)
        connection.sendall(b"X-Long: " + b"a" * connections.MAX_HEAD)
        assert refusal(rest(connection)) == (b"431", "headers_too_large")


def test_long_headers_that_end_are_taken() -> None:
    with connected() as connection:
        connection.sendall(HEAD + b"X-Long: " + b"a" * (connections.MAX_HEAD // 2) + b"\r\n" + CLOSE)
        assert rest(connection).endswith(b"well!\n")
