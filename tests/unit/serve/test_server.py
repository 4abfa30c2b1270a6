"""A gateway as a config names it, with the store, the budget and the keys that it runs with."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from tests.servers import Exchange, Server, event

from selfroute.config import Choice
from selfroute.serve import keys
from selfroute.serve.account import Limits
from selfroute.serve.app import make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.connections import MAX_HEAD
from selfroute.serve.history import RequestRecord
from selfroute.serve.server import CLOSING_ANSWER_S, listening, opened, serve
from selfroute.serve.store import ANSWER_S, Store
from selfroute.serve.workers import CLOSING_S
from selfroute.tasks.countdown import Countdown, CountdownConfig


def test_keys_budget_and_records_are_those_of_the_store(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite"
    config = GatewayConfig(
        device=Choice(name="tests.serving:NamedDevice", asks=True),
        cloud=Choice(name="oracle", accuracy=1.0),
        budget=Limits(calls_per_minute=2),
        store=str(path),
        keys=True,
    )
    store = Store(config.store)
    with store.begin() as connection:
        token, key = keys.new(connection, "one call", Limits(calls_per_minute=1), policies=["auto"])
        other, _ = keys.new(connection, "no limits of its own")
        admin, _ = keys.new(connection, "operations", admin=True)
    store.close()
    question = Countdown(CountdownConfig()).load("test")[0].question
    body = {"model": "selfroute", "messages": [{"role": "user", "content": question}]}

    async def main() -> list[tuple[str, str | None]]:
        async with opened(config) as gateway:
            http = httpx2.ASGITransport(app=make_app(gateway))
            async with httpx2.AsyncClient(transport=http, base_url="http://localhost/v1") as client:
                assert (await client.post("/chat/completions", json=body)).status_code == 401
                found = []
                for shown in (token, token, other, other):
                    headers = {"authorization": f"Bearer {shown}"}
                    answered = (await client.post("/chat/completions", json=body, headers=headers)).json()["selfroute"]
                    found.append((answered["route"], answered["denied"]))
                refused = await client.post(
                    "/chat/completions",
                    json={**body, "model": "selfroute-cloud"},
                    headers={"authorization": f"Bearer {token}"},
                )
                assert refused.status_code == 403
                told = await client.get("http://localhost/metrics", headers={"authorization": f"Bearer {admin}"})
                assert told.status_code == 200
                for line in (
                    'requests_total{policy="auto",route="cloud",status="200"} 2.0',
                    'decisions_total{decision="help"} 4.0',
                    'denials_total{reason="calls_per_minute"} 2.0',
                    'refused_total{code="policy_not_allowed",status="403"} 1.0',
                    'budget_used{limit="calls_per_minute",scope="gateway"} 2.0',
                    f'budget_limit{{limit="calls_per_minute",scope="key:{key.id}"}} 1.0',
                ):
                    assert f"\nselfroute_{line}\n" in told.text
                assert not any(secret in told.text for secret in (token, other, admin))
                shown = await client.get("http://localhost/dashboard", headers={"authorization": f"Bearer {admin}"})
                assert "one call" in shown.text
                return found

    denied = ("device", "calls_per_minute")
    assert asyncio.run(main()) == [("cloud", None), denied, ("cloud", None), denied]
    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "SELECT decision, route, denied, status, key_id = ?, cost_nano > 0 FROM requests ORDER BY at", (key.id,)
        )
        assert rows.fetchall() == [
            ("help", "cloud", "", 200, 1, 1),
            ("help", "device", "calls_per_minute", 200, 1, 0),
            ("help", "cloud", "", 200, 0, 1),
            ("help", "device", "calls_per_minute", 200, 0, 0),
        ]
        (spent, held), costs = (
            connection.execute("SELECT spent_nano, held_nano FROM accounts WHERE scope = 'gateway'").fetchone(),
            connection.execute("SELECT SUM(cost_nano) FROM requests").fetchone()[0],
        )
        assert (spent, held) == (costs, 0)
        assert connection.execute("SELECT COUNT(*) FROM reservations").fetchone() == (0,)


def test_those_that_had_come_before_the_signal_are_answered(tmp_path: Path) -> None:
    config = GatewayConfig(device=Choice(name="tests.serving:NamedDevice"), store=str(tmp_path / "gateway.sqlite"))
    with listening("127.0.0.1", 0) as listener, ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(50)]
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        serve(config, listener, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert [client.recv(1000)[:15] for client in clients] == [b"HTTP/1.1 200 OK"] * 50


def test_a_gateway_that_nobody_can_ask_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "gateway.sqlite"
    config = GatewayConfig(device=Choice(name="tests.serving:NamedDevice"), store=str(path), keys=True)

    async def begin() -> None:
        async with opened(config):
            pass

    asyncio.run(begin())
    assert f"selfroute keys new NAME --store {path}" in caplog.text
    caplog.clear()
    with closing(Store(config.store)) as store, store.begin() as connection:
        keys.new(connection, "one")
    asyncio.run(begin())
    assert "nobody can ask" not in caplog.text


def test_what_a_connection_is_closed_for_is_counted(tmp_path: Path) -> None:
    config = GatewayConfig(device=Choice(name="tests.serving:NamedDevice"), store=str(tmp_path / "gateway.sqlite"))
    told: list[str] = []
    with listening("127.0.0.1", 0) as listener:
        host, port = listener.getsockname()

        def ask() -> None:
            try:
                with socket.create_connection((host, port), timeout=20) as client:
                    client.sendall(b"GET / HTTP/1.1\r\n")
                    time.sleep(0.3)
                    client.sendall(b"X-Long: " + b"a" * MAX_HEAD)
                    assert client.recv(1000).startswith(b"HTTP/1.1 431")
                # Refused, too, but no request that anybody had begun.
                with socket.create_connection((host, port), timeout=20) as client:
                    client.sendall(b"\r\n" * (MAX_HEAD // 2 + 1))
                    assert client.recv(1000).startswith(b"HTTP/1.1 431")
                with socket.create_connection((host, port), timeout=20) as client:
                    client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
                    with suppress(ConnectionError):
                        while client.recv(65536):
                            pass
                told.append(httpx2.get(f"http://localhost:{port}/metrics").text)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        asking = threading.Thread(target=ask)
        serve(config, listener, asking.start)
        asking.join()
    assert '\nselfroute_refused_total{code="headers_too_large",status="431"} 1.0\n' in told[0]
    assert '\nselfroute_refused_total{code="too_many_requests",status="429"} 1.0\n' in told[0]


def test_a_client_that_reads_nothing_holds_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfroute.serve.server.UNREAD_S", 1)
    path = tmp_path / "gateway.sqlite"

    async def floods(exchange: Exchange) -> None:
        await exchange.begin_stream()
        for _ in range(400):
            await exchange.events(event("x" * 50_000))
        await asyncio.sleep(60)

    with Server(otherwise=floods) as cloud, listening("127.0.0.1", 0) as listener, ExitStack() as stack:
        config = GatewayConfig(
            device=Choice(name="tests.serving:NamedDevice", asks=True),
            cloud=Choice(name="openai", base_url=cloud.url, model="gpt-4.1"),
            store=str(path),
            drain_s=1,
        )

        def leave() -> None:
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            body = b'{"model": "selfroute", "messages": [{"role": "user", "content": "2+3?"}], "stream": true}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            with closing(sqlite3.connect(path)) as store:
                while not store.execute("SELECT status FROM requests").fetchall() and time.monotonic() - began < 20:
                    time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        began = time.monotonic()
        thread = threading.Thread(target=leave)
        serve(config, listener, thread.start)
        thread.join()
    assert time.monotonic() - began < 20
    with closing(sqlite3.connect(path)) as store:
        assert store.execute("SELECT status, error, route FROM requests").fetchall() == [(499, "client_gone", "cloud")]


@pytest.mark.parametrize("signals", [1, 2])
def test_what_is_broken_off_at_the_end_is_told_settled_and_recorded(
    signals: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that has begun its answer, and one that has said nothing: after `drain_s`, or at the second signal."""
    path = tmp_path / "gateway.sqlite"
    asked: list[Exchange] = []

    async def begins(exchange: Exchange) -> None:
        await exchange.begin_stream()
        if exchange.body["messages"][0]["content"] == "stream":
            await exchange.events(event("fo"))
        asked.append(exchange)
        for _ in range(signals if len(asked) == 2 else 0):
            # Two that come together are one.
            await asyncio.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    answers: dict[bool, httpx2.Response] = {}

    def ask(url: str, stream: bool) -> None:
        body = {"model": "selfroute", "messages": [{"role": "user", "content": "stream" if stream else "whole"}]}
        answers[stream] = httpx2.post(url, json={**body, "stream": stream}, timeout=30)

    with Server(otherwise=begins) as cloud, listening("127.0.0.1", 0) as listener:
        config = GatewayConfig(
            device=Choice(name="tests.serving:NamedDevice", asks=True),
            cloud=Choice(name="openai", base_url=cloud.url, model="gpt-4.1"),
            store=str(path),
            drain_s=0.4 if signals == 1 else 30,
        )
        url = f"http://localhost:{listener.getsockname()[1]}/v1/chat/completions"
        slow = socket.create_connection(listener.getsockname(), timeout=30)
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        clients = [threading.Thread(target=ask, args=(url, stream)) for stream in (True, False)]
        serve(config, listener, lambda: [client.start() for client in clients] and None)
        for client in clients:
            client.join()
        with slow:
            # Its body was still coming.
            assert b" 503 " in slow.recv(1000)
    *_, last = (line for line in answers[True].text.splitlines() if line)
    assert '"content":"fo"' in answers[True].text
    assert "shutting_down" in last
    assert (answers[False].status_code, answers[False].json()["error"]["code"]) == (503, "shutting_down")
    assert answers[False].headers["retry-after"] == "5"
    assert "Traceback" not in caplog.text
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT status, error, cost_nano FROM requests").fetchall()
        assert [row[:2] for row in rows] == [(503, "shutting_down")] * 2
        assert connection.execute("SELECT COUNT(*) FROM reservations").fetchone() == (0,)
        spent, held = connection.execute("SELECT spent_nano, held_nano FROM accounts").fetchone()
        assert (spent, held) == (sum(row[2] for row in rows), 0)


def test_a_device_that_is_not_there_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it is said that the gateway serves; one that does not answer is not waited for long."""
    monkeypatch.setattr("selfroute.serve.app.READY_S", 0.2)
    told: list[str] = []

    def ready() -> None:
        told.append(caplog.text)
        caplog.clear()
        os.kill(os.getpid(), signal.SIGTERM)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            device = Choice(name="http", base_url=f"http://127.0.0.1:{port}/v1")
            with listening("127.0.0.1", 0) as listener:
                serve(GatewayConfig(device=device, store=str(tmp_path / "gateway.sqlite")), listener, ready)
    refused, slow = told
    assert "the engine at http://127.0.0.1:1/v1 cannot be reached" in refused
    assert "requests go to the cloud as far as they may: it does not say that it is within 0.2 s" in slow


def test_a_part_that_fails_says_so_while_the_rest_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = tmp_path / "gateway.sqlite"
        async with opened(GatewayConfig(device=Choice(name="tests.serving:NamedDevice"), store=str(store))) as gateway:
            # No error of the store's own, as a fault of ours would be.
            gateway.pair.recorder.record(RequestRecord(id="r1", at=0.0, status=cast(Any, "200")))
            async with asyncio.timeout(10):
                while "has ended" not in caplog.text:
                    await asyncio.sleep(0.01)
            http = httpx2.ASGITransport(app=make_app(gateway))
            async with httpx2.AsyncClient(transport=http, base_url="http://localhost") as client:
                body = {"model": "selfroute", "messages": [{"role": "user", "content": "2+3?"}]}
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200

    with pytest.raises(TypeError, match="not supported"):
        asyncio.run(main())
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("fails", [True, False])
def test_the_end_does_not_wait_long_for_the_store(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    closing_store = Store.close

    def close(store: Store) -> None:
        waits.append(store.answer_s)
        closing_store(store)

    monkeypatch.setattr(Store, "close", close)

    async def run() -> None:
        config = GatewayConfig(device=Choice(name="tests.serving:NamedDevice"), store=str(tmp_path / "a.sqlite"))
        async with opened(config) as gateway:
            assert gateway.store.answer_s == ANSWER_S
            if fails:
                raise ValueError("whatever it is")

    if fails:
        with pytest.raises(ValueError, match="whatever"):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert waits == [CLOSING_ANSWER_S]
    # The recorder, the budget's write under way and its last, the old records' removal, and the closing itself.
    assert 5 * CLOSING_ANSWER_S < CLOSING_S
