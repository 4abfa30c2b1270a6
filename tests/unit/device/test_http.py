"""Engines by URL against a real server on loopback that answers as they do, and misbehaves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
from tests.servers import Exchange, Fault, Server, event, hang

from selfroute.config import validate
from selfroute.device.http import HTTPConfig, HTTPEngine, number
from selfroute.errors import ConfigError, ContextError, DeviceError, RejectedError
from selfroute.protocol import HELP_CALL
from selfroute.types import DeviceChunk, DeviceRequest

KEY = "sk-canary-0123456789"
USAGE = {"prompt_tokens": 100, "completion_tokens": 10}
ASK = DeviceRequest(messages=({"role": "user", "content": "two and two?"},), max_tokens=50)


def token(text: str, *others: tuple[str, float], finish_reason: str | None = None) -> dict[str, Any]:
    """An event of one token, with what else could have come; the first of `others` is the token itself."""
    listed = [{"token": name, "logprob": log_prob} for name, log_prob in others]
    made = event(text, finish_reason)
    if listed:
        made["choices"][0]["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
    return made


HELPS = token("unknown", ("unknown", -0.5), ("answer", -1.0), ("a", -7.0))
ANSWERS = token("answer", ("answer", -1.0), ("unknown", -0.5), ("a", -7.0))
OPENS = token("<", ("<", -0.1), ("so", -3.0))


def streams(*events: Any) -> Fault:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.events(*events)

    return answer


def engine_like(owner: str, *answers: Fault, models: tuple[str, ...] = ("tiny",)) -> Callable[[Exchange], Any]:
    """Lists its models, and gives one answer after the other to what is asked of it."""
    left = list(answers)

    async def answer(exchange: Exchange) -> None:
        path = exchange.headers[":path"]
        if path.endswith("/models HTTP/1.1"):
            await exchange.status(200, {"data": [{"id": name, "owned_by": owner} for name in models]})
        elif path.endswith("/health HTTP/1.1"):
            await exchange.status(200, {"status": "ok"})
        else:
            await left.pop(0)(exchange)

    return answer


def chunks(
    *answers: Fault, ask: DeviceRequest = ASK, owner: str = "llamacpp", **changes: Any
) -> tuple[list[DeviceChunk], list[dict[str, Any]]]:
    """The chunks of one response, and the bodies of the requests that it took."""

    async def run(server: Server) -> list[DeviceChunk]:
        engine = HTTPEngine(validate(HTTPConfig, {"base_url": server.url, **changes}, "test"))
        try:
            return [chunk async for chunk in engine.stream(ask)]
        finally:
            await engine.aclose()

    with Server(otherwise=engine_like(owner, *answers)) as server:
        got = asyncio.run(run(server))
        return got, [r.body for r in server.requests if "completions" in r.headers[":path"]]


def text_of(got: list[DeviceChunk]) -> str:
    return "".join(chunk.text for chunk in got)


def raised(*answers: Fault, kind: type[Exception] = DeviceError, **changes: Any) -> str:
    with pytest.raises(kind) as info:
        chunks(*answers, **changes)
    return str(info.value)


@pytest.mark.parametrize(
    ("events", "counted"),
    [
        ([event("fo"), event("ur", "stop"), {"choices": [], "usage": USAGE}, "[DONE]"], (100, 10)),
        ([event("fo"), {**event("ur", "stop"), "usage": USAGE}], (100, 10)),
        ([event("fo"), event("ur"), event("", "stop"), "[DONE]"], (0, 2)),
        ([event("four", "stop"), {"choices": [], "usage": None}], (0, 1)),
        ([{"choices": [{"delta": {"role": "assistant", "content": None}}]}, event("four", "stop")], (0, 1)),
    ],
    ids=["after", "with", "absent", "null", "role"],
)
def test_the_usage_comes_after_the_last_piece_or_with_it_or_never(events: list[Any], counted: tuple[int, int]) -> None:
    got, _ = chunks(streams(*events))
    assert text_of(got) == "four"
    assert [chunk.finish for chunk in got[:-1]] == [""] * (len(got) - 1)
    last = got[-1]
    assert (last.finish, last.prompt_tokens, last.completion_tokens, last.score) == ("stop", *counted, None)


def test_the_token_limit_ends_a_response() -> None:
    got, _ = chunks(streams(event("fo", "length")))
    assert got[-1].finish == "length"


def test_comments_and_names_of_events_are_no_text() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.send(b": keep-alive\n\nevent: message\nid: 7\n")
        await exchange.events(event("four", "stop"))

    assert text_of(chunks(answer)[0]) == "four"


def test_thinking_that_the_engine_tells_apart_stays_apart() -> None:
    got, _ = chunks(streams(event(reasoning_content="two plus "), event(reasoning="two"), event("four", "stop")))
    assert "".join(chunk.reasoning for chunk in got) == "two plus two"
    assert text_of(got) == "four"


@pytest.mark.parametrize("events", [[event("fo")], [], ["[DONE]"]])
def test_a_stream_that_ends_without_a_finish_reason_is_an_error(events: list[Any]) -> None:
    assert "broke off" in raised(streams(*events))


def test_an_error_in_the_stream_is_one() -> None:
    assert "out of memory" in raised(streams(event("fo"), {"error": {"message": "out of memory", "code": 500}}))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ({"choices": ["four"]}, "unknown form"),
        ({"choices": [{"delta": "four"}]}, "unknown form"),
        ({"choices": [{"delta": {"content": 4}, "logprobs": {"content": [4]}}]}, "unknown form"),
    ],
)
def test_what_cannot_be_read_is_an_error(sent: Any, said: str) -> None:
    assert said in raised(streams(sent))


def test_redirects_are_not_followed() -> None:
    message = raised(lambda exchange: exchange.status(307, {}, Location="http://127.0.0.1:1/v1/chat/completions"))
    assert "not followed" in message


def test_a_refused_key_is_named_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ENGINE_KEY", KEY)
    message = raised(
        lambda exchange: exchange.status(401, {"error": {"message": f"no such key {KEY}"}}),
        api_key_var="TEST_ENGINE_KEY",
    )
    assert "refuses the key" in message
    assert KEY not in message


@pytest.mark.parametrize(
    "error",
    [
        {"code": 400, "message": "the request exceeds the context", "type": "exceed_context_size_error"},
        {"code": 400, "message": "This model's maximum context length is 1024 tokens."},
    ],
    ids=["llama.cpp", "vllm"],
)
def test_too_long_a_conversation_is_an_error_of_its_own(error: dict[str, Any]) -> None:
    message = raised(lambda exchange: exchange.status(400, {"error": error}), kind=ContextError)
    # A client is told, whom the engine's address is no business of.
    assert "http" not in message


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_the_engine_refuses_is_an_error_of_its_own(status: int) -> None:
    error = {"message": "Conversation roles must alternate"}
    message = raised(lambda exchange: exchange.status(status, {"error": error}), kind=RejectedError)
    assert message == "the engine refuses the request: Conversation roles must alternate"


@pytest.mark.parametrize(
    "said", ["No models loaded. Please load a model", "model 'qwen' not found, try pulling it first"]
)
def test_an_engine_without_its_model_is_no_fault_of_the_request(said: str) -> None:
    message = raised(lambda exchange: exchange.status(400, {"error": {"message": said}}))
    assert "answers 400" in message


@pytest.mark.parametrize(
    ("answer", "changes", "said"),
    [
        (hang, {"first_byte_timeout_s": 0.2}, "0.2 s for the first byte"),
        (streams(event("fo")), {"idle_timeout_s": 0.2}, "0.2 s between two pieces"),
    ],
)
def test_each_wait_has_its_limit(answer: Fault, changes: dict[str, float], said: str) -> None:
    async def then_hang(exchange: Exchange) -> None:
        await answer(exchange)
        await hang(exchange)

    assert said in raised(then_hang, **changes)


def test_an_engine_that_is_not_there_is_named() -> None:
    engine = HTTPEngine(HTTPConfig(base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(DeviceError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached: connection refused"):
        asyncio.run(engine.ready())


@pytest.mark.parametrize(
    ("models", "model", "said"),
    [
        (("a", "b"), "", "say which by `model`"),
        (("a", "b"), "c", "no model 'c', but these: a, b"),
        ((), "", "these models: none"),
    ],
)
def test_readiness_takes_a_model_that_is_there(models: tuple[str, ...], model: str, said: str) -> None:
    with Server(otherwise=engine_like("ollama", models=models)) as server:
        engine = HTTPEngine(HTTPConfig(base_url=server.url, model=model))
        with pytest.raises(DeviceError, match=said):
            asyncio.run(engine.ready())


def test_an_engine_that_still_loads_its_model_is_not_ready() -> None:
    async def answer(exchange: Exchange) -> None:
        loads = "/health" in exchange.headers[":path"]
        listed = {"data": [{"id": "tiny", "owned_by": "llamacpp"}]}
        await exchange.status(503 if loads else 200, {"error": {"message": "Loading model"}} if loads else listed)

    with Server(otherwise=answer) as server, pytest.raises(DeviceError, match="Loading model"):
        asyncio.run(HTTPEngine(HTTPConfig(base_url=server.url)).ready())


def test_closing_the_generator_closes_the_connection() -> None:
    async def run(server: Server) -> None:
        engine = HTTPEngine(HTTPConfig(base_url=server.url))
        async with aclosing(engine.stream(ASK)) as got:
            assert (await anext(got)).text == "fo"
        while not server.left_early:
            await asyncio.sleep(0.01)
        await engine.aclose()

    async def for_ever(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.events(event("fo"))
        await hang(exchange)

    with Server(otherwise=engine_like("llamacpp", for_ever)) as server:
        asyncio.run(asyncio.wait_for(run(server), 10))


def test_an_engine_is_asked_for_the_models_own_distribution_within_the_limit() -> None:
    extra = {"top_p": 0.5, "n_predict": -1, "max_completion_tokens": 9, "stop": ["4"], "lora": [{"id": 0}], "n": 3}
    ask = DeviceRequest(ASK.messages, max_tokens=50, temperature=0.7, seed="a/1", extra=extra)
    _, [body] = chunks(streams(event("four", "stop")), ask=ask, extra={"top_k": 5, "max_tokens": 9999})
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "two and two?"}],
        "max_tokens": 50,
        "temperature": 0.7,
        "seed": number("a/1"),
        "top_p": 0.5,
        "top_k": 5,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"enable_thinking": False},
    }


@pytest.mark.parametrize(
    ("owner", "asked"),
    [
        ("llamacpp", {"continue_final_message": None}),
        ("vllm", {"continue_final_message": True, "add_generation_prompt": False}),
        ("library", {"continue_final_message": None, "chat_template_kwargs": None}),
    ],
)
def test_a_response_that_has_begun_goes_on(owner: str, asked: dict[str, Any]) -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, prefix="two and ")
    got, [body] = chunks(streams(event("two", "stop"), {"choices": [], "usage": USAGE}), ask=ask, owner=owner)
    assert text_of(got) == "two"
    assert body["messages"][-1] == {"role": "assistant", "content": "two and "}
    assert {name: body.get(name) for name in asked} == asked
    assert got[-1].prompt_tokens == 100


def test_an_engine_that_cannot_go_on_says_so() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, prefix="two and ")
    assert "cannot go on" in raised(ask=ask, owner="organization_owner")


AFTER = streams(event(">4</answer>", "stop"), {"choices": [], "usage": {"prompt_tokens": 103, "completion_tokens": 3}})


def test_the_dial_asks_where_the_model_would_have_answered() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, decide="threshold", bias=-0.4)
    got, bodies = chunks(streams(event("so\n"), OPENS, ANSWERS, event(">4")), ask=ask)
    assert text_of(got) == f"so\n{HELP_CALL}"
    assert (got[-1].finish, got[-1].score, got[-1].completion_tokens) == ("stop", 0.5, 3)
    assert len(bodies) == 1


def test_the_dial_answers_where_the_model_would_have_asked() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, decide="threshold", bias=-0.6, seed="a")
    got, [first, second] = chunks(streams(event("so\n"), OPENS, HELPS, event(">")), AFTER, ask=ask)
    assert text_of(got) == "so\n<answer>4</answer>"
    assert (got[-1].finish, got[-1].score) == ("stop", 0.5)
    assert (got[-1].prompt_tokens, got[-1].completion_tokens) == (100, 6)
    assert second["messages"][-1] == {"role": "assistant", "content": "so\n<answer"}
    assert second["max_tokens"] == 47
    assert first["seed"] != second["seed"]


def test_forbidden_help_is_answered_without_log_probabilities_too() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, forbid_help=True)
    first = streams(event("so\n<un"), event("known> I need external"))
    got, [body, second] = chunks(first, AFTER, ask=ask, top_logprobs=0)
    assert text_of(got) == "so\n<answer>4</answer>"
    assert got[-1].score is None
    assert "logprobs" not in body
    assert second["messages"][-1]["content"] == "so\n<answer"


def test_forbidden_help_that_comes_again_and_again_ends_at_the_limit() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=6, forbid_help=True)
    got, bodies = chunks(*[streams(event("so\n"), OPENS, HELPS)] * 2, ask=ask)
    assert text_of(got) == "so\n<answerso\n<answer"
    assert got[-1].finish == "length"
    assert [body["max_tokens"] for body in bodies] == [6, 3]


def test_without_log_probabilities_the_model_decides() -> None:
    ask = DeviceRequest(ASK.messages, max_tokens=50, decide="threshold", bias=100.0)
    got, _ = chunks(streams(event("so\n<answer>4</answer>", "stop")), ask=ask)
    assert text_of(got) == "so\n<answer>4</answer>"
    assert got[-1].score is None


def test_text_that_the_engine_held_back_is_read_with_the_token_that_frees_it() -> None:
    late = token("\n<unknown", ("unknown", -0.5), ("answer", -math.inf))
    late["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] = -3.4e38
    got, _ = chunks(streams(event("so"), late, event(HELP_CALL.removeprefix("<unknown"), "stop")))
    assert text_of(got) == f"so\n{HELP_CALL}"
    assert got[-1].score == pytest.approx(9998.5)


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/v1", "http://user:pass@127.0.0.1/v1", "127.0.0.1:8080", "http://x/v1?k"]
)
def test_a_url_holds_nothing_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        validate(HTTPConfig, {"base_url": url}, "test")
