"""The gateway with OpenAI's own client, a cloud on a real socket, and each fault that has a documented behaviour."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.protocol import HELP_CALL
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from tests.servers import Exchange, Fault, Server, event, hang
from tests.serving import DOWN, MemoryBudget, MemoryRecorder, ScriptedDevice, Step, command, said, serving

KEY = "sk-canary-0123456789"
QUESTION: Any = [{"role": "user", "content": "2+3?"}]
ASKS = said("hard", "\n<unk", HELP_CALL.removeprefix("<unk"))
ANSWERS = said("2+3=5", "<answer>", "5", "</answer>")
WITHOUT_HELP = said("so 5 <answer>5</answer>")
USAGE = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


async def five(exchange: Exchange) -> None:
    await exchange.answer(event("fi"), event("ve", "stop"), USAGE)


@dataclass
class World:
    """A gateway between a scripted device and a cloud on a real socket."""

    device: ScriptedDevice
    cloud: Server
    settings: dict[str, Any] = field(default_factory=dict)
    idle_s: float = 30.0
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    recorder: MemoryRecorder = field(default_factory=MemoryRecorder)

    @contextmanager
    def client(self, **settings: Any) -> Iterator[OpenAI]:
        with self.cloud:
            values = {
                "base_url": self.cloud.url, "model": "gpt-4.1", "api_key_var": "TEST_CLOUD_KEY", "backoff_s": 0.01,
                "max_retries": 1, "connect_timeout_s": 1, "breaker_waits": False, **self.settings,
            }  # fmt: skip
            cloud = OpenAICloud(OpenAIConfig(**values))
            pair = Pair(self.device, cloud, self.budget, self.recorder, idle_s=self.idle_s)
            app = make_app(Gateway(GatewayConfig(), pair, self.budget))
            with (
                serving(app, cloud) as url,
                OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20) as client,
            ):
                yield client
        assert not self.budget.under_way


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CLOUD_KEY", KEY)


def test_the_openai_client() -> None:
    world = World(ScriptedDevice(ASKS), Server(otherwise=five))
    with world.client() as client:
        whole = client.chat.completions.create(model="selfroute", messages=QUESTION)
        assert whole.choices[0].message.content == "five"
        assert whole.choices[0].message.reasoning_content == "hard"  # type: ignore[attr-defined]
        assert whole.usage is not None
        assert whole.usage.total_tokens == 10 + 3 + 110
        assert whole.selfroute["cost_usd"] == pytest.approx(280e-6)  # type: ignore[attr-defined]
        with client.chat.completions.create(
            model="selfroute", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "five"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage == whole.usage
        assert [m.id for m in client.models.list()] == ["selfroute", "selfroute-device", "selfroute-cloud"]
        assert asyncio.run(asynchronously(str(client.base_url))) == ("five", "five")
        with pytest.raises(openai.NotFoundError, match="known: selfroute"):
            client.chat.completions.create(model="gpt-5", messages=QUESTION)
    # What the client sent, and nothing of ours.
    assert world.cloud.requests[0].body["messages"] == QUESTION
    assert world.budget.settled == pytest.approx([280e-6] * 4)


async def asynchronously(url: str) -> tuple[str | None, str]:
    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
        whole = await client.chat.completions.create(model="selfroute", messages=QUESTION)
        stream = await client.chat.completions.create(model="selfroute", messages=QUESTION, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)


def streamed_text(client: OpenAI, model: str, seen: list[str]) -> str:
    """The answer as it is streamed; what came of it before an error is in `seen`."""
    for chunk in client.chat.completions.create(model=model, messages=QUESTION, stream=True):
        seen.append(chunk.choices[0].delta.content or "")
    return "".join(seen)


async def calls_a_tool(exchange: Exchange) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    await exchange.answer(
        event("", tool_calls=[call]),
        event("", tool_calls=[{"index": 0, "function": {"arguments": '{"a":2}'}}]),
        event("", "tool_calls"), USAGE,
    )  # fmt: skip


def test_tools_and_json_mode_pass_through() -> None:
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    world = World(ScriptedDevice(ANSWERS), Server(otherwise=calls_a_tool))
    with world.client() as client:
        whole = client.chat.completions.create(model="selfroute", messages=QUESTION, tools=tools)
        (call,) = whole.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert (call.id, call.function.name, call.function.arguments) == ("c1", "add", '{"a":2}')
        assert whole.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(model="selfroute", messages=QUESTION, tools=tools) as stream:
            streamed = stream.get_final_completion()
        (again,) = streamed.choices[0].message.tool_calls or ()
        assert again.function.arguments == '{"a":2}'
        response = client.responses.create(model="selfroute", input="2+3?", tools=[{"name": "add", **tools[0]}])
        assert [item.type for item in response.output] == ["function_call"]
        client.chat.completions.create(model="selfroute", messages=QUESTION, response_format={"type": "json_object"})
    assert not world.device.requests
    assert all(r.body["tools"] for r in world.cloud.requests[:2])
    assert world.cloud.requests[-1].body["response_format"] == {"type": "json_object"}


def test_responses_with_the_openai_client() -> None:
    world = World(ScriptedDevice(ASKS), Server(otherwise=five))
    with world.client() as client:
        whole = client.responses.create(model="selfroute", instructions="Be brief.", input="2+3?")
        assert whole.output_text == "five"
        assert whole.status == "completed"
        assert whole.usage is not None
        assert whole.usage.total_tokens == 123
        with client.responses.stream(model="selfroute", input=[{"role": "user", "content": "2+3?"}]) as stream:
            kinds = [e.type for e in stream]
            assert stream.get_final_response().output_text == "five"
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
    assert world.cloud.requests[0].body["messages"] == [{"role": "system", "content": "Be brief."}, *QUESTION]


# The cloud's faults, and what becomes of a help call, of a request for the cloud alone, and of its money.


async def refuses_the_key(exchange: Exchange) -> None:
    await exchange.status(401, {"error": {"message": f"bad key {KEY}"}})


async def is_busy(exchange: Exchange) -> None:
    await exchange.status(429, {"error": {"message": "slow down"}}, Retry_After="300")


async def fails(exchange: Exchange) -> None:
    await exchange.status(500, {"error": {"message": "oops"}})


async def says_nonsense(exchange: Exchange) -> None:
    if exchange.body.get("stream"):
        await exchange.begin_stream()
        await exchange.events("{")
    else:
        await exchange.status(200, b"{")


async def is_cut_before_it_answers(exchange: Exchange) -> None:
    await exchange.answer(event("", reasoning_content="hm"), cut=True)


async def is_cut(exchange: Exchange) -> None:
    await exchange.answer(event("fi"), cut=True)


async def stalls(exchange: Exchange) -> None:
    await is_cut(exchange)
    await asyncio.sleep(60)


# No other test waits: on a busy machine any limit that short is met by chance.
IMPATIENT = {"first_byte_timeout_s": 0.4, "whole_timeout_s": 0.4, "idle_timeout_s": 0.4}
BEFORE: dict[str, tuple[Fault, int, str]] = {
    "wrong key": (refuses_the_key, 502, "cloud_unavailable"),
    "rate-limited": (is_busy, 429, "cloud_rate_limit"),
    "down": (fails, 502, "cloud_unavailable"),
    "slow": (hang, 502, "cloud_unavailable"),
    "nonsense": (says_nonsense, 502, "cloud_unavailable"),
    "cut before its answer": (is_cut_before_it_answers, 502, "cloud_unavailable"),
}


@pytest.mark.parametrize(("fault", "status", "code"), BEFORE.values(), ids=BEFORE)
def test_a_cloud_that_fails_before_its_answer(
    fault: Fault, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = IMPATIENT if fault is hang else {}
    world = World(ScriptedDevice(ASKS, WITHOUT_HELP), Server(otherwise=fault), settings)
    with world.client() as client:
        whole = client.chat.completions.create(model="selfroute", messages=QUESTION)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("5", "stop")
        assert world.device.requests[1].prefix == "hard\n"
        world.device.scripts = [ASKS, WITHOUT_HELP]
        assert streamed_text(client, "selfroute", []) == "5"
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="selfroute-cloud", messages=QUESTION)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        for secret in (KEY, "TEST_CLOUD_KEY", world.cloud.url):
            assert secret not in caught.value.response.text
        with pytest.raises(openai.APIError) as streamed:
            streamed_text(client, "selfroute-cloud", [])
        assert streamed.value.code == code
    assert [r.route for r in world.recorder.records] == ["device", "device", "cloud", "cloud"]
    assert [r.denied for r in world.recorder.records] == ["cloud", "cloud", "", ""]
    assert "cloud" in caplog.text
    assert KEY not in caplog.text
    # Two attempts at most, and no more money than was held back for them.
    assert len(world.cloud.requests) <= 8
    assert len(world.budget.settled) + world.budget.released == 4
    assert sum(r.cost_usd for r in world.recorder.records) == pytest.approx(sum(world.budget.settled))


@pytest.mark.parametrize("fault", [is_cut, stalls], ids=["cut", "stalled"])
def test_a_cloud_that_fails_in_its_answer(fault: Fault) -> None:
    settings = IMPATIENT if fault is stalls else {}
    world = World(ScriptedDevice(ASKS, WITHOUT_HELP, ASKS), Server(otherwise=fault), settings)
    with world.client() as client:
        # A client that takes it in one has seen nothing, so that the device can go on.
        whole = client.chat.completions.create(model="selfroute", messages=QUESTION)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("5", "stop")
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="selfroute-cloud", messages=QUESTION)
        assert (caught.value.status_code, caught.value.code) == (502, "cloud_unavailable")
        seen: list[str] = []
        with pytest.raises(openai.APIError, match="broke off"):
            streamed_text(client, "selfroute", seen)
        assert "".join(seen) == "fi"
        with client.responses.stream(model="selfroute", input="2+3?") as events:
            *_, last = events
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert last.response.error.message == "the cloud's answer broke off"
    # Two attempts each where nothing was told, one where some was.
    assert len(world.cloud.requests) == 6
    assert len(world.budget.settled) == 4


@pytest.mark.parametrize(
    "script", [[DOWN], ["2+", DOWN], [None], ["2+", None]], ids=["down", "broken", "hung", "stalled"]
)
def test_a_device_that_fails(script: list[Step]) -> None:
    world = World(ScriptedDevice(script), Server(otherwise=five), idle_s=0.4)
    with world.client() as client:
        assert client.chat.completions.create(model="selfroute", messages=QUESTION).choices[0].message.content == "five"
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="selfroute-device", messages=QUESTION)
        assert (caught.value.status_code, caught.value.code) == (503, "device_unavailable")
    assert len(world.cloud.requests) == 1
    assert world.device.stopped == 2


@pytest.mark.parametrize("script", [ASKS, said("2+3=", finish="length"), [DOWN]], ids=["asks", "cut", "down"])
def test_what_may_not_leave_the_machine_reaches_no_socket(script: list[Step]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        cloud = OpenAICloud(OpenAIConfig(base_url=url, model="gpt-4.1", connect_timeout_s=1, first_byte_timeout_s=0.3))
        budget = MemoryBudget()
        pair = Pair(ScriptedDevice(script), cloud, budget, MemoryRecorder(), idle_s=0.4)
        with serving(make_app(Gateway(GatewayConfig(), pair, budget)), cloud) as gateway:
            for body in ({"model": "selfroute-device"}, {"model": "selfroute", "selfroute": {"policy": "device-only"}}):
                for more in ({}, {"stream": True}, {"logprobs": True}):
                    asked = {**body, **more, "messages": QUESTION}
                    answered = httpx2.post(f"{gateway}/v1/chat/completions", json=asked, timeout=20)
                    assert answered.status_code in (200, 400, 503)
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_client_that_goes_away_cancels_the_cloud() -> None:
    world = World(ScriptedDevice(ASKS), Server(otherwise=stalls))
    with world.client() as client:
        stream = client.chat.completions.create(model="selfroute", messages=QUESTION, stream=True)
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        by = time.monotonic() + 10
        while not (world.recorder.records and world.cloud.left_early):
            assert time.monotonic() < by
            time.sleep(0.01)
    assert world.recorder.records[0].error == "client_gone"
    assert world.budget.settled == [world.recorder.records[0].cost_usd]


def test_the_command_drains_on_sigterm(tmp_path: Path) -> None:
    """The device is one of this test's own, named by its dotted path; the cloud is the oracle."""
    store = tmp_path / "gateway.sqlite"
    with command("device.name=tests.serving:NamedDevice", "device.pause_s=0.2", f"store={store}") as (process, url):
        with OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            stream = iter(client.chat.completions.create(model="selfroute", messages=QUESTION, stream=True))
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            content = "".join(c.choices[0].delta.content or "" for c in (first, *stream))
        assert content == "5"
        assert process.wait(20) == 0
        assert "Traceback" not in (process.stderr.read() if process.stderr else "")
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT route, status FROM requests").fetchall() == [("device", 200)]


@pytest.mark.slow
def test_a_gateway_whose_model_hangs_ends_all_the_same(tmp_path: Path) -> None:
    store = tmp_path / "gateway.sqlite"
    with command("device.name=tests.hanging:HangingDevice", "drain_s=1", f"store={store}") as (process, url):
        with OpenAI(base_url=url, api_key="any", max_retries=0) as client, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.chat.completions.create, model="selfroute-device", messages=QUESTION)
            assert process.stdout
            assert any("hangs" in line for line in process.stdout)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIStatusError) as refused:
                asked.result(60)
        assert refused.value.status_code == 503
        assert process.wait(60) == 0
        assert process.stderr
        assert "nobody waits for it any more" in process.stderr.read()


IN_PROCESS = "selfroute.device.hf:HFEngine"
"""Any class whose module needs torch."""


def test_without_torch_the_command_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['torch'] = None; from selfroute.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve", "port=0", f"device.name={IN_PROCESS}"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pip install 'selfroute[local]'" in done.stderr
    assert "Traceback" not in done.stderr
