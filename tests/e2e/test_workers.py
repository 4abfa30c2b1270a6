"""Several workers on one socket and one store: who serves, who dies, who drains, and what the budget lets through."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psycopg
import pytest
from openai import OpenAI

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.serve.handoff import ATTEMPTS
from selfroute.tasks.processes import family
from selfroute.types import CloudRequest
from tests.postgres import server as postgres_server
from tests.servers import Exchange, Server, event
from tests.serving import command

QUESTION: Any = [{"role": "user", "content": "2+3?"}]
NAMED = "device.name=tests.serving:NamedDevice"


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    by = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < by
        time.sleep(0.02)


def children(pid: int) -> set[int]:
    return {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def alive(pid: int) -> bool:
    """Whether a process runs, and is no mere entry that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def pids(url: str, at_once: int, each: int = 1) -> Counter[str]:
    """Which processes answered, each request on a connection of its own; "" for one that broke off."""
    async with httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_keepalive_connections=0)) as client:

        async def some() -> list[str]:
            return [await one() for _ in range(each)]

        async def one() -> str:
            try:
                answered = await client.post(
                    f"{url}/chat/completions", json={"model": "selfroute", "messages": QUESTION}
                )
            except httpx2.TransportError:
                return ""
            assert answered.status_code == 200, answered.text
            return str(answered.json()["choices"][0]["message"]["content"])

        return Counter(pid for answers in await asyncio.gather(*(some() for _ in range(at_once))) for pid in answers)


def test_workers_share_the_work_are_replaced_and_drain(tmp_path: Path) -> None:
    store = tmp_path / "gateway.sqlite"
    with command(
        "workers=3", NAMED, "device.tells_pid=true", "device.pause_s=0.05", f"store={store}",
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as (process, url):  # fmt: skip
        first = children(process.pid)
        assert len(first) == 3
        (metrics,) = tmp_path.glob("selfroute-metrics-*")
        assert metrics.stat().st_mode & 0o777 == 0o700
        answered = asyncio.run(pids(url, 60))
        assert len(answered) > 1
        assert {int(pid) for pid in answered} <= first
        killed = int(answered.most_common(1)[0][0])

        async def under_load() -> Counter[str]:
            load = asyncio.create_task(pids(url, at_once=10, each=10))
            await asyncio.sleep(0.5)
            os.kill(killed, signal.SIGKILL)
            return await load

        # What the killed one was answering breaks off, and nothing else: at most one request of each client.
        loaded = asyncio.run(under_load())
        assert loaded[""] <= 10
        until(lambda: len(children(process.pid) - {killed}) == 3)
        assert "" not in asyncio.run(pids(url, 30))

        # Whichever is asked tells what all of them counted, the one that died too, but not what it was doing then.
        for _ in range(3):
            told = httpx2.get(url.replace("/v1", "/metrics")).text
            (answered_in_all,) = re.findall(r'selfroute_requests_total\{.*status="200"\} (\S+)', told)
            assert 60 + 100 + 30 - loaded[""] <= float(answered_in_all) <= 60 + 100 + 30
            assert "\nselfroute_requests_in_flight 0.0\n" in told

        with OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            stream = iter(client.chat.completions.create(model="selfroute", messages=QUESTION, stream=True))
            begun = next(stream)
            process.send_signal(signal.SIGTERM)
            assert "".join(c.choices[0].delta.content or "" for c in (begun, *stream)).isdecimal()
        assert process.wait(30) == 0
        errors = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in errors
    assert f"worker {killed} ended (signal 9)" in errors
    assert not metrics.exists()
    with sqlite3.connect(store) as connection:
        (recorded,) = connection.execute("SELECT COUNT(*) FROM requests WHERE status = 200").fetchone()
    # The last moments of the one that was killed were not written yet.
    assert recorded >= 60 + 30 + 1 + sum(n for pid, n in loaded.items() if pid not in ("", str(killed)))


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    with command("workers=2", NAMED, "device.pause_s=0.3", f"store={tmp_path / 's.sqlite'}") as (process, url):
        workers = children(process.pid)
        with OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            stream = iter(client.chat.completions.create(model="selfroute", messages=QUESTION, stream=True))
            begun = next(stream)
            process.kill()
            # What was under way is finished.
            assert "".join(c.choices[0].delta.content or "" for c in (begun, *stream)) == "5"
        until(lambda: not any(map(alive, workers)))
        place = urlsplit(url)
        assert place.hostname
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((place.hostname, place.port or 0))


def test_workers_that_cannot_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfroute", "serve", "port=0", "workers=2", f"store={tmp_path / 's'}"]
    done = subprocess.run(
        [*command, "device.name=tests.serving:NoSuchDevice"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert re.search("no worker can be started: .*NoSuchDevice", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_that_redact_and_trace_end_in_time_and_leave_nothing(tmp_path: Path) -> None:
    """All that a gateway may have at once, its collector of traces down; it ends while an answer is under way."""
    mail, store = "bob@example.org", tmp_path / "gateway.sqlite"

    async def writes(exchange: Exchange) -> None:
        if "wait" in exchange.body["messages"][0]["content"]:
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(60)
        usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        await exchange.answer(event("Write to <EMAIL_1>", "stop"), usage)

    traced = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "TEST_CLOUD_KEY": "sk-canary",
    }
    with (
        Server(otherwise=writes) as cloud,
        command(
            "workers=2", NAMED, "device.asks=true", "cloud.name=openai", f"cloud.base_url={cloud.url}",
            "cloud.model=gpt-4.1", "cloud.api_key_var=TEST_CLOUD_KEY", "privacy.redact=always", "privacy.timeout_s=30",
            "drain_s=1", f"store={store}", env={**os.environ, **traced},
        ) as (process, url),
    ):  # fmt: skip
        theirs = set(family(process.pid)) - {process.pid}
        assert len(theirs) >= 2 + 2
        headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": f"theirs={mail}"}

        def ask(text: str) -> httpx2.Response:
            body = {"model": "selfroute", "messages": [{"role": "user", "content": f"{text} {mail}"}]}
            return httpx2.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)

        assert ask("Mail").json()["choices"][0]["message"]["content"] == f"Write to {mail}"
        ended = ask("Please wait")
        assert (ended.status_code, ended.json()["error"]["code"]) == (503, "shutting_down")
        assert process.wait(30) == 0
        until(lambda: not any(map(alive, theirs)))
        errors = process.stderr.read() if process.stderr else ""
        assert not any(mail in f"{exchange.headers} {exchange.body}" for exchange in cloud.requests)
        assert all("a" * 32 in exchange.headers["traceparent"] for exchange in cloud.requests)
    assert not any(secret in errors for secret in (mail, "sk-canary", "Traceback")), errors
    with sqlite3.connect(store) as connection:
        rows = connection.execute("SELECT status, redacted FROM requests ORDER BY at").fetchall()
        assert rows == [(200, '{"EMAIL": 1}'), (503, '{"EMAIL": 1}')]
        assert connection.execute("SELECT COUNT(*) FROM reservations").fetchone() == (0,)


@pytest.mark.slow
def test_one_that_cannot_be_replaced_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with command(
        "workers=2", NAMED, f"device.broken_by={broken}", "device.tells_pid=true", f"store={tmp_path / 's.sqlite'}"
    ) as (process, url):
        assert process.stderr is not None
        first, second = sorted(children(process.pid))
        broken.touch()
        os.kill(first, signal.SIGKILL)
        assert "(signal 9) and is replaced" in process.stderr.readline()
        # It is tried again, and the other one serves meanwhile.
        assert "(the device is broken) and is replaced" in process.stderr.readline()
        assert set(asyncio.run(pids(url, 5))) == {str(second)}
        broken.unlink()
        until(lambda: len(asyncio.run(pids(url, 20))) == 2)
        # With none left that serves, whoever started the gateway has to know.
        broken.touch()
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 1
        assert "no worker can be started: the device is broken" in process.stderr.read()
        assert not any(map(alive, (first, second)))


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield str(tmp_path / "gateway.sqlite")
        return
    with postgres_server() as url:
        yield url


def held_and_spent(store: str) -> tuple[int, int]:
    """Nano-USD of the whole gateway."""
    query = "SELECT held_nano, spent_nano FROM accounts WHERE scope = 'gateway'"
    if "://" in store:
        with psycopg.connect(store) as connection:
            row = connection.execute(query).fetchone()
    else:
        with sqlite3.connect(store) as database:
            row = database.execute(query).fetchone()
    assert row
    return row[0], row[1]


def test_100_requests_over_4_workers_never_pass_the_cap(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cloud answers nobody until all the others were denied: what is held back is at its most then."""
    monkeypatch.setenv("TEST_CLOUD_KEY", "sk-test")
    go_on = asyncio.Event()

    async def when_told(exchange: Exchange) -> None:
        await go_on.wait()
        usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        await exchange.answer(event("cloud", "stop"), usage)

    body = {"model": "selfroute", "messages": QUESTION, "max_tokens": 1000}
    with Server(otherwise=when_told) as cloud:
        config = OpenAIConfig(base_url=cloud.url, model="gpt-4.1", api_key_var="TEST_CLOUD_KEY")
        client = OpenAICloud(config)
        worst_usd = ATTEMPTS * client.worst_usd(
            CloudRequest((*QUESTION,), temperature=None, extra={"max_tokens": 1000})
        )
        cap_usd = 20.5 * worst_usd
        with command(
            "workers=4", NAMED, "device.asks=true", "cloud.name=openai", f"cloud.base_url={cloud.url}",
            "cloud.model=gpt-4.1", "cloud.api_key_var=TEST_CLOUD_KEY", "cloud.concurrency=100",
            f"budget.usd_per_day={cap_usd}", f"store={store}",
        ) as (_, url):  # fmt: skip

            async def main() -> Counter[str]:
                async with httpx2.AsyncClient(timeout=120) as http:
                    asked = [asyncio.create_task(http.post(f"{url}/chat/completions", json=body)) for _ in range(100)]
                    for denied, answered in enumerate(asyncio.as_completed(asked), 1):
                        await answered
                        if denied == 80:
                            break
                    held, spent = held_and_spent(store)
                    assert spent == 0
                    assert held == pytest.approx(20 * worst_usd * 1e9)
                    assert len(cloud.requests) == 20
                    cloud.soon(go_on.set)
                    answers = [task.result() for task in asked if await asyncio.wait({task})]
                    assert {a.status_code for a in answers} == {200}
                    return Counter(a.json()["choices"][0]["message"]["content"] for a in answers)

            assert asyncio.run(main()) == {"cloud": 20, "5": 80}
            assert len(cloud.requests) == 20
            # Costs are written within half a second of the answers.
            deadline = time.monotonic() + 20
            while (settled := held_and_spent(store)) != (0, 20 * 280_000) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert settled == (0, 20 * 280_000)
