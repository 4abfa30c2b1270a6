"""What a client of the gateway sends on to the cloud and gets back, and what it may cost."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.servers import Exchange, Fault, Server, event, hang, reply

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.cloud.memory import Cloud
from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.errors import CloudError
from selfroute.protocol import cloud_request, handed_over
from selfroute.tasks.countdown import Countdown, CountdownConfig
from selfroute.types import Bill, CloudChunk, CloudRequest

MESSAGES = ({"role": "user", "content": "two and two?"},)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


async def asked(
    server: Server,
    request: CloudRequest,
    bill: Bill | None = None,
    *,
    leave_after: int | None = None,
    whole: bool = False,
    **changes: Any,
) -> list[CloudChunk]:
    values = {"base_url": server.url, "model": "gpt-4.1", "backoff_s": 0.01, "max_retries": 2, **changes}
    cloud = OpenAICloud(OpenAIConfig(**values))
    try:
        chunks = []
        async with aclosing(cloud.stream(request, bill, whole=whole)) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == leave_after:
                    break
        return chunks
    finally:
        await cloud.aclose()


def ask(server: Server, extra: Mapping[str, Any], /, **changes: Any) -> list[CloudChunk]:
    return asyncio.run(asked(server, CloudRequest(MESSAGES, temperature=None, extra=extra), **changes))


async def four(exchange: Exchange) -> None:
    await exchange.begin_stream()
    await exchange.events(event("four", "stop"), {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}, "[DONE]")


async def unavailable(exchange: Exchange) -> None:
    await exchange.status(503, {"error": {"message": "later"}})


async def failing(exchange: Exchange) -> None:
    await exchange.status(500, {"error": {"message": "oops"}})


def test_a_clients_fields_are_sent_on_as_they_are() -> None:
    extra = {
        "tools": TOOLS,
        "response_format": {"type": "json_object"},
        "unheard_of": [1],
        "temperature": 0.3,
        "top_p": 1,
    }
    with Server(four) as server:
        ask(server, extra, extra={"reasoning_effort": "low"})
        [request] = server.requests
    assert request.body == {
        **extra, "model": "gpt-4.1", "messages": list(MESSAGES), "max_tokens": 8192, "reasoning_effort": "low",
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "sent"),
    [({}, 8192), ({"max_tokens": 50}, 50), ({"max_completion_tokens": 60}, 60), ({"max_tokens": 10**6}, 8192)],
)
def test_a_clients_token_limit_counts_where_it_is_lower(extra: dict[str, int], sent: int) -> None:
    with Server(four) as server:
        ask(server, extra, max_tokens_field="max_completion_tokens")
        [request] = server.requests
    assert request.body["max_completion_tokens"] == sent
    assert "max_tokens" not in request.body


def test_a_client_cannot_choose_the_model_or_what_is_streamed() -> None:
    with Server(four) as server:
        ask(server, {"model": "gpt-5", "messages": [], "stream": False, "stream_options": {}})
        [request] = server.requests
    assert (request.body["model"], request.body["messages"]) == ("gpt-4.1", list(MESSAGES))
    assert (request.body["stream"], request.body["stream_options"]) == (True, {"include_usage": True})


def test_no_temperature_where_the_endpoint_takes_none() -> None:
    with Server(four) as server:
        ask(server, {"temperature": 0.3}, send_temperature=False)
        [request] = server.requests
    assert "temperature" not in request.body


async def calls_a_tool(exchange: Exchange) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    await exchange.begin_stream()
    await exchange.events(
        event("", role="assistant", refusal=None, tool_calls=[call]),
        event("", tool_calls=[{"index": 0, "function": {"arguments": '{"a":2}'}}]),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls", "logprobs": {"content": []}}]},
        "[DONE]",
    )


def test_tool_calls_come_back_as_they_are() -> None:
    with Server(calls_a_tool) as server:
        first, second, third, last = ask(server, {"tools": TOOLS})
    assert first.other["delta"]["tool_calls"][0]["function"]["name"] == "add"
    assert second.other == {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":2}'}}]}}
    assert third.other == {"logprobs": {"content": []}}
    assert last.finish_reason == "tool_calls"
    assert last.final is not None


def worst_usd(request: CloudRequest, **changes: Any) -> float:
    cloud = OpenAICloud(OpenAIConfig(base_url="http://127.0.0.1:9/v1", model="gpt-4.1", **changes))
    return cloud.worst_usd(request) * 1e6


def test_the_worst_case_counts_tools_images_and_the_clients_limit() -> None:
    plain = worst_usd(CloudRequest(MESSAGES, extra={"max_tokens": 10}))
    assert plain == pytest.approx((len(json.dumps(MESSAGES[0])) + len('{"max_tokens": 10}')) * 2.0 + 10 * 8.0)
    assert (
        worst_usd(CloudRequest(MESSAGES, extra={"max_tokens": 10, "tools": TOOLS})) > plain + len(json.dumps(TOOLS)) * 2
    )
    image = {"type": "image_url", "image_url": {"url": "https://example.org/large.png"}}
    seen = CloudRequest(({"role": "user", "content": [image, image]},), extra={"max_tokens": 10})
    # Of gpt-4o-mini, an image in high detail takes 2,833 + 8 * 5,667 tokens.
    assert worst_usd(seen) > 2 * (2_833 + 8 * 5_667) * 2.0


def billed(*script: Fault, limit: int = 2, **changes: Any) -> tuple[Bill, float, int, CloudError | None]:
    """The bill in the end, the worst case of an attempt, the attempts, and the error if there is one."""
    request = CloudRequest(MESSAGES)
    with Server(*script, otherwise=four) as server:
        worst = worst_usd(request) / 1e6
        bill = Bill(worst, limit)
        try:
            asyncio.run(asked(server, request, bill, **changes))
        except CloudError as error:
            return bill, worst, len(server.requests), error
        return bill, worst, len(server.requests), None


def test_a_bill_is_what_the_answer_costs() -> None:
    bill, _, attempts, error = billed()
    assert (bill.usd, attempts, error) == (pytest.approx(280e-6), 1, None)


def test_attempts_that_were_not_taken_on_cost_nothing() -> None:
    bill, _, attempts, error = billed(unavailable, unavailable, limit=1)
    assert (bill.usd, attempts, error) == (pytest.approx(280e-6), 3, None)


def test_attempts_that_broke_off_are_repeated_as_far_as_the_bill_goes() -> None:
    bill, worst, attempts, error = billed(failing)
    assert (bill.usd, attempts, error) == (pytest.approx(280e-6 + worst), 2, None)
    bill, worst, attempts, error = billed(failing, failing)
    assert (bill.usd, attempts) == (pytest.approx(2 * worst), 2)
    assert error is not None
    assert error.status == 500


def test_leaving_early_is_billed_at_the_worst() -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.events(event("fo"))
        await asyncio.sleep(60)

    bill, worst, _, error = billed(slow, leave_after=1)
    assert (bill.usd, error) == (pytest.approx(worst), None)


def test_being_cancelled_before_the_first_byte_is_billed_at_the_worst() -> None:
    async def run(server: Server, bill: Bill) -> None:
        asking = asyncio.create_task(asked(server, CloudRequest(MESSAGES), bill))
        while not server.requests:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    with Server(hang) as server:
        bill = Bill(worst_usd(CloudRequest(MESSAGES)) / 1e6, attempts=2)
        asyncio.run(run(server, bill))
    assert bill.usd == bill.worst_usd


@pytest.mark.parametrize(("status", "wait"), [(429, "300"), (401, None), (400, None)])
def test_an_error_says_the_providers_status(status: int, wait: str | None) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.status(status, {"error": {"message": "no"}}, **({"Retry_After": wait} if wait else {}))

    error = billed(refuse)[-1]
    assert error is not None
    assert (error.status, error.retry_after_s) == (status, float(wait) if wait else None)


def test_a_provider_that_is_down_is_not_waited_for_if_nobody_may() -> None:
    async def run(server: Server) -> list[str]:
        values = {"max_retries": 0, "breaker_failures": 2, "breaker_cooldown_s": 60, "breaker_waits": False}
        cloud = OpenAICloud(OpenAIConfig(base_url=server.url, model="gpt-4.1", **values))
        errors = []
        for _ in range(3):
            try:
                await cloud.complete(CloudRequest(MESSAGES))
            except CloudError as error:
                errors.append(str(error))
        await cloud.aclose()
        return errors

    with Server(otherwise=unavailable) as server:
        *_, last = asyncio.run(asyncio.wait_for(run(server), 10))
        assert len(server.requests) == 2
    assert "answers 503" in last
    assert "stays down" in last


def test_cache_keys_are_what_they_were(tmp_path: Path) -> None:
    oracle = Oracle(OracleConfig())
    cloud = Cloud(oracle, tmp_path / "cloud.sqlite")
    request = cloud_request("Q")
    as_before = {
        "client": dict(oracle.identity),
        "request": {"messages": list(request.messages), "max_tokens": 2048, "temperature": 0.0, "sample_index": 0},
    }
    canonical = json.dumps(as_before, sort_keys=True, separators=(",", ":"))
    assert cloud.key(request) == hashlib.sha256(canonical.encode()).hexdigest()
    assert cloud.key(CloudRequest(request.messages, extra={"seed": 1})) != cloud.key(request)
    cloud.close()


def test_the_oracle_gives_its_tags_to_whom_asks_for_them() -> None:
    question = Countdown(CountdownConfig()).load("test")[0].question
    oracle = Oracle(OracleConfig(accuracy=1.0))
    with_tags = asyncio.run(oracle.complete(cloud_request(question))).text
    conversation = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    bare = CloudRequest(handed_over(conversation, "1:2+3=5?"))

    async def streamed(bill: Bill) -> str:
        return "".join([chunk.text async for chunk in oracle.stream(bare, bill)])

    bill = Bill(1.0)
    assert f"<answer>{asyncio.run(streamed(bill))}</answer>" == with_tags
    assert bill.usd == oracle.worst_usd(bare) > 0


def test_a_whole_answer_is_asked_for_in_one_and_says_the_same() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":2}'}}
    said = reply("four", message={"reasoning_content": "2+2", "tool_calls": [call, call], "refusal": None})
    said["choices"][0]["logprobs"] = {"content": []}
    with Server(lambda exchange: exchange.status(200, said)) as server:
        chunks = ask(server, {"stream": True, "stream_options": {}}, whole=True)
        [request] = server.requests
    assert not {"stream", "stream_options"} & set(request.body)
    *pieces, last = chunks
    assert [(c.reasoning, c.text) for c in pieces if c.text or c.reasoning] == [("2+2", "four")]
    assert [c.other for c in pieces if c.other] == [
        {"logprobs": {"content": []}},
        {"delta": {"tool_calls": [{**call, "index": 0}]}},
        {"delta": {"tool_calls": [{**call, "index": 1}]}},
    ]
    assert last.final is not None
    assert (last.final.text, last.final.cost_usd, last.finish_reason) == ("four", pytest.approx(280e-6), "stop")


async def cut(exchange: Exchange) -> None:
    await exchange.answer(event("fo"), cut=True)


def test_a_whole_answer_that_breaks_off_is_asked_for_again_as_far_as_the_bill_goes() -> None:
    async def main(server: Server, attempts: int) -> tuple[float, float]:
        request = CloudRequest(MESSAGES, temperature=None)
        worst_usd = OpenAICloud(OpenAIConfig(base_url=server.url, model="gpt-4.1")).worst_usd(request)
        bill = Bill(worst_usd, attempts)
        if attempts < 2:
            with pytest.raises(CloudError, match="1 attempt"):
                await asked(server, request, bill, whole=True)
        else:
            assert "".join([c.text for c in await asked(server, request, bill, whole=True)]) == "four"
        return bill.usd, worst_usd

    with Server(cut) as server:
        usd, worst_usd = asyncio.run(main(server, 1))
        assert usd == pytest.approx(worst_usd)
        assert len(server.requests) == 1
    with Server(cut) as server:
        usd, worst_usd = asyncio.run(main(server, 2))
        assert usd == pytest.approx(worst_usd + 280e-6)
        assert len(server.requests) == 2


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "said",
    [{"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": "{}"}}]}, {"refusal": "no"}],
)
def test_what_stands_in_the_place_of_a_text_is_an_answer(whole: bool, said: dict[str, Any]) -> None:
    streamed = [{"choices": [{"index": 0, "delta": said}]}, event("", "stop"), "[DONE]"]

    async def answer(exchange: Exchange) -> None:
        if whole:
            await exchange.status(200, reply("", message=said))
        else:
            await exchange.begin_stream()
            await exchange.events(*streamed)

    with Server(answer) as server:
        other, last = ask(server, {}, whole=whole)
    assert other.other["delta"] == said
    assert last.finish_reason == "stop"


@pytest.mark.parametrize("odd", [[None], {"a": 1}, "x", [{"id": "c1"}, 3]])
def test_odd_fields_cost_no_answer(odd: Any) -> None:
    body = reply("four", message={"tool_calls": odd})
    body["choices"][0]["logprobs"] = odd
    with Server(lambda exchange: exchange.status(200, body)) as server:
        chunks = ask(server, {}, whole=True)
    assert "".join(c.text for c in chunks) == "four"


def test_a_whole_answer_has_the_time_that_its_writing_takes() -> None:
    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.5)
        await exchange.status(200, reply("four"))

    with Server(slow) as server:
        chunks = ask(server, {}, whole=True, first_byte_timeout_s=0.1, whole_timeout_s=10)
        assert "".join(c.text for c in chunks) == "four"


@pytest.mark.parametrize(
    ("fault", "called"),
    [(four, True), (failing, True), (unavailable, False), (lambda e: e.status(400, {}), False)],
)
def test_a_call_counts_where_the_provider_took_it_on_though_it_costs_nothing(fault: Fault, called: bool) -> None:
    free = {"usd_per_million_prompt_tokens": 0.0, "usd_per_million_completion_tokens": 0.0}
    bill = Bill(0.0)
    with Server(otherwise=fault) as server, suppress(CloudError):
        asyncio.run(asked(server, CloudRequest(MESSAGES), bill, max_retries=0, **free))
    assert (bill.usd, bill.called) == (0.0, called)


@pytest.mark.parametrize("send", [True, False])
def test_reasoning_that_came_back_goes_where_it_is_wanted(send: bool) -> None:
    calls = {"role": "assistant", "content": None, "reasoning_content": "I add", "tool_calls": [{"id": "c"}]}

    async def run(server: Server) -> None:
        cloud = OpenAICloud(OpenAIConfig(base_url=server.url, model="gpt-4.1", send_reasoning=send))
        await cloud.complete(CloudRequest((*MESSAGES, calls)))
        await cloud.aclose()

    with Server() as server:
        asyncio.run(run(server))
        sent = server.requests[0].body["messages"][-1]
    assert sent == (calls if send else {name: calls[name] for name in ("role", "content", "tool_calls")})
