"""An engine by URL in the model's place: what evaluation is given, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.servers import Exchange, Server, event

from selfroute.device.base import Sampling
from selfroute.device.http import HTTPConfig
from selfroute.errors import ConfigError, DeviceError
from selfroute.evaluate.remote import Begun, Remote
from selfroute.protocol import HELP_CALL, chat
from selfroute.types import Response

PROMPTS = [chat("one"), chat("two")]
STREAMS = [["1/a", "1/b"], ["2/a"]]


async def engine(exchange: Exchange) -> None:
    """Says back the question, how the answer began, and its seed's parity; a long question is too much for it."""
    if exchange.headers[":path"].endswith("/models HTTP/1.1"):
        listed = {"id": "/models/demo:q8 0.gguf", "owned_by": "vllm"}
        return await exchange.status(200, {"data": [listed]})
    messages: list[dict[str, Any]] = exchange.body["messages"]
    question = next(m["content"] for m in messages if m["role"] == "user")
    if question == "three":
        return await exchange.status(500, {"error": {"message": "out of memory"}})
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    await exchange.begin_stream()
    await exchange.events(event(f"{question}\n"), event(f"<answer>{len(begun)}</answer>", "stop"))
    return None


def test_it_gives_a_response_for_each_stream_in_order() -> None:
    done: list[int] = []
    with Server(otherwise=engine) as server, Remote(HTTPConfig(base_url=server.url)) as remote:
        assert remote.name == "demo-q8-0"
        groups = remote.generate([remote.encode(p) for p in PROMPTS], STREAMS, Sampling(), progress=done.append)
        again = remote.generate(PROMPTS[:1], [["1/a"]], Sampling(forbid_help=True), starts=[Begun("so\n", 3)])
        limits = [request.body["max_tokens"] for request in server.requests if "messages" in request.body]
        seeds = [request.body["seed"] for request in server.requests if "messages" in request.body]
    texts = [[response.text for response in group] for group in groups]
    assert texts == [["one\n<answer>0</answer>"] * 2, ["two\n<answer>0</answer>"]]
    assert [response.text for [response] in again] == ["so\none\n<answer>3</answer>"]
    assert all(r.finished and len(r.token_ids) == 2 and r.score is None for group in groups for r in group)
    assert done == [1, 1, 1]
    # What a response begins with counts towards its limit.
    most = Sampling().max_tokens
    assert limits == [most, most, most, most - 3]
    assert len(set(seeds[:3])) == 3


def test_a_response_that_was_cut_has_no_score() -> None:
    async def cut(exchange: Exchange) -> None:
        if exchange.headers[":path"].endswith("/models HTTP/1.1"):
            return await exchange.status(200, {"data": [{"id": "tiny", "owned_by": "vllm"}]})
        chosen = {"token": "answer", "logprob": -0.5, "top_logprobs": [{"token": "unknown", "logprob": -1.0}]}
        answers = event("answer", "length")
        answers["choices"][0]["logprobs"] = {"content": [chosen]}
        await exchange.begin_stream()
        await exchange.events(event("<"), answers)
        return None

    with Server(otherwise=cut) as server, Remote(HTTPConfig(base_url=server.url)) as remote:
        [[response]] = remote.generate(PROMPTS[:1], [["a"]], Sampling())
    assert (response.text, response.finished, response.score) == ("<answer", False, None)


def test_a_declined_help_call_starts_from_before_its_tag() -> None:
    asks = Response(f"2+2=5\n{HELP_CALL}", (-1,) * 9, finished=True)
    with Server(otherwise=engine) as server, Remote(HTTPConfig(base_url=server.url)) as remote:
        # 6 of 52 characters of 9 tokens.
        assert remote.before_the_call(asks, early_exit=False) == Begun("2+2=5\n<answer", 1)


def test_a_models_own_thinking_is_part_of_its_response() -> None:
    async def thinks(exchange: Exchange) -> None:
        if exchange.headers[":path"].endswith("/models HTTP/1.1"):
            return await exchange.status(200, {"data": [{"id": "tiny", "owned_by": "vllm"}]})
        await exchange.begin_stream()
        await exchange.events(event(reasoning_content="2+2=5, no 4"), event(f"I am lost.\n{HELP_CALL}", "stop"))
        return None

    with Server(otherwise=thinks) as server, Remote(HTTPConfig(base_url=server.url)) as remote:
        [[response]] = remote.generate(PROMPTS[:1], [["a"]], Sampling())
        assert response.text == f"<think>2+2=5, no 4</think>\n\nI am lost.\n{HELP_CALL}"
        begun = remote.before_the_call(response, early_exit=False)
    assert begun.text == "<think>2+2=5, no 4</think>\n\nI am lost.\n<answer"


@pytest.mark.parametrize(
    ("prompts", "sampling", "kind", "said"),
    [
        (PROMPTS, Sampling(early_exit=True), ConfigError, "evaluate this run in process"),
        (PROMPTS, Sampling(decide="threshold", bias=1.0), DeviceError, "one operating point"),
        ([*PROMPTS, chat("three")], Sampling(), DeviceError, "out of memory"),
    ],
)
def test_what_cannot_be_done_is_said(prompts: list[Any], sampling: Sampling, kind: type[Exception], said: str) -> None:
    with (
        Server(otherwise=engine) as server,
        Remote(HTTPConfig(base_url=server.url)) as remote,
        pytest.raises(kind, match=said),
    ):
        remote.generate(prompts, [["a"]] * len(prompts), sampling)


def test_an_engine_that_is_not_there_is_told_before_anything_is_asked() -> None:
    with pytest.raises(DeviceError, match="cannot be reached"), Remote(HTTPConfig(base_url="http://127.0.0.1:9/v1")):
        pass
