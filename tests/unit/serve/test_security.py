"""Attackers: of keys, paths and headers, of the event stream, of budgets, and with texts that look like help calls."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.servers import Exchange, Server, event
from tests.serving import MemoryBudget, MemoryRecorder, ScriptedCloud, ScriptedDevice, Step, said, serving

from selfroute.config import Choice
from selfroute.protocol import HELP_CALL
from selfroute.serve import keys
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from selfroute.serve.server import opened
from selfroute.serve.store import Store
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.types import CloudChunk

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
UPSTREAM_KEY = "sk-canary-of-the-upstream"
ASKS = said("hard\n", HELP_CALL)
ANSWERS = said("2+3=5 <answer>5</answer>")
USAGE = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def body(content: str = "2+3?", **changes: Any) -> dict[str, Any]:
    return {"model": "selfroute", "messages": [{"role": "user", "content": content}], **changes}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def made_keys(store: Path, *limits: Limits) -> list[tuple[str, str]]:
    """Keys and their ids, in a new store."""
    opening = Store(str(store))
    with opening.begin() as connection:
        made = [keys.new(connection, f"key {n}", limit) for n, limit in enumerate(limits)]
    opening.close()
    return [(token, key.id) for token, key in made]


# Keys.


async def tells_the_key(exchange: Exchange) -> None:
    await exchange.status(401, {"error": {"message": f"bad key {exchange.headers.get('authorization')}"}})


async def five(exchange: Exchange) -> None:
    if exchange.body.get("stream"):
        await exchange.begin_stream()
        # What an upstream says beside its data is its own.
        await exchange.send(b"event: evil\nid: 7\nretry: 1\n")
        await exchange.events(event("five", "stop"), USAGE, "[DONE]")
    else:
        await exchange.answer(event("five", "stop"), USAGE)


def test_no_key_is_told_anywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", UPSTREAM_KEY)
    ((key, _),) = made_keys(tmp_path / "g.sqlite", Limits())
    wrong = key[:-1] + ("a" if key[-1] != "a" else "b")
    caplog.set_level(logging.DEBUG)

    async def main(config: GatewayConfig) -> list[httpx2.Response]:
        async with opened(config) as gateway:
            transport = httpx2.ASGITransport(app=make_app(gateway))
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
                told = [
                    await client.post(path, json={**body(), "input": "2+3?", **more}, headers=bearer(shown))
                    for path in (CHAT, RESPONSES)
                    for shown in (key, wrong, f"{key} {key}", f"{key}'; DROP TABLE keys; --")
                    for more in ({}, {"stream": True}, {"model": "selfroute-cloud"}, {"model": key}, {"n": key})
                ]
                told += [await client.post(CHAT, content=key, headers=bearer(key))]
                told += [await client.post(CHAT, json=body(), headers={"authorization": value}) for value in (key, "")]
                told += [
                    await client.get(path, headers=bearer(key))
                    for path in ("/v1/models", "/healthz", "/readyz", "/metrics", "/dashboard", "/v1/nothing")
                ]
                return told

    with Server(five, five, five, five, otherwise=tells_the_key) as cloud:
        config = GatewayConfig(
            device=Choice(name="tests.serving:NamedDevice", asks=True), keys=True, store=str(tmp_path / "g.sqlite"),
            cloud=Choice(name="openai", base_url=cloud.url, model="gpt-4.1", api_key_var="CANARY", max_retries=0),
        )  # fmt: skip
        told = asyncio.run(main(config))
        assert {exchange.headers["authorization"] for exchange in cloud.requests} == {f"Bearer {UPSTREAM_KEY}"}
    assert {200, 400, 401, 404, 502} <= {response.status_code for response in told}
    # The model is the client's own word, and is told again where there is none of it.
    said_back = [
        r
        for r in told
        if json.loads(r.request.content or "{}" if r.request.content[:1] == b"{" else "{}").get("model") == key
    ]
    texts = {r: r.text + repr(r.headers) for r in told if r not in said_back}
    for secret in (UPSTREAM_KEY, key, wrong):
        assert not [r for r, text in texts.items() if secret in text]
        assert secret not in caplog.text
        assert not any(secret.encode() in path.read_bytes() for path in tmp_path.glob("g.sqlite*"))


# Paths, headers, bodies.


@contextmanager
def gateway(device: ScriptedDevice, cloud: ScriptedCloud | None = None, **settings: Any) -> Iterator[httpx2.Client]:
    budget = MemoryBudget()
    pair = Pair(device, cloud or ScriptedCloud("five"), budget, MemoryRecorder(), idle_s=5)
    app = make_app(Gateway(GatewayConfig(**settings), pair, budget))
    with serving(app) as url, httpx2.Client(base_url=url, timeout=20) as client:
        yield client


CLOSE = b"Host: localhost\r\nConnection: close\r\n"


def raw(client: httpx2.Client, request: bytes) -> bytes:
    """What comes for bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


PATHS = [
    b"/v1/chat/completions/../../healthz", b"/v1/%63hat/completions/x", b"//evil.example/v1/models",
    b"/v1/..%2f..%2fetc", b"/%2e%2e/%2e%2e/etc/passwd", b"/v1/models%00", b"/v1/models%0d%0aX-Evil:%201",
    b"http://evil.example/v1/models/x",
]  # fmt: skip


def test_paths_lead_nowhere() -> None:
    device = ScriptedDevice(ANSWERS)
    with gateway(device) as client:
        for path in PATHS:
            head, _, rest = raw(client, b"GET " + path + b" HTTP/1.1\r\n" + CLOSE + b"\r\n").partition(b"\r\n\r\n")
            assert head.split()[1] in (b"400", b"404", b"405", b"421"), path
            assert b"evil" not in head.lower()
            assert b"passwd" not in rest or b"error" in rest
    assert not device.requests


HEADERS = [
    b"X-Selfroute-Policy: auto\r\nX-Selfroute-Policy: device-only\r\nX: 1", b"X-Selfroute-Policy: a\rX-Evil: 1",
    b"X-Selfroute-Policy: a\x00b", b"X-Selfroute-Request-Id: evil\r\nX-Forwarded-Host: evil.example",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers_make_no_headers(header: bytes) -> None:
    sent = json.dumps(body()).encode()
    with gateway(ScriptedDevice(ANSWERS)) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\n" + CLOSE + b"Content-Length: %d\r\n" % len(sent)
        told = raw(client, head + header + b"\r\n\r\n" + sent).partition(b"\r\n\r\n")[0]
        assert told.split()[1] in (b"200", b"400")
        assert b"evil" not in told.lower()


def test_what_a_client_writes_makes_no_header_and_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    nasty = "selfroute\r\nX-Evil: 1\r\n\r\n"
    with gateway(ScriptedDevice(ANSWERS)) as client:
        for changes in ({"model": nasty}, {"selfroute": {"policy": nasty}}, {nasty: nasty, "n": 2}):
            refused = client.post(CHAT, json=body(**changes))
            assert refused.status_code in (400, 404)
            assert "x-evil" not in refused.headers
    assert "X-Evil" not in caplog.text


def test_bodies_that_would_grow() -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    with gateway(ScriptedDevice(ANSWERS), max_body_bytes=100_000) as client:
        packed = gzip.compress(b" " * 50_000_000)
        for path in (CHAT, RESPONSES):
            assert client.post(path, content=packed, headers={"content-encoding": "gzip"}).status_code == 400
            assert client.post(path, content=deep).status_code == 400
            assert client.post(path, content=b'{"model": "' + b"x" * 100_000).status_code == 413
        # A chat's arguments are a text, however deep its own levels are.
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
        messages = [*body()["messages"], {"role": "assistant", "tool_calls": [call]}]
        assert client.post(CHAT, json=body(messages=messages)).status_code == 200


# The event stream.

NASTY = (
    '\n\ndata: {"choices": []}\n\n', "\r\rdata: [DONE]\r\r", "\r\nevent: error\r\nid: 1\r\n\r\n",
    "\u2028data: x\u2029", "\x00", ": comment\n",
)  # fmt: skip


def lines_of(response: httpx2.Response) -> list[bytes]:
    assert response.status_code == 200
    return [line for line in response.content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n") if line]


def test_no_text_makes_an_event() -> None:
    other = {"delta": {"refusal": NASTY[1]}, "\n\ndata: x": NASTY[2]}
    cloud = ScriptedCloud(*NASTY, CloudChunk(reasoning=NASTY[0]), CloudChunk(other=other))
    with gateway(ScriptedDevice(said(*NASTY, HELP_CALL)), cloud) as client:
        lines = lines_of(client.post(CHAT, json=body(NASTY[0], stream=True)))
        assert lines.pop() == b"data: [DONE]"
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        content = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
        assert content == "".join(NASTY)
        named = lines_of(client.post(RESPONSES, json={"model": "selfroute", "input": NASTY[0], "stream": True}))
        kinds = [line.removeprefix(b"event: ").decode() for line in named[::2]]
        assert [json.loads(line.removeprefix(b"data: "))["type"] for line in named[1::2]] == kinds


# The budget, and texts that look like help calls.


def test_who_makes_the_model_ask_drains_its_own_budget_alone(tmp_path: Path) -> None:
    greedy, modest = made_keys(tmp_path / "g.sqlite", Limits(calls_per_minute=2, usd_per_day=1.0), Limits())
    config = GatewayConfig(
        device=Choice(name="tests.serving:NamedDevice", asks=True),
        cloud=Choice(name="oracle", accuracy=1.0), budget=Limits(calls_per_minute=4),
        keys=True, store=str(tmp_path / "g.sqlite"),
    )  # fmt: skip

    question = Countdown(CountdownConfig()).load("test")[0].question

    async def main() -> list[list[tuple[str, str | None]]]:
        async with opened(config) as running:
            transport = httpx2.ASGITransport(app=make_app(running))
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:

                async def ask(key: str, **more: Any) -> tuple[str, str | None]:
                    asked = body(question, **more)
                    asked["messages"].insert(0, {"role": "user", "content": f"End with {HELP_CALL}"})
                    answered = await client.post(CHAT, json=asked, headers=bearer(key))
                    told = answered.json()
                    return (told["selfroute"]["route"], told["selfroute"]["denied"]) if "error" not in told else (
                        str(answered.status_code), told["error"]["code"]
                    )  # fmt: skip

                first = await asyncio.gather(*(ask(greedy[0], selfroute={"bias": 100}) for _ in range(10)))
                alone = await ask(greedy[0], model="selfroute-cloud")
                return [first, [alone], [await ask(modest[0]) for _ in range(3)]]

    first, alone, other = asyncio.run(main())
    assert sorted(first, key=str) == [("cloud", None)] * 2 + [("device", "calls_per_minute")] * 8
    assert alone == [("429", "budget_exceeded")]
    # The other key has what is left of the gateway's, which the first could not take.
    assert other == [("cloud", None)] * 2 + [("device", "calls_per_minute")]
    with sqlite3.connect(tmp_path / "g.sqlite") as connection:
        counted = dict(
            connection.execute("SELECT key_id, COUNT(*) FROM requests WHERE denied <> '' GROUP BY key_id").fetchall()
        )
    assert counted == {greedy[1]: 9, modest[1]: 1}


ECHOES: dict[str, Sequence[Step]] = {
    "mid-sentence": said(f"You wrote {HELP_CALL} in your text. ", "<answer>5</answer>"),
    "quoted code": said(f"```\nprint('{HELP_CALL}')\n```\n", "<answer>5</answer>"),
    "in the answer": said(f"so <answer>say {HELP_CALL} loudly</answer>"),
    "in thinking": said(f"<think>maybe {HELP_CALL}</think>", "<answer>5</answer>"),
    "half of it": said("<unknown> I need external assistance", " <answer>5</answer>"),
    "other words": said("<unknown> please help </unknown>", " <answer>5</answer>"),
    "other case": said(HELP_CALL.upper(), " <answer>5</answer>"),
    "escaped": said(HELP_CALL.replace("<", "&lt;"), " <answer>5</answer>"),
    "cut into letters": said(*f"As you say, {HELP_CALL} is a tag. <answer>5</answer>"),
}


@pytest.mark.parametrize("script", ECHOES.values(), ids=ECHOES)
def test_what_looks_like_a_help_call_is_none(script: Sequence[Step]) -> None:
    cloud = ScriptedCloud("five")
    with gateway(ScriptedDevice(script), cloud) as client:
        for content in (HELP_CALL, f"`{HELP_CALL}`", f"End with {HELP_CALL}"):
            for more in ({}, {"stream": True}):
                assert client.post(CHAT, json=body(content, **more)).status_code == 200
    assert not cloud.requests
