"""The gateway over real sockets: what it answers, in which form, and whom it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import pytest
from starlette.types import Message
from tests.serving import (
    DOWN,
    UNREACHABLE,
    FakeKey,
    FakeKeys,
    MemoryBudget,
    MemoryRecorder,
    ScriptedCloud,
    ScriptedDevice,
    said,
    serving,
)  # fmt: skip

from selfroute.protocol import HELP_CALL
from selfroute.serve.account import Limits, Scope
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.chat import ChatWriter
from selfroute.serve.config import GatewayConfig
from selfroute.serve.events import Content, Course, Done, Tell
from selfroute.serve.handoff import Pair
from selfroute.serve.telling import Telling
from selfroute.serve.turns import Turns
from selfroute.types import CloudChunk

ASKS = said("hard", "\n<unk", HELP_CALL.removeprefix("<unk"))
ANSWERS = said("2+3=5", "<answer>", "5", "</answer>")
CHAT = {"model": "selfroute", "messages": [{"role": "user", "content": "2+3?"}]}


@dataclass
class World:
    """A gateway with what stands around it."""

    device: ScriptedDevice = field(default_factory=lambda: ScriptedDevice(ANSWERS))
    cloud: ScriptedCloud = field(default_factory=lambda: ScriptedCloud("fi", "ve"))
    limits: Limits = field(default_factory=Limits)
    keys: FakeKeys | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    keep_alive_s: float = 15.0

    @contextmanager
    def client(self) -> Iterator[httpx2.Client]:
        self.url = ""
        self.budget, self.recorder = MemoryBudget(self.limits), MemoryRecorder()
        config = GatewayConfig(**self.config)
        pair = Pair(self.device, self.cloud, self.budget, self.recorder, idle_s=60)
        self.gateway = Gateway(config, pair, self.budget, self.keys, keep_alive_s=self.keep_alive_s)
        with ExitStack() as stack:
            self.url = stack.enter_context(serving(make_app(self.gateway)))
            yield stack.enter_context(httpx2.Client(base_url=self.url, timeout=20))
        assert self.gateway.active == 0
        assert not self.budget.under_way


def post(client: httpx2.Client, headers: Mapping[str, str] | None = None, **changes: Any) -> httpx2.Response:
    return client.post("/v1/chat/completions", json={**CHAT, **changes}, headers=headers)


def events(response: httpx2.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "[DONE]" else json.loads(line) for line in (line.removeprefix("data: ") for line in lines)]


def until(condition: Callable[[], object]) -> None:
    by = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < by
        time.sleep(0.005)


def test_a_whole_answer() -> None:
    world = World(ScriptedDevice(ASKS))
    with world.client() as client:
        response = post(client)
    body = response.json()
    (choice,) = body["choices"]
    assert choice == {
        "index": 0, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "five", "reasoning_content": "hard"},
    }  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 30, "completion_tokens": 8, "total_tokens": 38}
    assert (body["object"], body["model"]) == ("chat.completion", "selfroute")
    assert body["selfroute"]["route"] == "cloud"
    assert body["selfroute"]["cost_usd"] == 0.002
    assert body["selfroute"]["device"]["completion_tokens"] == 3
    headers = response.headers
    assert (headers["x-selfroute-route"], headers["x-selfroute-cost-usd"]) == ("cloud", "0.002")
    assert float(headers["x-selfroute-score"]) == 1.5
    assert float(headers["x-selfroute-device-ms"]) > 0
    assert float(headers["x-selfroute-cloud-ms"]) >= 0
    (record,) = world.recorder.records
    assert headers["x-selfroute-request-id"] == record.id


def test_a_streamed_answer() -> None:
    world = World(ScriptedDevice(ASKS))
    with world.client() as client:
        response = post(client, stream=True, stream_options={"include_usage": True})
    *chunks, last, usage, done = events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in (*chunks, last, usage)}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "reasoning_content": "hard"}, {}, {"content": "fi"}, {"content": "ve"},
    ]  # fmt: skip
    assert chunks[1]["selfroute"] == {"turn": "cloud", "why": "help"}
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert last["selfroute"]["route"] == "cloud"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 38


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_what_the_cloud_tells_of_its_tokens_is_in_the_usage(path: str) -> None:
    cloud = ScriptedCloud("five")
    cloud.final = replace(cloud.final, cached_tokens=16, reasoning_tokens=4)
    with World(ScriptedDevice(ASKS), cloud).client() as client:
        usage = client.post(path, json={**CHAT, "input": "2+3?"}).json()["usage"]
    if path == "/v1/responses":
        assert usage["input_tokens_details"] == {"cached_tokens": 16, "cache_write_tokens": 0}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 4}
    else:
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
    # Of the device's nothing is known.
    assert usage["total_tokens"] == 38


def test_what_is_refused_does_not_count() -> None:
    world = World()
    with world.client() as client:
        assert post(client, selfroute={"redact": True}).status_code == 400
        assert world.budget.gateway.window.totals(time.time()) == (0, 0)
        assert post(client).status_code == 200
        assert world.budget.gateway.window.totals(time.time()) == (1, 0)


def test_an_infinite_score_is_none_in_json() -> None:
    device = ScriptedDevice(said("2+3=5", "<answer>", "5", "</answer>", score=math.inf))
    with World(device).client() as client:
        assert json.loads(post(client).text, parse_constant=pytest.fail)["selfroute"]["score"] is None


def test_the_cloud_alone_says_so_in_the_streams_headers() -> None:
    world = World()
    with world.client() as client:
        response = post(client, stream=True, model="selfroute-cloud")
    assert response.headers["x-selfroute-route"] == "cloud"
    assert not world.device.requests


def test_tool_calls_pass_through() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a": 2}'}}
    chunks = [CloudChunk(other={"delta": {"tool_calls": [part]}}) for part in (call, more)]
    tools = [{"type": "function", "function": {"name": "add"}}]
    world = World(cloud=ScriptedCloud(*chunks))
    with world.client() as client:
        whole = post(client, tools=tools, unheard_of={"a": 1}).json()
        streamed = events(post(client, tools=tools, stream=True))
    message = whole["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    ]
    assert [c["choices"][0]["delta"].get("tool_calls") for c in streamed[:2]] == [[call], [more]]
    assert world.cloud.requests[0].extra == {"tools": tools, "unheard_of": {"a": 1}}


def test_a_policy_of_the_requests_own() -> None:
    world = World(ScriptedDevice(ASKS))
    with world.client() as client:
        assert post(client, selfroute={"policy": "cloud-only"}).json()["selfroute"]["route"] == "cloud"
        assert not world.device.requests
        post(client, {"x-selfroute-policy": "device-only"}, selfroute={"bias": 2.0})
        assert (world.device.requests[0].forbid_help, world.device.requests[0].bias) == (True, 2.0)
        post(client, model="selfroute-device")
        assert world.device.requests[1].forbid_help
        assert len(world.cloud.requests) == 1


BAD: dict[str, tuple[Any, int, str | None]] = {
    "no object": ([1], 400, None),
    "no messages": ({"model": "selfroute"}, 400, "messages"),
    "empty messages": ({**CHAT, "messages": []}, 400, "messages"),
    "no role": ({**CHAT, "messages": [{"content": "x"}]}, 400, "messages.0.role"),
    "no model": ({"messages": CHAT["messages"]}, 400, "model"),
    "unknown model": ({**CHAT, "model": "gpt-5"}, 404, "model"),
    "several answers": ({**CHAT, "n": 2}, 400, "n"),
    "no tokens": ({**CHAT, "max_tokens": 0}, 400, "max_tokens"),
    "true tokens": ({**CHAT, "max_tokens": True}, 400, "max_tokens"),
    "hot": ({**CHAT, "temperature": 3}, 400, "temperature"),
    "top_p in words": ({**CHAT, "top_p": "most"}, 400, "top_p"),
    "a paid tier": ({**CHAT, "service_tier": "priority"}, 400, "service_tier"),
    "another provider": ({**CHAT, "provider": {"order": ["dear"]}}, 400, "provider"),
    "a paid search": ({**CHAT, "search_parameters": {"mode": "on"}}, 400, "search_parameters"),
    "another upstream": ({**CHAT, "base_url": "http://evil.example"}, 400, "base_url"),
    "another key": ({**CHAT, "api_key": None}, 400, "api_key"),
    "another account": ({**CHAT, "aws_region_name": "eu"}, 400, "aws_region_name"),
    "another model if that fails": ({**CHAT, "fallbacks": ["dear"]}, 400, "fallbacks"),
    "another model of a proxy": ({**CHAT, "litellm_params": {"model": "dear"}}, 400, "litellm_params"),
    "more tokens by another name": ({**CHAT, "n_predict": 100_000}, 400, "n_predict"),
    "fields in a field": ({**CHAT, "extra_body": {"n": 8}}, 400, "extra_body"),
    "a text that is a part": (
        {**CHAT, "messages": [{"role": "user", "content": {"text": "hi"}}]},
        400,
        "messages.0.content",
    ),
    "a paid tool": ({**CHAT, "tools": [{"type": "web_search"}]}, 400, "tools.0"),
    "no tools": ({**CHAT, "tools": 7}, 400, "tools"),
    "a file": ({**CHAT, "messages": [{"role": "user", "content": [{"type": "file"}]}]}, 400, "messages.0.content"),
    "an unknown option": ({**CHAT, "selfroute": {"polcy": "auto"}}, 400, "selfroute.polcy"),
    "an unknown policy": ({**CHAT, "selfroute": {"policy": "any"}}, 400, "selfroute.policy"),
    "redaction that there is not": ({**CHAT, "selfroute": {"redact": True}}, 400, "selfroute.redact"),
    "half a redaction": ({**CHAT, "selfroute": {"redact": "some"}}, 400, "selfroute.redact"),
    "two policies": ({**CHAT, "model": "selfroute-device", "selfroute": {"policy": "auto"}}, 400, "selfroute.policy"),
    "beyond the device alone": ({**CHAT, "model": "selfroute-device", "logprobs": True}, 400, "logprobs"),
}


def test_requests_that_cannot_be_answered() -> None:
    world = World()
    with world.client() as client:
        for name, (body, status, param) in BAD.items():
            response = client.post("/v1/chat/completions", json=body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), name
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
    assert not world.device.requests
    assert not world.cloud.requests


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b'{"a": NaN}', 400),
        (b"\xff\xfe", 400),
        (b'{"model": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400),
        (b" " * 5000, 413),
    ],
)
def test_bodies_that_are_none(body: bytes, status: int) -> None:
    with World(config={"max_body_bytes": 200_000 if body.startswith(b"[") else 4096}).client() as client:
        response = client.post("/v1/chat/completions", content=body)
        assert response.status_code == status
        assert response.json()["error"]["code"] in ("invalid_json", "body_too_large")
        pieces = client.post("/v1/chat/completions", content=iter([body[:2500], body[2500:]]))
        assert pieces.status_code == status


def test_other_paths_and_methods() -> None:
    with World().client() as client:
        for response in (client.get("/v1/chat/completions"), client.get("/v1/nothing"), client.post("/healthz")):
            assert response.status_code in (404, 405)
            request, message = response.request, response.json()["error"]["message"]
            assert message.startswith(f"{request.method} {request.url.path} is not served here, but POST /v1/chat/")
            assert response.json()["error"]["type"] in ("not_found_error", "invalid_request_error")


def test_a_fault_of_ours_has_the_apis_form_and_tells_nothing() -> None:
    class Broken(FakeKeys):
        async def check(self, authorization: str | None) -> FakeKey | None:
            raise KeyError("canary")

    with World(keys=Broken({})).client() as client:
        failed = post(client)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
    assert "canary" not in failed.text


def test_a_keep_alive_that_the_server_no_longer_takes_breaks_nothing() -> None:
    sent: list[Any] = []

    async def story(tell: Tell) -> None:
        await tell(Content("fi"))
        await asyncio.sleep(0.2)
        await tell(Content("ve"))
        await tell(Done("stop", Course()))

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body", b"").startswith(b": keep-alive"):
            raise RuntimeError("the response has ended")
        sent.append(message)

    writer = ChatWriter("id", "selfroute", usage=False)
    telling = Telling(story, writer, Course(), stream=True, headers={}, keep_alive_s=0.05)
    asyncio.run(telling({"type": "http"}, receive, send))
    assert sent[-1]["body"].endswith(b"data: [DONE]\n\n")


def test_models_and_health() -> None:
    world = World()
    with world.client() as client:
        models = client.get("/v1/models").json()
        assert [m["id"] for m in models["data"]] == ["selfroute", "selfroute-device", "selfroute-cloud"]
        assert client.get("/v1/models/selfroute-device").json() == models["data"][1]
        for unknown in ("gpt-5", "selfroute/x", "%0a"):
            refused = client.get(f"/v1/models/{unknown}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").status_code == 200
        for failure in (DOWN, RuntimeError("an engine of the user's own")):
            world.device.failure = failure
            assert client.get("/readyz").status_code == 503
            assert "engine" not in client.get("/readyz").text


def test_whoever_asks_for_readiness_the_device_is_asked_once_at_a_time() -> None:
    class Slow(ScriptedDevice):
        asked = 0

        async def ready(self) -> None:
            self.asked += 1
            await answers.wait()

    async def story() -> None:
        gateway = Gateway(GatewayConfig(), Pair(device, ScriptedCloud(), budget, MemoryRecorder()), budget)
        transport = httpx2.ASGITransport(make_app(gateway))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asking = [asyncio.create_task(client.get("/readyz")) for _ in range(8)]
            await asyncio.sleep(0.1)
            # Whoever goes takes no answer from the others.
            asking.pop(0).cancel()
            await asyncio.sleep(0.1)
            assert device.asked == 1
            answers.set()
            assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
            assert (await client.get("/readyz")).status_code == 200
            assert device.asked == 2

    answers, device, budget = asyncio.Event(), Slow(ANSWERS), MemoryBudget(Limits())
    asyncio.run(story())


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "[::2]:80"])
def test_a_host_name_that_is_not_ours(host: str) -> None:
    with World().client() as client:
        refused = client.get("/healthz", headers={"host": host})
        assert refused.status_code in (400, 421)
        assert repr(host.removesuffix(":80")) in refused.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:80", "gateway.example.org"])
def test_host_names_that_are_ours(host: str) -> None:
    with World(config={"hosts": ["gateway.example.org"]}).client() as client:
        assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_the_address_that_is_listened_on_is_a_name_of_ours() -> None:
    with World(config={"host": "FD00::1", "keys": True}).client() as client:
        assert client.get("/healthz", headers={"host": "[fd00::1]:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("LOCALHOST:8000", "http://LocalHost:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("gateway.example.org", "https://gateway.example.org", 200),
        # A proxy that asks under another name.
        ("127.0.0.1:8000", "https://gateway.example.org", 200),
        ("127.0.0.1:8000", "https://gateway.example.org:8443", 403),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "http://localhost", 403),
        ("localhost:8000", "https://evil.example", 403),
        ("localhost:8000", "https://localhost:8000.evil.example", 403),
        ("localhost:8000", "https://evil.example/localhost:8000", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(host: str, origin: str, status: int) -> None:
    world = World(config={"hosts": ["gateway.example.org"]})
    with world.client() as client:
        assert post(client, {"host": host, "origin": origin}).status_code == status
    assert len(world.device.requests) == (status == 200)


def test_keys() -> None:
    scope = Scope("key:k2", Limits())
    keys = FakeKeys(
        {
            "Bearer all": FakeKey(),
            "Bearer some": FakeKey(frozenset({"device-only"}), frozenset({"selfroute-device"}), scope),
        }
    )
    world = World(keys=keys, config={"keys": True})
    with world.client() as client:
        for headers, why in (({}, "a key is needed"), ({"authorization": "Bearer no"}, "revoked or has expired")):
            refused = post(client, headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert why in refused.json()["error"]["message"]
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert post(client, {"authorization": "Bearer all"}).status_code == 200
        some = {"authorization": "Bearer some"}
        assert [m["id"] for m in client.get("/v1/models", headers=some).json()["data"]] == ["selfroute-device"]
        assert client.get("/v1/models/selfroute", headers=some).status_code == 404
        assert client.get("/v1/models/selfroute").status_code == 401
        unknown = post(client, some)
        assert unknown.status_code == 404
        assert unknown.json()["error"]["message"] == "no model 'selfroute' for this key (known: selfroute-device)"
        assert post(client, some, model="selfroute-device").status_code == 200
        assert world.recorder.records[-1].key_id == "k2"
        assert client.get("/healthz").status_code == 200
        keys.down = True
        assert post(client, some).status_code == 503


def test_a_key_that_may_not_ask_for_a_policy() -> None:
    keys = FakeKeys({"Bearer some": FakeKey(frozenset({"device-only"}))})
    with World(keys=keys, config={"keys": True}).client() as client:
        refused = post(client, {"authorization": "Bearer some"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "policy_not_allowed")


def test_too_many_requests_a_minute() -> None:
    with World(limits=Limits(requests_per_minute=1)).client() as client:
        assert post(client).status_code == 200
        refused = post(client)
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 63


class HeldTurns(Turns):
    """Turns that nobody gets before they are `given`."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.waiting = threading.Event(), 0

    async def mine(self) -> None:
        self.waiting += 1
        try:
            while not self.given.is_set():
                await asyncio.sleep(0.002)
        finally:
            self.waiting -= 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_each_request_waits_for_its_turn(path: str) -> None:
    world, turns = World(), HeldTurns()
    with world.client() as client, ThreadPoolExecutor(1) as pool:
        world.gateway.turns = turns
        waits = pool.submit(client.post, path, json={**CHAT, "input": "2+3?"})
        until(lambda: turns.waiting)
        time.sleep(0.1)
        # It takes a place, and has not begun; what takes no work does not wait.
        assert (world.gateway.active, world.budget.gateway.window.totals(time.time())[0]) == (1, 0)
        for other in ("/healthz", "/metrics", "/v1/models", "/v1/models/selfroute"):
            assert client.get(other).status_code == 200
        turns.given.set()
        assert waits.result().status_code == 200
    (record,) = world.recorder.records
    # Waiting is part of what a request takes.
    assert record.total_ms > 100


def test_whoever_is_refused_waits_for_no_turn_and_takes_no_place() -> None:
    keys = FakeKeys({f"Bearer {name}": FakeKey(scope=Scope(f"key:{name}", Limits())) for name in ("one", "two")})
    one, two = ({"authorization": f"Bearer {name}"} for name in ("one", "two"))
    config = {"keys": True, "max_concurrent": 3, "max_concurrent_per_key": 1}
    world, turns = World(keys=keys, config=config), HeldTurns()
    with world.client() as client, ThreadPoolExecutor(2) as pool:
        world.gateway.turns = turns
        waits = [pool.submit(post, client, one)]
        until(lambda: turns.waiting == 1)
        for _ in range(4):
            assert post(client, {"authorization": "Bearer stranger"}).status_code == 401
            assert post(client, one).status_code == 429
        waits.append(pool.submit(post, client, two))
        until(lambda: turns.waiting == 2)
        assert world.gateway.active == 2
        turns.given.set()
        assert [w.result().status_code for w in waits] == [200, 200]


def test_a_client_that_leaves_before_its_turn_costs_nothing() -> None:
    world, turns = World(), HeldTurns()
    with world.client() as client:
        world.gateway.turns = turns
        with pytest.raises(httpx2.ReadTimeout):
            client.post("/v1/chat/completions", json=CHAT, timeout=0.1)
        turns.given.set()
        until(lambda: not world.gateway.active)
        assert world.budget.gateway.window.totals(time.time())[0] == 0
    assert not world.device.requests
    assert not world.recorder.records


def test_a_request_that_waits_for_its_turn_is_told_when_the_server_ends() -> None:
    async def run() -> tuple[list[Message], int, int]:
        world, turns, sent = World(), HeldTurns(), list[Message]()
        budget = MemoryBudget(world.limits)
        pair = Pair(world.device, world.cloud, budget, MemoryRecorder(), idle_s=60)
        gateway = Gateway(GatewayConfig(), pair, budget, turns=turns)

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps(CHAT).encode()}

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"host", b"localhost")]}
        request = asyncio.ensure_future(make_app(gateway)(scope, receive, send))
        while not turns.waiting:
            await asyncio.sleep(0)
        request.cancel()
        await request
        return sent, gateway.active, turns.waiting

    (start, _), active, waiting = asyncio.run(run())
    assert (start["status"], active, waiting) == (503, 0, 0)


def test_too_many_requests_at_a_time() -> None:
    world = World(ScriptedDevice(["2+", None], ANSWERS), config={"max_concurrent": 1})
    with world.client() as client, ExitStack() as stack:
        first = stack.enter_context(client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}))
        # Kept: an iterator that is let go closes the connection.
        pieces = first.iter_raw()
        assert next(pieces).startswith(b"data: ")
        refused = post(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.get("/healthz").status_code == 200


def test_no_key_takes_all_places() -> None:
    keys = FakeKeys({f"Bearer {name}": FakeKey(scope=Scope(f"key:{name}", Limits())) for name in ("one", "two")})
    one, two = ({"authorization": f"Bearer {name}"} for name in ("one", "two"))
    world = World(ScriptedDevice(["2+", None], ANSWERS), keys=keys, config={"keys": True, "max_concurrent_per_key": 1})
    with world.client() as client:
        stream = {**CHAT, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=stream, headers=one) as first:
            pieces = first.iter_raw()
            assert next(pieces).startswith(b"data: ")
            refused = post(client, one)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "too_many_requests"
            # A request that is refused takes no place, nor does one of another endpoint.
            assert client.get("/v1/models", headers=one).status_code == 200
            assert post(client, two).status_code == 200
            asked = client.post("/v1/responses", json={"model": "selfroute", "input": "2+3?"}, headers=one)
            assert asked.status_code == 429
        until(lambda: not world.gateway.active_of)
        # Who has an answer, or a refusal, may ask again at once.
        for _ in range(50):
            assert post(client, one).status_code == 200
            assert post(client, one, model="no-such-model").status_code == 404
            assert len(events(post(client, one, stream=True))) > 2
    assert not world.gateway.active_of


def test_an_error_before_the_first_byte_has_a_status_of_its_own() -> None:
    world = World(ScriptedDevice([DOWN]), ScriptedCloud(UNREACHABLE))
    with world.client() as client:
        for stream in (False, True):
            response = post(client, stream=stream)
            assert response.status_code == 502
            assert response.json()["error"]["code"] == "cloud_unavailable"
            assert "x-selfroute-request-id" in response.headers


def test_an_error_in_the_middle_of_a_stream() -> None:
    world = World(ScriptedDevice(ASKS), ScriptedCloud("fi", UNREACHABLE))
    with world.client() as client:
        *_, before, error = events(post(client, stream=True))
        assert before["choices"][0]["delta"] == {"content": "fi"}
        assert error["error"]["code"] == "cloud_broke_off"
        assert post(client).status_code == 502


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_device(stream: bool) -> None:
    world = World(ScriptedDevice(["2+", None]))
    with world.client() as client:
        body = json.dumps({**CHAT, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: world.device.waiting.is_set())
        until(lambda: world.recorder.records)
        assert world.device.stopped == 1
    assert world.recorder.records[0].error == "client_gone"


def test_a_silent_stream_is_kept_alive() -> None:
    world = World(ScriptedDevice(ANSWERS, pause_s=0.12), keep_alive_s=0.05)
    with world.client() as client:
        text = post(client, stream=True).text
    assert text.startswith(": keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_what_a_model_says_cannot_make_an_event() -> None:
    evil = 'x\r\ndata: {"a": 1}\r\n\r\n\u2028event: e\x00'
    world = World(ScriptedDevice(said(evil + "y<answer>5</answer>")))
    with world.client() as client:
        first, *_ = events(post(client, stream=True))
    assert first["choices"][0]["delta"]["reasoning_content"] == evil + "y"


def test_many_streams_at_a_time_lose_and_mix_nothing() -> None:
    pieces = [f"{number} " for number in range(20)]
    world = World(ScriptedDevice(said(*pieces, "<answer>5</answer>"), pause_s=0.001))

    async def ask(client: httpx2.AsyncClient, number: int) -> str:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True, "user": str(number)})
        *chunks, _ = events(response)
        (name,) = {chunk["id"] for chunk in chunks}
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "".join(pieces).strip()
        assert [d["content"] for d in deltas if "content" in d] == ["5"]
        return name

    async def all_of_them() -> list[str]:
        async with httpx2.AsyncClient(base_url=world.url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    with world.client():
        assert len(set(asyncio.run(all_of_them()))) == 64
    assert len(world.recorder.records) == 64
