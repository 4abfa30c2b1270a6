"""What a client asks, and what a device cannot serve of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from selfroute.serve.asking import Ask, ChatRequest, ask_of, beyond, read
from selfroute.serve.chat import merged
from selfroute.serve.refusal import RefusedError

USER = {"role": "user", "content": "2+3?"}
CHAT = {"model": "selfroute", "messages": [USER]}


def understood(**changes: Any) -> Ask:
    body = {**CHAT, **changes}
    return ask_of(
        read(body), body, id="r1", policy="auto", undecided="cloud", handoff="problem", bias=0.5, honours={"top_p"}
    )


def test_what_a_request_says() -> None:
    ask = understood(
        max_tokens=90, max_completion_tokens=80, temperature=0, seed=7, stop=["a", ""], user="u", stream=True,
        selfroute={"bias": 1.5, "undecided": "device", "handoff": "reasoning"},
    )  # fmt: skip
    assert (ask.max_tokens, ask.temperature, ask.seed, ask.stop) == (80, 0.0, "7", ("a",))
    assert (ask.bias, ask.undecided, ask.handoff) == (1.5, "device", "reasoning")
    assert set(ask.fields) == {"max_tokens", "max_completion_tokens", "temperature", "seed", "stop", "user"}
    assert ask.device_fields == {"user": "u"}


def test_what_it_does_not_say() -> None:
    ask = understood()
    assert (ask.max_tokens, ask.temperature, ask.seed, ask.stop, ask.bias) == (None, None, "", (), 0.5)
    assert (ask.fields, ask.beyond) == ({}, "")
    assert understood(max_tokens=None, stop="x", tools=None).stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [], "functions": None, "logprobs": False, "logit_bias": {}, "modalities": ["text"]}, ""),
        ({"response_format": {"type": "text"}}, ""),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_p": 0.9}, ""),
        ({"frequency_penalty": 0.0, "presence_penalty": 0}, ""),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"unheard_of": 1}, ""),
    ],
)
def test_fields_that_a_device_cannot_serve(fields: dict[str, Any], found: str) -> None:
    assert beyond([USER], fields, {"top_p"}) == found


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, ""),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.1.content"),
        ({"role": "tool", "content": "5"}, "messages.1.role"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages.1.tool_calls"),
        ({"role": "assistant", "content": "5", "tool_calls": None}, ""),
        ({"role": "developer", "content": "brief"}, ""),
    ],
)
def test_messages_that_a_device_cannot_serve(message: dict[str, Any], found: str) -> None:
    assert beyond([USER, message], {}, set()) == found


@pytest.mark.parametrize(
    "fields", [{"messages": [1] * 1000}, {"tools": [1] * 1000}, {"selfroute": {str(n): 1 for n in range(1000)}}]
)
def test_the_first_fault_ends_the_reading(fields: dict[str, Any]) -> None:
    # Else a body of 8 MiB would become as many errors of a thousand bytes as it has members.
    with pytest.raises(ValidationError) as invalid:
        ChatRequest.model_validate({**CHAT, **fields})
    assert invalid.value.error_count() == 1


def test_pieces_of_a_message_become_the_whole() -> None:
    pieces: list[dict[str, Any]] = [
        {"refusal": "I "},
        {"refusal": "won't", "tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "x"}}]},
        {
            "tool_calls": [
                {"index": 0, "id": "a"},
                {"index": 1, "id": "b", "type": "function", "function": {"name": "y"}},
            ]
        },
        {"annotations": [{"n": 1}], "audio": None},
        {"annotations": [{"n": 2}]},
    ]
    whole: dict[str, Any] = {}
    for piece in pieces:
        whole = merged(whole, piece)
    assert whole == {
        "refusal": "I won't",
        "tool_calls": [
            {"index": 1, "id": "b", "type": "function", "function": {"name": "xy"}},
            {"index": 0, "id": "a"},
        ],
        "annotations": [{"n": 1}, {"n": 2}],
    }


CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"additional_drop_params": ["max_tokens"]}, "additional_drop_params"),
        ({"thinking_budget": 100_000}, "thinking_budget"),
        # Some proxies take a name in any letters.
        ({"Service_Tier": "priority"}, "Service_Tier"),
        ({"N": 10}, "N"),
        ({"MAX_TOKENS": 10**6}, "MAX_TOKENS"),
        ({"Base_URL": "http://x"}, "Base_URL"),
        ({"generationConfig": {}}, "generationConfig"),
        (CACHED, "cache_control"),
        ({"messages": [{**USER, **CACHED}]}, "messages.0.cache_control"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", **CACHED}]}]},
            "messages.0.cache_control",
        ),
        ({"tools": [{"type": "function", **CACHED}]}, "tools.0.cache_control"),
        ({"top_p": "0.5"}, "top_p"),
        ({"temperature": True}, "temperature"),
        ({"selfroute": {"bias": "1"}}, "selfroute.bias"),
    ],
)
def test_what_would_cost_more_or_is_no_number_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusedError) as refused:
        read({**CHAT, **fields})
    assert refused.value.status == 400
    assert refused.value.param == param
