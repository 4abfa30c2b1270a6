"""`/v1/responses`: the same request in the chat's words, and the answer in its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from selfroute.serve.asking import read
from selfroute.serve.events import Content, Course, Done, Event, Other, Reasoning, Turn
from selfroute.serve.refusal import RefusedError
from selfroute.serve.responses import ResponsesWriter, chat_body

ASKED = {"model": "selfroute", "input": "2+3?"}


def test_a_request_in_the_chats_words() -> None:
    body = {
        "model": "selfroute",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": "2+3?"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I ask."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "[]"},
            {"type": "function_call_output", "call_id": "c1", "output": "5"},
            {"role": "user", "content": [{"type": "input_image", "image_url": "data:x", "detail": "low"}]},
        ],
        "max_output_tokens": 50,
        "tools": [{"type": "function", "name": "add", "parameters": {}, "strict": True}],
        "tool_choice": {"type": "function", "name": "add"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "store": True,
        "stream": True,
        "temperature": 0.5,
        "unheard_of": 1,
    }
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}},
        {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "[]"}},
    ]
    assert chat_body(body) == {
        "model": "selfroute",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+3?"},
            {"role": "assistant", "content": [{"type": "text", "text": "I ask."}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}]},
        ],
        "max_completion_tokens": 50,
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "reasoning_effort": "low",
        "stream": True,
        "temperature": 0.5,
        "unheard_of": 1,
    }


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input.0.content.0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": "x"}, "tools"),
        ({"text": []}, "text"),
        ({"text": "x"}, "text"),
        ({"reasoning": 1}, "reasoning"),
    ],
)
def test_requests_that_cannot_be_said_there(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RefusedError) as caught:
        chat_body({**ASKED, **changes})
    assert (caught.value.status, caught.value.param) == (400, param)


WHOLE: Any = {
    **ASKED,
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "2+3?"}, {"type": "refusal"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:x", "detail": "low"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "5"}]},
    ],
    "tools": [{"type": "function", "name": "add", "parameters": {}}],
    "tool_choice": {"type": "function", "name": "add"},
    "text": {"format": {"type": "json_schema", "schema": {}}},
    "reasoning": {"effort": "low"},
    "selfroute": {"policy": "auto", "bias": 0.5},
}
ODD: list[Any] = [None, True, -1, 10**30, "", [], ["x"], [None], {}, {"type": ["x"]}, {"type": {}}, [{}], {"": {}}]


def with_odd_parts(value: Any) -> Iterator[Any]:
    """The value with each of its parts, in turn, as each of the odd ones."""
    yield from ODD
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, member in members:
        for odd in with_odd_parts(member):
            changed = value.copy()
            changed[at] = odd
            yield changed


def test_whatever_a_request_holds_it_is_read_or_refused() -> None:
    statuses = []
    for body in with_odd_parts(WHOLE):
        try:
            read(chat_body(body))
        except RefusedError as refusal:
            statuses.append(refusal.status)
    assert len(statuses) > 200
    assert set(statuses) == {400}


def written(*events: Event) -> tuple[ResponsesWriter, list[Any]]:
    writer = ResponsesWriter("r1", ASKED)
    return writer, [e for event in events for e in writer.events(event)]


def call(index: int, arguments: str, **more: Any) -> Other:
    return Other({"delta": {"tool_calls": [{"index": index, "function": {"arguments": arguments, **more}}]}})


def test_reasoning_and_an_answer() -> None:
    done = Done("stop", Course(device_prompt_tokens=10, cloud_completion_tokens=5))
    writer, events = written(
        Reasoning("ha"), Reasoning("rd"), Turn("cloud", "help"), Content("fi"), Content("ve"), done
    )
    kinds = [e["type"].removeprefix("response.") for e in events]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["output_index"] for e in events if "output_index" in e] == [0] * 7 + [1] * 7
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    response = writer.whole()
    assert events[-1]["response"] == response
    reasoning, message = response["output"]
    assert (reasoning["type"], reasoning["content"][0]["text"]) == ("reasoning", "hard")
    assert (message["role"], message["status"], message["content"][0]["text"]) == ("assistant", "completed", "five")
    assert response["usage"]["total_tokens"] == 15
    assert response["status"] == "completed"


def test_tool_calls() -> None:
    second = {"index": 1, "id": "c2", "function": {"name": "sub", "arguments": "{}"}}
    first = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": ""}}
    begins = [Other({"delta": {"tool_calls": [c]}}) for c in (first, second)]
    done = Done("tool_calls", Course())
    writer, events = written(begins[0], call(0, '{"a"'), call(0, ":2}"), begins[1], done)
    one, two = writer.whole()["output"]
    assert (one["call_id"], one["name"], one["arguments"], one["status"]) == ("c1", "add", '{"a":2}', "completed")
    assert (two["call_id"], two["name"], two["arguments"]) == ("c2", "sub", "{}")
    deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert deltas == ['{"a"', ":2}", "{}"]


def test_a_refusal() -> None:
    pieces = [Other({"delta": {"refusal": text}}) for text in ("I ", "won't")]
    writer, events = written(Reasoning("hm"), *pieces, Done("stop", Course()))
    _, message = writer.whole()["output"]
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["content"] == [{"type": "refusal", "refusal": "I won't"}]
    assert [e["delta"] for e in events if e["type"] == "response.refusal.delta"] == ["I ", "won't"]
    [done] = [e for e in events if e["type"] == "response.refusal.done"]
    assert done["refusal"] == "I won't"


def test_an_answer_that_was_cut() -> None:
    writer, events = written(Content("fi"), Done("length", Course()))
    assert events[-1]["type"] == "response.incomplete"
    assert writer.whole()["incomplete_details"] == {"reason": "max_output_tokens"}
    assert writer.whole()["output"][0]["status"] == "incomplete"


def test_an_answer_that_broke_off() -> None:
    writer, _ = written(Content("fi"))
    *_, last = writer.failure(RefusedError(502, "the cloud's answer broke off", code="cloud_broke_off"))
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "the cloud's answer broke off"
