"""The HTTP cloud against a real server on loopback that misbehaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from tests.servers import Exchange, Fault, Server, event, hang, reply

from selfroute.cloud import make_cloud
from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.cloud.memory import Cloud
from selfroute.cloud.wire import parse_retry_after
from selfroute.config import Choice, validate
from selfroute.errors import CloudError, ConfigError
from selfroute.types import CloudAnswer, CloudChunk, CloudRequest

KEY = "sk-canary-0123456789"
ASK = CloudRequest(messages=({"role": "user", "content": "two and two?"},))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CLOUD_KEY", KEY)


def config(server: Server, **changes: Any) -> OpenAIConfig:
    values = {
        "base_url": server.url, "model": "gpt-4.1", "api_key_var": "TEST_CLOUD_KEY", "backoff_s": 0.01,
        "max_retries": 2, "first_byte_timeout_s": 5, "whole_timeout_s": 5, "idle_timeout_s": 5, "total_timeout_s": 20,
        **changes,
    }  # fmt: skip
    return validate(OpenAIConfig, values, "test")


def complete(server: Server, *, count: int = 1, **changes: Any) -> list[CloudAnswer]:
    async def run() -> list[CloudAnswer]:
        cloud = OpenAICloud(config(server, **changes))
        try:
            return list(await asyncio.gather(*(cloud.complete(ASK) for _ in range(count))))
        finally:
            await cloud.aclose()

    return asyncio.run(run())


def stream(server: Server, **changes: Any) -> list[CloudChunk]:
    async def run() -> list[CloudChunk]:
        cloud = OpenAICloud(config(server, **changes))
        try:
            return [chunk async for chunk in cloud.stream(ASK)]
        finally:
            await cloud.aclose()

    return asyncio.run(run())


def status(code: int, body: Any = None, **headers: str) -> Fault:
    return lambda exchange: exchange.status(code, body or {"error": {"message": f"status {code}"}}, **headers)


def streams(*events: Any) -> Fault:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.events(*events)

    return answer


GOOD_STREAM = streams(
    event(reasoning_content="two plus "), event(reasoning_content="two"), event("fo"), event("ur", "stop"),
    {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}, "[DONE]",
)  # fmt: skip


def test_an_answer_with_its_request_and_its_price() -> None:
    with Server() as server:
        [answer] = complete(server, extra={"reasoning_effort": "low"}, max_tokens=50)
        [request] = server.requests
    assert (answer.text, answer.reasoning, answer.finished) == ("four", "", True)
    assert (answer.prompt_tokens, answer.completion_tokens) == (100, 10)
    assert answer.cost_usd == pytest.approx((100 * 2.0 + 10 * 8.0) / 1e6)
    assert 0 < answer.latency_s < 5
    assert request.headers[":path"] == "POST /v1/chat/completions HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "gpt-4.1", "messages": [{"role": "user", "content": "two and two?"}], "max_tokens": 50,
        "temperature": 0.0, "reasoning_effort": "low",
    }  # fmt: skip


def test_what_reasoning_models_want_otherwise() -> None:
    with Server() as server:
        complete(server, max_tokens_field="max_completion_tokens", send_temperature=False, max_tokens=None)
        [request] = server.requests
    assert request.body["max_completion_tokens"] == 2048
    assert not {"max_tokens", "temperature"} & set(request.body)


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "four", "reasoning_content": "2+2"}, "four", "2+2"),
        ({"content": "four", "reasoning": "2+2"}, "four", "2+2"),
        ({"content": "<think>2+2</think>\n\nfour"}, "four", "2+2"),
        ({"content": None, "reasoning_content": "2+2 is"}, "", "2+2 is"),
    ],
)
def test_reasoning_is_kept_apart(message: dict[str, Any], text: str, reasoning: str) -> None:
    with Server(status(200, reply(message=message))) as server:
        [answer] = complete(server)
    assert (answer.text, answer.reasoning) == (text, reasoning)


@pytest.mark.parametrize(
    ("reason", "finished"),
    # Together says eos, watsonx eos_token; Mistral says model_length where the context is full.
    [
        *(("stop", True), ("eos", True), ("eos_token", True), ("length", False), ("model_length", False)),
        *(("content_filter", False), ("tool_calls", False), ("MAX_TOKENS", False)),
    ],
)
def test_only_a_whole_answer_is_finished(reason: str, finished: bool) -> None:
    answer = reply("fo")
    answer["choices"][0]["finish_reason"] = reason
    with Server(status(200, answer)) as server:
        assert complete(server)[0].finished is finished


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 60}}, 40 * 2 + 60 * 0.5 + 80),
        ({"prompt_cache_hit_tokens": 100}, 100 * 0.5 + 80),
        # More cached than there were: the provider's mistake is no discount.
        ({"prompt_cache_hit_tokens": 900}, 100 * 0.5 + 80),
    ],
)
def test_cached_prompt_tokens_have_their_own_price(usage: dict[str, Any], cost: float) -> None:
    usage |= {"prompt_tokens": 100, "completion_tokens": 10}
    with Server(status(200, reply(usage=usage))) as server:
        assert complete(server)[0].cost_usd == pytest.approx(cost / 1e6)


DETAILED = {
    "prompt_tokens": 100, "completion_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 7},
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("usage", "told"),
    [
        (DETAILED, (60, 7)),
        ({**DETAILED, "prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": None}}, (0, 0)),
        ({"prompt_tokens": 100, "completion_tokens": 10, "prompt_cache_hit_tokens": 100}, (100, 0)),
    ],
)
def test_what_the_provider_tells_of_its_tokens(usage: dict[str, Any], told: tuple[int, int], streamed: bool) -> None:
    if streamed:
        with Server(streams(event("four", "stop"), {"choices": [], "usage": usage})) as server:
            final = stream(server)[-1].final
    else:
        with Server(status(200, reply(usage=usage))) as server:
            [final] = complete(server)
    assert final is not None
    assert (final.cached_tokens, final.reasoning_tokens) == told


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": 500}, {"prompt_tokens": 100, "completion_tokens": None}])
def test_a_server_that_does_not_tell_its_usage_is_not_free(usage: dict[str, Any] | None) -> None:
    with Server(status(200, reply("x" * 400, usage=usage))) as server:
        [answer] = complete(server)
    assert answer.completion_tokens == 101
    assert answer.prompt_tokens > 0
    assert answer.cost_usd > 101 * 8.0 / 1e6


async def cut_in_the_body(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b'{"choices": [')
    exchange.writer.close()


async def stall_in_the_body(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b'{"choices": [')
    await hang(exchange)


async def drip(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    while True:
        await exchange.send(b" ")
        await asyncio.sleep(0.05)


async def close_at_once(exchange: Exchange) -> None:
    exchange.writer.close()


TRANSIENT: dict[str, tuple[Fault, str, dict[str, Any]]] = {
    "429": (status(429), "answers 429: status 429", {}),
    "408": (status(408), "answers 408", {}),
    "409": (status(409), "answers 409", {}),
    "500": (status(500), "answers 500", {}),
    "503 as text": (status(503, b"<html>overloaded\n</html>"), "answers 503: <html>overloaded </html>", {}),
    "no first byte": (hang, r"longer than 0.2 s for the first byte", {"whole_timeout_s": 0.2}),
    "a stall": (stall_in_the_body, r"longer than 0.2 s between two pieces", {"idle_timeout_s": 0.2}),
    "a drip": (drip, r"longer than 0.4 s in all", {"total_timeout_s": 0.4, "idle_timeout_s": 0.3}),
    "cut": (cut_in_the_body, "cannot be reached: ClientPayloadError", {}),
    "closed": (close_at_once, "cannot be reached: ServerDisconnectedError", {}),
    "no JSON": (status(200, b'{"choices": [{"mess'), "cannot be read: Invalid JSON", {}),
    "other JSON": (status(200, {"choices": [{"message": {"content": ["four"]}}]}), "cannot be read", {}),
    "no choice": (status(200, reply(choices=[])), "without a choice", {}),
    "an empty choice": (status(200, reply("")), "answer is empty", {}),
    "no end": (status(200, reply(choices=[{"message": {"content": "four"}}])), "finish_reason is None", {}),
    "given up": (
        status(200, reply(choices=[{"message": {"content": "fo"}, "finish_reason": "error"}])),
        "finish_reason is error",
        {},
    ),
    "negative usage": (status(200, reply(usage={"prompt_tokens": -5})), "cannot be read", {}),
}


# Paid for, and likely to come the same again: tried again once.
UNREADABLE = ("no JSON", "other JSON", "no choice", "an empty choice", "no end", "given up", "negative usage")


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_may_pass_is_tried_again_and_then_named(name: str) -> None:
    fault, says, changes = TRANSIENT[name]
    attempts = 2 if name in UNREADABLE else 3
    with Server(fault) as server:
        assert complete(server, **changes)[0].text == "four"
        assert len(server.requests) == 2
    with Server(otherwise=fault) as server:
        with pytest.raises(CloudError, match=f"{says}.*\\({attempts} attempts\\)"):
            complete(server, **changes)
        assert len(server.requests) == attempts


def test_a_refusal_in_the_body_of_a_200_is_a_refusal() -> None:
    broke = status(200, {"error": {"code": 402, "message": "Insufficient credits"}})
    with Server(otherwise=broke) as server:
        with pytest.raises(CloudError, match=r"rejects the request \(402\): Insufficient credits$"):
            complete(server)
        assert len(server.requests) == 1
    with Server(status(200, {"error": {"message": "upstream"}})) as server:
        assert complete(server)[0].text == "four"


@pytest.mark.parametrize(
    ("code", "body", "says"),
    [
        (401, {"error": {"message": f"Wrong key: {KEY}"}}, r"the key in \$TEST_CLOUD_KEY \(401\): Wrong key: \*\*\*"),
        (403, {"error": "no"}, r"refuses the key in \$TEST_CLOUD_KEY \(403\): no"),
        (
            404,
            {"error": {"message": "what?"}},
            r"no model 'gpt-4.1', or no such path \(404\): what\? \(\S+/v1/chat/completions was asked\)$",
        ),
        (400, {"error": {"message": "bad field\x1b[2J"}}, r"rejects the request \(400\): bad field \[2J$"),
        (402, {"error": {"message": "Insufficient Balance"}}, r"rejects the request \(402\): Insufficient Balance"),
        (400, b"[" * 50_000, r"rejects the request \(400\): \[\[\["),
        (307, b"", r"rejects the request \(307\)"),
    ],
)
def test_what_will_not_pass_stops_at_once(code: int, body: Any, says: str) -> None:
    with Server(otherwise=status(code, body, Location="http://127.0.0.1:1/")) as server:
        with pytest.raises(CloudError, match=says) as caught:
            complete(server)
        assert len(server.requests) == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("path", "usual"), [("", True), ("/api", True), ("/v1beta/openai", False), ("/api/v3", False)])
def test_a_path_that_is_not_there_is_told_in_full(path: str, usual: bool) -> None:
    with Server(otherwise=status(404)) as server:
        server.url = server.url.removesuffix("/v1") + path
        with pytest.raises(CloudError) as caught:
            complete(server)
    assert f"({server.url}/chat/completions was asked" in str(caught.value)
    assert ("usually ends in /v1" in str(caught.value)) == usual


def test_a_key_that_is_cut_off_is_masked_too() -> None:
    text = "x" * 290 + KEY
    with Server(status(400, {"error": {"message": text}})) as server, pytest.raises(CloudError) as caught:
        complete(server)
    assert KEY[:6] not in str(caught.value)


def test_the_key_is_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    refuse = status(500, {"error": {"message": f"{KEY} was not expected"}})
    with Server(otherwise=refuse) as server:
        cloud = OpenAICloud(config(server))

        async def run() -> None:
            try:
                await cloud.complete(ASK)
            finally:
                await cloud.aclose()

        with pytest.raises(CloudError) as caught:
            asyncio.run(run())
    seen = [str(caught.value), repr(caught.value.__cause__), repr(cloud), str(cloud.identity), caplog.text]
    assert not [text for text in seen if KEY in text]


@pytest.mark.parametrize(
    "after", [lambda: "0.4", lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)]
)
def test_retry_after_is_honoured(after: Callable[[], str]) -> None:
    started = time.monotonic()
    with Server(status(429, Retry_After=after())) as server:
        assert complete(server)[0].text == "four"
    assert time.monotonic() - started >= 0.4


@pytest.mark.parametrize("after", ["inf", "1e400", "nan", "-inf", "soon"])
def test_a_retry_after_of_no_use_is_none(after: str) -> None:
    assert parse_retry_after(after) is None


def test_a_long_retry_after_is_an_error_and_not_a_wait() -> None:
    with Server(status(429, Retry_After="3600")) as server, pytest.raises(CloudError, match="asks to wait for 3600 s"):
        complete(server)


def test_nothing_listens() -> None:
    with Server() as server:
        pass
    with pytest.raises(CloudError, match="cannot be reached: connection refused"):
        complete(server)


def test_requests_at_a_time_are_bounded() -> None:
    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        await exchange.status(200, reply())

    with Server(otherwise=slow) as server:
        assert len(complete(server, count=12, concurrency=3)) == 12
        assert server.most_at_once == 3


def test_a_provider_that_stays_down_is_left_alone() -> None:
    with Server(otherwise=status(500)) as server:
        with pytest.raises(CloudError, match=r"answers 500|stays down"):
            complete(server, count=8, concurrency=8, breaker_failures=3, breaker_cooldown_s=0.1, max_retries=1)
        # The first eight went out together; after that one tries each time, and two such tries end every wait.
        assert len(server.requests) <= 10


def test_a_provider_that_is_not_there_is_told_at_once_and_given_up_with_its_cause(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with Server() as server:
        pass
    questions = [(str(n), CloudRequest(({"role": "user", "content": str(n)},))) for n in range(12)]
    values = {"max_retries": 5, "breaker_failures": 3, "breaker_cooldown_s": 0.05, "concurrency": 4}
    client = OpenAICloud(config(server, **values))
    with Cloud(client, tmp_path / "cloud.sqlite") as cloud, pytest.raises(CloudError) as caught:
        cloud.ask(questions, phase="train")
    said = str(caught.value)
    refused = f"the cloud at {server.url} cannot be reached: connection refused"
    assert f"{refused} (it stays down" in said
    # Nothing came, so nothing is kept.
    assert "answers that came" not in said
    assert [r.getMessage() for r in caplog.records] == [
        f"{refused}; after 3 failures in a row it is asked again every 0.05 s, and a request gives up after about 0.3 s"
    ]


def test_a_provider_that_was_down_is_asked_again_by_one_and_then_by_all() -> None:
    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.4)
        await exchange.status(200, reply())

    with Server(*[status(500)] * 8, otherwise=slow) as server:
        # The try takes four times the cooldown, and nobody gives up meanwhile.
        answers = complete(server, count=8, concurrency=8, breaker_failures=3, breaker_cooldown_s=0.1, max_retries=1)
        assert len(answers) == 8
        assert len(server.requests) == 16


def test_too_long_an_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfroute.cloud.exchange.MAX_BODY_BYTES", 1000)
    with Server(status(200, reply("x" * 2000))) as server, pytest.raises(CloudError, match="sent more than"):
        complete(server)


def test_the_spend_limit_stops_before_it_is_passed() -> None:
    # A call costs 0.00028 USD, and at worst 100 completion tokens and the prompt's bytes.
    limit, worst = 0.0028, ((12 + 32) * 2.0 + 100 * 8.0) / 1e6
    with Server() as server:
        cloud = OpenAICloud(config(server, max_tokens=100, spend_limit_usd=limit))

        async def run() -> list[CloudAnswer]:
            # All at once: three fit at their worst, and the others wait for what those really cost.
            answers = await asyncio.gather(*(cloud.complete(ASK) for _ in range(30)), return_exceptions=True)
            says = r"spend limit of 0\.0028 USD is reached: 0\.0020 are spent"
            with pytest.raises(CloudError, match=says):
                await cloud.complete(ASK)
            await cloud.aclose()
            return [a for a in answers if isinstance(a, CloudAnswer)]

        bought = asyncio.run(run())
        assert len(server.requests) == len(bought) == 7
        assert server.most_at_once <= 3
    assert limit - worst < sum(a.cost_usd for a in bought) <= limit


def test_an_attempt_that_broke_off_counts_at_its_worst_and_a_refused_one_not_at_all() -> None:
    worst = (len(json.dumps(ASK.messages[0])) * 2.0 + 100 * 8.0) / 1e6
    limit = {"max_tokens": 100, "max_retries": 1, "spend_limit_usd": worst * 1.5}
    for refused in (status(429), status(503)):
        with Server(refused) as server:
            assert complete(server, **limit)[0].text == "four"
    for perhaps_charged in (cut_in_the_body, status(504), close_at_once):
        with Server(perhaps_charged) as server, pytest.raises(CloudError, match="spend limit"):
            complete(server, **limit)


@pytest.mark.parametrize("perhaps_charged", [cut_in_the_body, status(504)])
def test_whoever_answers_was_asked_whatever_the_transport_tells(
    perhaps_charged: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = aiohttp.BytesPayload.write_with_length
    monkeypatch.setattr("selfroute.cloud.transport._Body.write_with_length", silent)
    worst = (len(json.dumps(ASK.messages[0])) * 2.0 + 100 * 8.0) / 1e6
    with Server(perhaps_charged) as server, pytest.raises(CloudError, match="spend limit"):
        complete(server, max_tokens=100, max_retries=1, spend_limit_usd=worst * 1.5)


def test_what_broke_off_stands_in_the_ledger_as_money_and_no_call(tmp_path: Path) -> None:
    with Server(cut_in_the_body) as server:
        settings = config(server, max_tokens=100).model_dump(mode="json")
        cloud = Cloud(make_cloud(Choice(name="openai", **settings)), tmp_path / "cloud.sqlite")
        try:
            cloud.ask([("p1", ASK)], phase="train")
            spent = cloud.spent("train")
        finally:
            cloud.close()
    worst = (len(json.dumps(ASK.messages[0])) * 2.0 + 100 * 8.0) / 1e6
    assert spent.calls == 1
    assert spent.cost_usd == pytest.approx(280e-6 + worst)


def test_what_the_ledger_holds_counts_after_a_restart(tmp_path: Path) -> None:
    with Server() as server:
        settings = config(server, max_tokens=10, spend_limit_usd=0.0006).model_dump(mode="json")
        for _ in range(2):
            cloud = Cloud(make_cloud(Choice(name="openai", **settings)), tmp_path / "cloud.sqlite")
            try:
                for n in range(2):
                    request = CloudRequest(messages=({"role": "user", "content": f"problem {n}"},))
                    cloud.ask([(f"p{n}", request)], phase="train")
            finally:
                cloud.close()
        # Both problems are in the cache, and 0.00056 USD in the ledger.
        assert len(server.requests) == 2
        cloud = Cloud(make_cloud(Choice(name="openai", **settings)), tmp_path / "cloud.sqlite")
        try:
            with pytest.raises(CloudError, match=r"0\.0006 are spent"):
                cloud.ask([("p3", ASK)], phase="train")
        finally:
            cloud.close()
        assert len(server.requests) == 2


# Streams.


def test_a_stream_gives_reasoning_text_and_the_whole() -> None:
    with Server(GOOD_STREAM) as server:
        *pieces, last = stream(server)
        [request] = server.requests
    assert request.body["stream"] is True
    assert request.body["stream_options"] == {"include_usage": True}
    assert "".join(p.text for p in pieces) == "four"
    assert "".join(p.reasoning for p in pieces) == "two plus two"
    assert last.final is not None
    assert (last.final.text, last.final.reasoning, last.final.finished) == ("four", "two plus two", True)
    assert last.final.cost_usd == pytest.approx(280e-6)


async def alive(exchange: Exchange) -> None:
    await exchange.begin_stream()
    await exchange.events(event(reasoning_content="2+2"))
    for _ in range(8):
        await exchange.send(b": keep-alive\n\n")
        await asyncio.sleep(0.1)
    await exchange.events(event("four", "stop"))


@pytest.mark.parametrize(
    "answer",
    [
        streams(event("four", "stop")),
        streams(event("fo"), {**event("ur", "stop"), "usage": {"prompt_tokens": 1, "completion_tokens": 2}}),
        streams(event("<thi"), event("nk>2+2</thi"), event("nk>\n"), event("four", "stop"), "[DONE]"),
        alive,
    ],
    ids=["no usage, no [DONE]", "usage with the last piece", "thinking in the text", "comments"],
)
def test_streams_as_servers_send_them(answer: Fault) -> None:
    with Server(answer) as server:
        *pieces, last = stream(server, idle_timeout_s=0.4)
    assert "".join(p.text for p in pieces) == "four"
    assert last.final is not None
    assert last.final.text == "four"
    assert last.final.cost_usd > 0


async def stall_in_the_stream(exchange: Exchange) -> None:
    await exchange.begin_stream()
    await exchange.events(event("fo"))
    await hang(exchange)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (streams(event("fo")), "finish_reason is None"),
        (streams(event("fo"), "[DONE]"), "finish_reason is None"),
        (streams(event("fo"), "{"), "cannot be read"),
        (
            streams(event("fo"), {"error": {"message": f"overloaded, {KEY}"}}),
            r"overloaded, \*\*\*, in the middle of an answer",
        ),
        (stall_in_the_stream, "between two pieces"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error_and_is_not_tried_again(fault: Fault, says: str) -> None:
    with Server(fault) as server:
        with pytest.raises(CloudError, match=says):
            stream(server, idle_timeout_s=0.3)
        assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [status(500), close_at_once, streams(), streams({"error": "busy"}), hang])
def test_a_stream_that_did_not_begin_is_tried_again(fault: Fault) -> None:
    with Server(fault, otherwise=GOOD_STREAM) as server:
        assert stream(server, first_byte_timeout_s=0.3)[-1].final is not None
        assert len(server.requests) == 2


def test_leaving_a_stream_cancels_it_at_the_provider() -> None:
    with Server(stall_in_the_stream) as server:

        async def run() -> None:
            cloud = OpenAICloud(config(server))
            chunks = cast("AsyncIterator[CloudChunk]", cloud.stream(ASK))
            assert (await anext(chunks)).text == "fo"
            await chunks.aclose()  # type: ignore[attr-defined]
            deadline = time.monotonic() + 5
            while not server.left_early and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            await cloud.aclose()

        asyncio.run(run())
        assert server.left_early == 1


# Settings.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_url": "api.deepseek.com"}, "must begin with https://"),
        ({"base_url": "http://h/v1/chat/completions/"}, "leave off /chat/completions: http://h/v1 "),
        ({"base_url": "https://user:pw@host/v1"}, "must hold no user"),
        ({"base_url": "https://host/v1?key=1"}, "must hold no user"),
        ({"extra": {"n": 5}}, "n: not here"),
        ({"api_key_var": KEY}, "api_key_var: String should match pattern"),
        ({"model": "mystery-9"}, "price of the cloud model 'mystery-9' is not known"),
        ({"usd_per_million_prompt_tokens": 1.0}, "set both"),
        ({"api_key_var": "NO_SUCH_VAR"}, "the environment variable NO_SUCH_VAR, which api_key_var names, holds no key"),
        ({"api_key": KEY}, "did you mean api_key_var"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], says: str) -> None:
    values = {"base_url": "https://host/v1", "model": "gpt-4.1", **changes}
    with pytest.raises(ConfigError, match=says) as caught:
        make_cloud(Choice(name="openai", **values))
    assert KEY not in str(caught.value)


def test_the_identity_holds_what_changes_an_answer_and_nothing_else() -> None:
    with Server() as server:
        base = OpenAICloud(config(server)).identity
        for same in ({"max_retries": 9}, {"spend_limit_usd": 1.0}, {"api_key_var": None}, {"total_timeout_s": 9}):
            assert OpenAICloud(config(server, **same)).identity == base
        for other in ({"model": "gpt-4.1-mini"}, {"extra": {"seed": 1}}, {"max_tokens": 7}):
            assert OpenAICloud(config(server, **other)).identity != base
