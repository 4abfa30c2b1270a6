"""`/v1/responses`: the same request in the chat's words, and the answer in its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from tests.servers import Exchange, Server, event
from tests.serving import MemoryBudget, MemoryRecorder, ScriptedCloud, ScriptedDevice, said

from selfroute.cloud.client import OpenAICloud
from selfroute.cloud.endpoint import OpenAIConfig
from selfroute.cloud.wire import Collected
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.asking import read
from selfroute.serve.config import GatewayConfig
from selfroute.serve.events import Content, Course, Done, Event, Other, Reasoning, Turn
from selfroute.serve.handoff import Pair
from selfroute.serve.refusal import RefusedError
from selfroute.serve.responses import ResponsesWriter, chat_body
from selfroute.types import CloudChunk, CloudClient

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


def thinks(*texts: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": "rs_1", "status": "completed", "summary": [], "content": content}


def calls(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"of_{name}", "name": name, "arguments": "{}"}


def called(*names: str) -> dict[str, Any]:
    functions = [{"name": name, "arguments": "{}"} for name in names]
    return {"tool_calls": [{"id": f"of_{f['name']}", "type": "function", "function": f} for f in functions]}


USER = {"role": "user", "content": "2+3?"}
SAYS = {"role": "assistant", "content": "five"}
RESULT = {"type": "function_call_output", "call_id": "of_a", "output": "5"}
TOOL = {"role": "tool", "tool_call_id": "of_a", "content": "5"}
SILENT = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        pytest.param([USER, thinks("ha", "rd"), SAYS], [USER, {**SAYS, "reasoning_content": "hard"}], id="a text"),
        pytest.param(
            [USER, thinks("one"), calls("a"), calls("b"), RESULT, thinks("two"), calls("a"), RESULT],
            [
                *(USER, {**SILENT, "reasoning_content": "one", **called("a", "b")}, TOOL),
                *({**SILENT, "reasoning_content": "two", **called("a")}, TOOL),
            ],
            id="tool calls",
        ),
        pytest.param(
            [USER, thinks("one"), SAYS, calls("a"), RESULT],
            [USER, {**SAYS, "reasoning_content": "one", **called("a")}, TOOL],
            id="a text and a tool call after one reasoning",
        ),
        pytest.param(
            [USER, thinks("one"), calls("a"), thinks("two"), thinks("three"), calls("b")],
            [USER, {**SILENT, "reasoning_content": "one\n\ntwo\n\nthree", **called("a", "b")}],
            id="between tool calls",
        ),
        pytest.param(
            [thinks("cut"), USER, SAYS, thinks("late"), RESULT, calls("a")],
            [USER, SAYS, TOOL, {**SILENT, **called("a")}],
            id="nobody's",
        ),
        pytest.param(
            [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "gAAA"},
                {"type": "reasoning", "content": None},
                {"type": "reasoning", "content": [{"type": "other", "text": "x"}, {"type": "reasoning_text"}]},
                *(SAYS, calls("a")),
            ],
            [SAYS, {**SILENT, **called("a")}],
            id="without a text",
        ),
    ],
)
def test_reasoning_stays_with_the_message_that_it_led_to(items: list[Any], messages: list[Any]) -> None:
    assert chat_body({**ASKED, "input": items})["messages"] == messages


def test_an_answer_comes_back_as_the_message_that_it_was() -> None:
    function = {"name": "add", "arguments": "{}"}
    piece = {"delta": {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": function}]}}
    writer, _ = written(Reasoning("ha"), Reasoning("rd"), Content("I ask."), Other(piece), Done("tool_calls", Course()))
    call = {"id": "c1", "type": "function", "function": function}
    assert chat_body({**ASKED, "input": writer.whole()["output"]})["messages"] == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I ask."}],
            "reasoning_content": "hard",
            "tool_calls": [call],
        }
    ]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"instructions": ["Be brief."]}, "instructions"),
        ({"background": True}, "background"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input.0.content"),
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
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hard"}]},
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


def piece(id: Any = None, name: str = "", arguments: str = "", **more: Any) -> dict[str, Any]:
    """A piece of a tool call as a cloud streams it."""
    begun = ({"id": id} if id is not None else {}) | ({"type": "function"} if name else {})
    return {**begun, "function": {**({"name": name} if name else {}), "arguments": arguments}, **more}


@pytest.mark.parametrize(
    ("pieces", "indices"),
    [
        pytest.param([piece("c1", "fa", "{}"), piece("c2", "fb", "{}")], [0, 1], id="whole calls"),
        pytest.param(
            [piece("c1", "fa"), piece(arguments="{"), piece(arguments="}"), piece("c2", "fb"), piece(arguments="{}")],
            [0, 0, 0, 1, 1],
            id="calls in pieces",
        ),
        pytest.param(
            [piece("c1", "fa"), piece("c1", arguments="{}"), piece("c2", "fb"), piece("c1"), piece(), piece("c2")],
            [0, 0, 1, 0, 0, 1],
            id="the id with each piece",
        ),
        pytest.param([piece("c1", "fa"), piece("", arguments="{}"), piece("c2", "fb")], [0, 0, 1], id="an empty id"),
        pytest.param([piece("c1", "fa", index=None), piece("c2", "fb", index=None)], [0, 1], id="an index of null"),
        pytest.param([piece(arguments="{"), piece("c1", "fa")], [0, 1], id="no id at first"),
        pytest.param(
            [piece("c1", "fa", index=0), piece("c2", "fb", index=1), piece(index=0), piece(index=1)],
            [0, 1, 0, 1],
            id="indices stay",
        ),
        pytest.param(
            [
                piece("c1", "fa", index=3),
                piece(),
                piece("c1"),
                piece("c2", "fb"),
                piece("c3", "fc", index="x"),
                piece(),
            ],
            [3, 3, 3, 4, 5, 5],
            id="an index now and then",
        ),
        pytest.param(
            [piece("c1", "fa", index=0), piece(index=0), piece("c2", "fb", index=0), piece(index=0)],
            [0, 0, 1, 1],
            id="0 of every call",
        ),
        pytest.param([piece("c1", "fa", index=0), piece("c9", index=0)], [0, 0], id="another id with each piece"),
        pytest.param([piece("", "fa", "{}"), piece("", "fb", "{}"), piece()], [0, 1, 1], id="no ids, whole calls"),
        pytest.param([piece(None, "fa"), piece(None, "fa", "{")], [0, 0], id="no ids, the name with each piece"),
        pytest.param(
            [piece("c1", "fa", index=0), piece("c2", "fb", index=0), piece("c3", "fc", index=1)],
            [0, 1, 2],
            id="an index that was given another call",
        ),
        pytest.param([piece({"odd": 1}, "fa"), piece(3, "fb")], [0, 0], id="odd ids"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_pieces_of_tool_calls_are_numbered(pieces: list[Any], indices: list[Any], together: bool) -> None:
    came = [event("", tool_calls=pieces)] if together else [event("", tool_calls=[p]) for p in pieces]
    chunks = Collected().add(came)  # type: ignore[arg-type]
    numbered = [call for chunk in chunks for call in chunk.other["delta"]["tool_calls"]]
    assert numbered == [{**p, "index": index} for p, index in zip(pieces, indices, strict=True)]


@pytest.mark.parametrize("odd", ["x", {"a": 1}, [None, 3], [[]]])
def test_odd_tool_calls_stay_as_they_are(odd: Any) -> None:
    [chunk] = Collected().add([event("", tool_calls=odd)])  # type: ignore[list-item]
    assert chunk.other == {"delta": {"tool_calls": odd}}


TWO = [
    event("", role="assistant", tool_calls=[piece("c1", "fa", '{"a":')]),
    event("", tool_calls=[piece(arguments="1}")]),
    event("", tool_calls=[piece("c2", "fb", "{}")]),
]
"""Two calls whose pieces have no `index`."""


def ask(cloud: CloudClient, path: str, body: dict[str, Any]) -> httpx2.Response:
    async def asked() -> httpx2.Response:
        budget = MemoryBudget()
        pair = Pair(ScriptedDevice(said("5")), cloud, budget, MemoryRecorder())
        transport = httpx2.ASGITransport(make_app(Gateway(GatewayConfig(), pair, budget)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post(path, json={"model": "selfroute-cloud", **body})
        await cloud.aclose()
        return response

    return asyncio.run(asked())


def streamed(path: str, body: dict[str, Any]) -> list[Any]:
    """What a client is streamed where a cloud streams the two calls."""

    async def answer(exchange: Exchange) -> None:
        await exchange.begin_stream()
        await exchange.events(*TWO, event("", "tool_calls"), "[DONE]")

    with Server(answer) as server:
        cloud = OpenAICloud(OpenAIConfig(base_url=server.url, model="gpt-4.1"))
        text = ask(cloud, path, {**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_calls_without_an_index_are_streamed_apart() -> None:
    events = streamed("/v1/responses", {"input": "2+3?"})
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [(i["call_id"], i["name"], i["arguments"]) for i in done] == [("c1", "fa", '{"a":1}'), ("c2", "fb", "{}")]
    assert events[-1]["response"]["output"] == done
    deltas = [e for e in events if e["type"].endswith("arguments.delta")]
    assert [(e["output_index"], e["delta"]) for e in deltas] == [(0, '{"a":'), (0, "1}"), (1, "{}")]


def test_calls_without_an_index_have_one_in_a_chats_stream() -> None:
    chunks = streamed("/v1/chat/completions", {"messages": [USER]})
    pieces = [call for chunk in chunks for c in chunk["choices"] for call in c["delta"].get("tool_calls", ())]
    assert [call["index"] for call in pieces] == [0, 0, 1]
    assert [call.get("id") for call in pieces] == ["c1", None, "c2"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_calls_without_an_index_are_apart_in_a_whole_answer(path: str) -> None:
    """Of a cloud that streams though the client takes the answer whole."""
    chunks: list[CloudChunk] = Collected().add(TWO)  # type: ignore[arg-type]
    body = {"input": "2+3?"} if path == "/v1/responses" else {"messages": [USER]}
    answer = ask(ScriptedCloud(*chunks), path, body).json()
    if path == "/v1/responses":
        found = [(i["call_id"], i["name"], i["arguments"]) for i in answer["output"]]
    else:
        given = answer["choices"][0]["message"]["tool_calls"]
        assert not [call for call in given if "index" in call]
        found = [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in given]
    assert found == [("c1", "fa", '{"a":1}'), ("c2", "fb", "{}")]


def test_reasoning_of_an_earlier_answer_reaches_the_cloud() -> None:
    cloud = ScriptedCloud("5")
    ask(cloud, "/v1/responses", {"input": [USER, thinks("hard"), calls("a"), RESULT]})
    [request] = cloud.requests
    assert request.messages == (USER, {**SILENT, "reasoning_content": "hard", **called("a")}, TOOL)
