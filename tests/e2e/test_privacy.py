"""What leaves a gateway as its config names it: real engines, clouds, workers and store, and a witness of sockets."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import pytest

from selfroute.config import Choice
from selfroute.errors import ConfigError
from selfroute.protocol import HELP_CALL
from selfroute.serve.app import make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.privacy import Privacy
from selfroute.serve.server import opened
from tests.servers import Exchange, Server, event
from tests.sockets import watched

T = TypeVar("T")

MAIL, PHONE = "ann.roe@example.org", "212-555-0187"
ASKING = Choice(name="tests.serving:NamedDevice", asks=True)
USAGE = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


async def asks(exchange: Exchange) -> None:
    """An engine whose model asks for help, always."""
    path = exchange.headers[":path"]
    if path.endswith("/models HTTP/1.1"):
        await exchange.status(200, {"data": [{"id": "tiny", "owned_by": "llamacpp"}]})
    elif path.endswith("/health HTTP/1.1"):
        await exchange.status(200, {"status": "ok"})
    else:
        await exchange.begin_stream()
        await exchange.events(event(f"hard, {MAIL}\n{HELP_CALL}"), event("", "stop"), "[DONE]")


async def writes(exchange: Exchange) -> None:
    """A cloud that repeats what it was told, a character at a time."""
    said = " ".join(m["content"] for m in exchange.body["messages"] if isinstance(m.get("content"), str))
    await exchange.answer(*(event(c) for c in f"You said: {said} <EMAIL_99>"), event("", "stop"), USAGE)


def served(config: GatewayConfig, use: Callable[[httpx2.AsyncClient], Awaitable[T]]) -> T:
    """What becomes of a gateway's use, without a socket between."""

    async def main() -> T:
        async with opened(config) as gateway:
            transport = httpx2.ASGITransport(app=make_app(gateway))
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                return await use(client)

    return asyncio.run(main())


def cloud_at(server: Server, **settings: Any) -> Choice:
    return Choice(name="openai", base_url=server.url, model="gpt-4.1", connect_timeout_s=1, max_retries=0, **settings)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "selfroute", "messages": [{"role": "user", "content": f"Write to {MAIL}"}], **changes}


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (path, {**asked, **how, **more})
    for how in ({"model": "selfroute-device"}, {"selfroute": {"policy": "device-only"}})
    for more in ({}, {"stream": True}, {"tools": [{"type": "function", "name": "f", "function": {"name": "f"}}]})
    for path, asked in ((CHAT, body()), (RESPONSES, {"model": "selfroute", "input": f"Write to {MAIL}"}))
]


def test_device_only_opens_no_socket_but_to_the_device(tmp_path: Path) -> None:
    with Server(otherwise=asks) as engine, Server(otherwise=writes) as cloud:
        config = GatewayConfig(
            device=Choice(name="http", base_url=engine.url), cloud=cloud_at(cloud), store=str(tmp_path / "g.sqlite"),
            max_tokens=16,
        )  # fmt: skip

        async def alone(client: httpx2.AsyncClient) -> set[int]:
            return {(await client.post(path, json=asked)).status_code for path, asked in REQUESTS}

        async def pair(client: httpx2.AsyncClient) -> int:
            return (await client.post(CHAT, json=body())).status_code

        with watched() as seen:
            assert served(config, alone) == {200, 400}
        assert seen
        assert {str(port_of(address)) for address in seen} == {str(urlsplit(engine.url).port)}
        assert not cloud.requests
        # The witness sees the cloud where it is asked.
        with watched() as seen:
            assert served(config, pair) == 200
        assert urlsplit(cloud.url).port in {port_of(address) for address in seen}
    # Nor where the device is down.
    with watched() as seen:
        assert served(config, alone) == {400, 503}
    assert {port_of(address) for address in seen} == {urlsplit(engine.url).port}


def port_of(address: Any) -> Any:
    return address[1] if isinstance(address, tuple) else address


RULES = """
[[rules]]
name = "falcon"
words = ["Project Falcon"]
action = "block"

[[rules]]
name = "tickets"
regex = 'TCK-\\d{6}'
action = "redact"
"""


def test_what_the_cloud_never_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules, store = tmp_path / "rules.toml", tmp_path / "g.sqlite"
    rules.write_text(RULES)
    secrets = (MAIL, PHONE, "TCK-004711")
    tool = {"type": "function", "function": {"name": "call", "description": f"Calls {PHONE}"}}
    messages = [
        {"role": "user", "content": f"Write to {MAIL}, TCK-004711"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "call", "arguments": json.dumps({"to": MAIL})}}]},
        {"role": "tool", "tool_call_id": "c1", "content": f'{{"phone": "{PHONE}"}}'},
    ]  # fmt: skip

    with Server(otherwise=writes) as cloud:
        config = GatewayConfig(
            device=ASKING, cloud=cloud_at(cloud), store=str(store), handoff="reasoning",
            privacy=Privacy(redact="always", rules=str(rules), timeout_s=30),
        )  # fmt: skip

        async def use(client: httpx2.AsyncClient) -> list[Any]:
            whole = (await client.post(CHAT, json=body())).json()
            streamed = await client.post(CHAT, json=body(messages=messages, tools=[tool], stream=True))
            responses = (await client.post(RESPONSES, json={"model": "selfroute", "input": f"Call {PHONE}"})).json()
            kept = (
                await client.post(CHAT, json=body(messages=[{"role": "user", "content": "project  falcon"}]))
            ).json()
            refused = await client.post(
                CHAT, json=body(model="selfroute-cloud", messages=[{"role": "user", "content": "Project Falcon, 1963"}])
            )
            return [whole, streamed.text, responses, kept, refused]

        whole, streamed, responses, kept, refused = served(config, use)
        sent = "\n".join(json.dumps(exchange.body) for exchange in cloud.requests)
        assert len(cloud.requests) == 3
    assert not any(secret in sent for secret in secrets)
    assert "2+3=6" in sent
    assert whole["choices"][0]["message"]["content"].startswith(f"You said: Write to {MAIL}\n\n")
    assert whole["choices"][0]["message"]["content"].endswith(" <EMAIL_99>")
    assert whole["selfroute"]["redacted"] == {"EMAIL": 1}
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events)
    assert text == f'You said: Write to {MAIL}, TCK-004711 {{"phone": "{PHONE}"}} <EMAIL_99>'
    assert events[-1]["selfroute"]["redacted"] == {"EMAIL": 1, "PHONE": 1, "tickets": 1}
    assert responses["output"][-1]["content"][0]["text"].startswith(f"You said: Call {PHONE}")
    assert (kept["selfroute"]["route"], kept["selfroute"]["denied"], kept["selfroute"]["rule"]) == (
        "device",
        "rule",
        "falcon",
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "rule")
    assert "1963" not in refused.text
    with sqlite3.connect(store) as connection:
        rows = connection.execute("SELECT denied, rule, redacted, status FROM requests ORDER BY at").fetchall()
    assert rows[0] == ("", "", '{"EMAIL": 1}', 200)
    assert rows[-2:] == [("rule", "falcon", "", 200), ("rule", "falcon", "", 403)]
    kept_bytes = b"".join(path.read_bytes() for path in tmp_path.glob("g.sqlite*"))
    assert not any(secret.encode() in kept_bytes or secret in caplog.text for secret in (*secrets, "1963"))


def test_a_rule_file_with_faults_stops_the_start(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rules]]\nname = 'a'\naction = 'block'\n[[rules]]\nname = 'b'\naction = 'drop'\nregex = '('\n")
    config = GatewayConfig(device=ASKING, store=str(tmp_path / "g.sqlite"), privacy=Privacy(rules=str(rules)))
    with pytest.raises(ConfigError) as caught:
        served(config, lambda client: asyncio.sleep(0))
    assert "rules[0] 'a' needs exactly one of" in str(caught.value)
    assert "rules[1] 'b' action" in str(caught.value)
