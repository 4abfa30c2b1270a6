"""`/v1/responses`: how a request and its answer are said there, in pieces and whole.

Nothing is kept between requests, so what would need that (`previous_response_id`, `background`) is refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from selfroute.serve.chat import report, usage_of
from selfroute.serve.events import Content, Done, Event, Other, Reasoning, Turn
from selfroute.serve.refusal import RefusedError

_NEEDS_MEMORY = ("previous_response_id", "conversation", "background", "prompt")
_DROPPED = ("store", "include", "truncation", "max_tool_calls", "stream_options")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text"}


def chat_body(body: Any) -> dict[str, Any]:
    """The same request for `/v1/chat/completions`; fields that neither knows stay as they are.

    Raises:
        RefusedError: it cannot be said there; the field is named.
    """
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object", code="invalid_body")
    for name in _NEEDS_MEMORY:
        if body.get(name):
            raise _cannot(name, "nothing is kept between requests; send the conversation as input")
    known = {"input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning"}
    chat = {name: value for name, value in body.items() if name not in {*known, *_DROPPED, *_NEEDS_MEMORY}}
    instructions = body.get("instructions")
    if not isinstance(instructions, str | None):
        raise _cannot("instructions", "they must be a text")
    chat["messages"] = [] if instructions is None else [{"role": "system", "content": instructions}]
    chat["messages"] += _messages(body.get("input"))
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if body.get("tools"):
        chat["tools"] = [_tool(tool, f"tools.{i}") for i, tool in enumerate(_list(body["tools"], "tools"))]
    choice = body.get("tool_choice")
    if choice is not None:
        named = isinstance(choice, dict) and choice.get("type") == "function"
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}} if named else choice
    if effort := _dict(body.get("reasoning"), "reasoning").get("effort"):
        chat["reasoning_effort"] = effort
    if form := _dict(_dict(body.get("text"), "text").get("format"), "text.format"):
        schema = {name: value for name, value in form.items() if name != "type"}
        kind = form.get("type")
        chat["response_format"] = {"type": kind, "json_schema": schema} if kind == "json_schema" else form
    return chat


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    # The reasoning just before an item, which is the item's where it is the assistant's, and else nobody's.
    thoughts = ""
    for index, item in enumerate(_list(given, "input")):
        where = f"input.{index}"
        item = _dict(item, where)
        before, thoughts = thoughts, ""
        match item.get("type", "message"):
            case "message":
                message = {"role": item.get("role"), "content": _content(item.get("content"), where)}
                messages.append(_thought(message, before) if message["role"] == "assistant" else message)
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                # Thinking models want their reasoning in the message that calls, with what they said before it.
                if not (messages and (messages[-1].get("tool_calls") or messages[-1].get("reasoning_content"))):
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
                _thought(messages[-1], before)
            case "function_call_output":
                output = item.get("output")
                said = _content(output, f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
            case "reasoning":
                thoughts = "\n\n".join(filter(None, (before, _reasoning(item.get("content"), where))))
            case kind:
                raise _cannot(where, f"items of type {kind!r} are not passed on")
    return messages


def _thought(message: dict[str, Any], thoughts: str) -> dict[str, Any]:
    """The message with more reasoning of its own, under the name that chats have for it."""
    if thoughts:
        message["reasoning_content"] = "\n\n".join(filter(None, (message.get("reasoning_content"), thoughts)))
    return message


def _reasoning(content: Any, where: str) -> str:
    """The text of a reasoning item as `ResponsesWriter` writes it; summaries and what is encrypted say nothing here."""
    given = enumerate(_list([] if content is None else content, f"{where}.content"))
    parts = [_dict(part, f"{where}.content.{index}") for index, part in given]
    texts = [part.get("text") for part in parts if part.get("type") == "reasoning_text"]
    return "".join(text for text in texts if isinstance(text, str))


def _content(content: Any, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for index, given in enumerate(_list(content, f"{where}.content")):
        part = _dict(given, f"{where}.content.{index}")
        kind = part.get("type")
        if isinstance(kind, str) and kind in _PARTS:
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
        elif kind == "input_image" and isinstance(part.get("image_url"), str):
            detail = {"detail": part["detail"]} if part.get("detail") else {}
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"], **detail}})
        else:
            raise _cannot(f"{where}.content.{index}", f"parts of type {kind!r} are not passed on")
    return parts


def _tool(tool: Any, where: str) -> dict[str, Any]:
    tool = _dict(tool, where)
    if tool.get("type") != "function":
        raise _cannot(where, "only functions of the client's own are passed on")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise RefusedError(400, f"{where} must be a list", code="invalid_value", param=where)


def _dict(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    raise RefusedError(400, f"{where} must be an object", code="invalid_value", param=where)


def _cannot(param: str, why: str) -> RefusedError:
    return RefusedError(400, f"{param}: {why}", code="unsupported_value", param=param)


class ResponsesWriter:
    """Implements `telling.Writer`.

    Args:
        id: the request's.
        body: the request as it came.
    """

    last = b""
    named = True

    def __init__(self, id: str, body: Mapping[str, Any]) -> None:
        self._id = id
        self._response: dict[str, Any] = {
            "id": f"resp_{id}", "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "model": body["model"], "output": [], "error": None, "incomplete_details": None,
            "instructions": body.get("instructions"), "metadata": body.get("metadata") or {},
            "max_output_tokens": body.get("max_output_tokens"), "parallel_tool_calls": True, "store": False,
            "temperature": body.get("temperature"), "top_p": body.get("top_p"),
            "tool_choice": body.get("tool_choice") or "auto", "tools": body.get("tools") or [],
            "text": body.get("text") or {"format": {"type": "text"}}, "usage": None,
        }  # fmt: skip
        self._number = -1
        # The item that is being written, if any is, and which of the chat's tool calls it is.
        self._item: dict[str, Any] | None = None
        self._call: Any = None

    def events(self, event: Event) -> list[Mapping[str, Any]]:
        begin = [self._event("response.created"), self._event("response.in_progress")] if self._number < 0 else []
        return begin + self._said(event)

    def failure(self, refusal: RefusedError) -> list[Mapping[str, Any]]:
        closing = self._close("incomplete")
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": str(refusal)}}
        return [*closing, self._event("response.failed")]

    def whole(self) -> Mapping[str, Any]:
        return self._response

    def _said(self, event: Event) -> list[Mapping[str, Any]]:
        match event:
            case Reasoning(text):
                return self._text("reasoning", text)
            case Content(text):
                return self._text("message", text)
            case Other(choice):
                delta = choice.get("delta", {})
                refusal = delta.get("refusal")
                said = self._text("refusal", refusal) if isinstance(refusal, str) and refusal else []
                calls = delta.get("tool_calls") or ()
                return said + [e for call in calls if isinstance(call, dict) for e in self._called(call)]
            case Done(finish_reason, course):
                cut = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish_reason)
                status = "incomplete" if cut else "completed"
                closing = self._close(status)
                usage = usage_of(course)
                self._response |= {
                    "status": status,
                    "incomplete_details": {"reason": cut} if cut else None,
                    "usage": {
                        "input_tokens": usage["prompt_tokens"],
                        "input_tokens_details": {"cached_tokens": course.cached_tokens, "cache_write_tokens": 0},
                        "output_tokens": usage["completion_tokens"],
                        "output_tokens_details": {"reasoning_tokens": course.reasoning_tokens},
                        "total_tokens": usage["total_tokens"],
                    },
                    "selfroute": report(course),
                }
                return [*closing, self._event(f"response.{status}")]
            case Turn():
                return []

    def _text(self, kind: str, text: str) -> list[Mapping[str, Any]]:
        item, fields, empty, more = _TEXTS[kind]
        begin: list[Mapping[str, Any]] = []
        if self._item is None or "content" not in self._item or self._item["content"][0]["type"] != empty["type"]:
            begin = [*self._close("completed"), *self._begin(item, {**fields, "content": []})]
            self._items[-1]["content"].append(dict(empty))
            begin.append(self._event("response.content_part.added", content_index=0, part=empty))
        self._items[-1]["content"][0][_text_of(empty)] += text
        return [*begin, self._event(f"response.{empty['type']}.delta", content_index=0, delta=text, **more)]

    def _called(self, call: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        begin: list[Mapping[str, Any]] = []
        function = call.get("function") or {}
        if self._item is None or self._item["type"] != "function_call" or self._call != call.get("index"):
            self._call = call.get("index")
            begin = self._close("completed")
            begin += self._begin(
                "function_call", {"call_id": call.get("id"), "name": function.get("name"), "arguments": ""}
            )
        delta = function.get("arguments") or ""
        self._items[-1]["arguments"] += delta
        return [*begin, self._event("response.function_call_arguments.delta", delta=delta)] if delta else begin

    @property
    def _items(self) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = self._response["output"]
        return output

    def _begin(self, kind: str, fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        self._item = {"id": f"{prefix}_{self._id}_{len(self._items)}", "type": kind, "status": "in_progress", **fields}
        self._items.append(self._item)
        return [self._event("response.output_item.added", item=_copy(self._item))]

    def _close(self, status: str) -> list[Mapping[str, Any]]:
        item, self._item = self._item, None
        if item is None:
            return []
        item["status"] = status
        done: list[Mapping[str, Any]] = []
        if item["type"] == "function_call":
            done.append(self._event("response.function_call_arguments.done", item, arguments=item["arguments"]))
        else:
            part = item["content"][0]
            [more] = [more for _, _, empty, more in _TEXTS.values() if empty["type"] == part["type"]]
            said = {_text_of(part): part[_text_of(part)], **more}
            done.append(self._event(f"response.{part['type']}.done", item, content_index=0, **said))
            done.append(self._event("response.content_part.done", item, content_index=0, part=dict(part)))
        return [*done, self._event("response.output_item.done", item, item=_copy(item))]

    def _event(self, kind: str, of: Mapping[str, Any] | None = None, **fields: Any) -> Mapping[str, Any]:
        self._number += 1
        event = {"type": kind, "sequence_number": self._number, **fields}
        item = of or self._item
        if kind.split(".")[1] in _WHOLE:
            return {**event, "response": {**self._response, "output": [_copy(i) for i in self._items]}}
        assert item is not None
        return {**event, "output_index": len(self._items) - 1, **({} if "item" in fields else {"item_id": item["id"]})}


_TEXTS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "reasoning": ("reasoning", {"summary": []}, {"type": "reasoning_text", "text": ""}, {}),
    "message": (
        *("message", {"role": "assistant"}),
        *({"type": "output_text", "text": "", "annotations": []}, {"logprobs": []}),
    ),
    "refusal": ("message", {"role": "assistant"}, {"type": "refusal", "refusal": ""}, {}),
}
"""Texts: the type of their item and its own fields, their part while it is empty, and what stands beside its text in an
event."""

_WHOLE = ("created", "in_progress", "completed", "incomplete", "failed")


def _text_of(part: Mapping[str, Any]) -> str:
    """The field of a part that is its text."""
    return "refusal" if part["type"] == "refusal" else "text"


def _copy(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as it is now."""
    return {**item, **({"content": [dict(part) for part in item["content"]]} if "content" in item else {})}
