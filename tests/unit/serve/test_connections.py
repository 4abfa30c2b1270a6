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
SLOWLY = HEAD.replace(b"/ ", b"/slowly ") + b"\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
WELL = b"well!\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says "slowly" when more than `HEAD_S` has passed, or "well!" at once; it reads no body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    if scope["path"] == "/slowly":
        await send({"type": "http.response.body", "body": b"slo", "more_body": True})
        await asyncio.sleep(1.5)
        await send({"type": "http.response.body", "body": b"wly"})
    else:
        await send({"type": "http.response.body", "body": WELL})


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 1.0)


@contextmanager
def connected() -> Iterator[socket.socket]:
    with serving(app) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            yield connection


def until(connection: socket.socket, end: bytes) -> bytes:
    """All that comes, to these bytes."""
    read = b""
    while not read.endswith(end):
        piece = connection.recv(65536)
        assert piece, read
        read += piece
    return read


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; where it left something unread, that is a reset."""
    read = bytearray()
    try:
        while piece := connection.recv(65536):
            read += piece
    except ConnectionError:
        pass
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
    began = time.monotonic()
    with connected() as connection:
        connection.sendall(HEAD)
        time.sleep(0.2)
        connection.sendall(b"X-More: 1\r\n")
        assert refusal(rest(connection)) == (b"408", "timeout")
        assert time.monotonic() - began > 0.9


@pytest.mark.usefixtures("hurried")
def test_the_next_request_has_as_long_again() -> None:
    with connected() as connection:
        connection.sendall(HEAD + b"\r\n")
        until(connection, WELL)
        # The time for headers does not run between two requests.
        time.sleep(1.2)
        connection.sendall(HEAD)
        assert refusal(rest(connection)) == (b"408", "timeout")


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("request_", "more"),
    [(HEAD + b"\r\n", b"\r\n"), (HEAD.replace(b"GET", b"POST") + b"Content-Length: 100\r\n\r\n", b"a")],
    ids=["an empty line", "a body that nobody reads"],
)
def test_what_begins_no_request_holds_no_connection(request_: bytes, more: bytes) -> None:
    with connected() as connection:
        connection.sendall(request_)
        until(connection, WELL)
        began = time.monotonic()
        connection.sendall(more)
        assert rest(connection) == b""
        # Without it, uvicorn's own wait is 5 s.
        assert time.monotonic() - began < 4


@pytest.mark.usefixtures("hurried")
def test_an_answer_under_way_is_not_cut_off() -> None:
    with connected() as connection:
        connection.sendall(SLOWLY + HEAD)
        answer = rest(connection)
        assert b"slowly" in answer
        assert refusal(answer) == (b"408", "timeout")


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"GET /", b"a" * 12),
        (HEAD + b"X-Long: ", b"a" * 12),
        (HEAD, b"X-Short: 1\r\n"),
        (HEAD + b"\r\n" + HEAD, b"X-Short: 1\r\n"),
        (b"", b"\r\n" * 6),
        (CHUNKED + b"0\r\n", b"X-Short: 1\r\n"),
        (CHUNKED + b"0\r\nX-Long: ", b"a" * 12),
        (CHUNKED + b"1;", b"a" * 12),
    ],
    ids=["path", "header", "headers", "of the second request", "empty lines", "trailers", "trailer", "chunk"],
)
def test_what_has_no_end_is_not_taken(begun: bytes, more: bytes) -> None:
    more *= 1000
    with connected() as connection:
        connection.sendall(begun)
        sent = 0
        try:
            while sent < connections.MAX_HEAD + 2**21:
                connection.sendall(more)
                sent += len(more)
                # Else all of it is in the system's buffers before the first is read.
                time.sleep(0.005)
        except ConnectionError:
            return
        pytest.fail(f"{sent} bytes were taken")


def test_trailers_are_no_headers() -> None:
    with connected() as connection:
        connection.sendall(CHUNKED + b"0\r\nX-Late: 1\r\n\r\n" + HEAD + b"Connection: close\r\n\r\n")
        assert rest(connection).count(WELL) == 2


def test_headers_that_are_too_long_are_told_so() -> None:
    with connected() as connection:
        connection.sendall(HEAD)
        time.sleep(0.3)
        connection.sendall(b"X-Long: " + b"a" * connections.MAX_HEAD)
        assert refusal(rest(connection)) == (b"431", "headers_too_large")


def test_a_refusal_does_not_stand_in_the_middle_of_an_answer() -> None:
    with connected() as connection:
        connection.sendall(SLOWLY + HEAD)
        read = until(connection, b"slo")
        connection.sendall(b"X-Long: " + b"a" * 4 * connections.MAX_HEAD)
        assert (read + rest(connection)).endswith((b"\r\n\r\nslo", b"slowly"))


def test_few_requests_of_a_connection_wait() -> None:
    with connected() as connection:
        connection.sendall(SLOWLY + (HEAD + b"\r\n") * 3)
        assert until(connection, WELL * 1).startswith(b"HTTP/1.1 200")
    with connected() as connection:
        connection.sendall(SLOWLY + (HEAD + b"\r\n") * 1000)
        assert WELL not in rest(connection)


def test_long_headers_that_end_are_taken() -> None:
    with connected() as connection:
        long = b"X-Long: " + b"a" * (connections.MAX_HEAD // 2) + b"\r\n"
        connection.sendall(HEAD + long + b"Connection: close\r\n\r\n")
        assert rest(connection).endswith(WELL)
