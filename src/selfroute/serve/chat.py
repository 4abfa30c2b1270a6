"""`/v1/chat/completions`: how an answer is said there, in pieces and whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from selfroute.serve.events import Content, Course, Done, Event, Other, Reasoning, Turn
from selfroute.serve.refusal import RefusedError


class ChatWriter:
    """Implements `telling.Writer`.

    Args:
        id: the request's.
        model: as the client calls it.
        usage: whether the stream ends with an event of the usage.
    """

    last = b"data: [DONE]\n\n"
    named = False

    def __init__(self, id: str, model: str, *, usage: bool) -> None:
        self._envelope = {"id": f"chatcmpl-{id}", "created": int(time.time()), "model": model}
        self._usage = usage
        self._role = {"role": "assistant"}
        # For the whole answer.
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._others: list[Mapping[str, Any]] = []
        self._done: Done | None = None

    def events(self, event: Event) -> list[Mapping[str, Any]]:
        match event:
            case Reasoning(text):
                self._reasoning.append(text)
                return [self._chunk({"reasoning_content": text})]
            case Content(text):
                self._content.append(text)
                return [self._chunk({"content": text})]
            case Other(choice):
                self._others.append(choice)
                more = {name: value for name, value in choice.items() if name != "delta"}
                return [self._chunk(choice.get("delta", {}), **more)]
            case Turn(to, why):
                return [{**self._chunk({}), "selfroute": {"turn": to, "why": why}}]
            case Done(finish_reason, course):
                self._done = event
                last = {**self._chunk({}, finish_reason=finish_reason), "selfroute": report(course)}
                usage = {**self._chunk({}), "choices": [], "usage": usage_of(course)}
                return [last, usage] if self._usage else [last]

    def failure(self, refusal: RefusedError) -> list[Mapping[str, Any]]:
        return [refusal.body()]

    def whole(self) -> Mapping[str, Any]:
        assert self._done is not None
        course = self._done.course
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content) or None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": self._done.finish_reason}
        for other in self._others:
            message |= merged(message, other.get("delta", {}))
            choice |= merged(choice, {name: value for name, value in other.items() if name != "delta"})
        for call in message.get("tool_calls") or ():
            call.pop("index", None)
        return {
            **self._envelope,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(course),
            "selfroute": report(course),
        }

    def _chunk(self, delta: Mapping[str, Any], *, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        role, self._role = self._role, {}
        choice = {"index": 0, "delta": {**role, **delta}, "finish_reason": finish_reason, **more}
        return {**self._envelope, "object": "chat.completion.chunk", "choices": [choice]}


def merged(whole: Mapping[str, Any], piece: Mapping[str, Any]) -> dict[str, Any]:
    """A message with one more piece: texts are joined, lists too, and members with the same `index` become one.

    >>> merged({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}, {"tool_calls": [{"index": 0,
    ...     "function": {"arguments": "}"}}]})
    {'tool_calls': [{'index': 0, 'function': {'arguments': '{}'}}]}
    """
    result = dict(whole)
    for name, value in piece.items():
        before = result.get(name)
        if isinstance(before, str) and isinstance(value, str) and name not in ("id", "type", "role"):
            result[name] = before + value
        elif isinstance(before, dict) and isinstance(value, dict):
            result[name] = merged(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            result[name] = _joined(before, value)
        elif value is not None:
            result[name] = value
    return result


def _joined(whole: list[Any], piece: list[Any]) -> list[Any]:
    members = list(whole)
    for member in piece:
        index = member.get("index") if isinstance(member, dict) else None
        at = next((i for i, m in enumerate(members) if index is not None and m.get("index") == index), None)
        if at is None:
            members.append(member)
        else:
            members[at] = merged(members[at], member)
    return members


def usage_of(course: Course) -> dict[str, Any]:
    """Tokens of the device and the cloud together; which of them were cached, or reasoning, where the cloud tells."""
    prompt = course.device_prompt_tokens + course.cloud_prompt_tokens
    completion = course.device_completion_tokens + course.cloud_completion_tokens
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    usage["total_tokens"] = prompt + completion
    if course.cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": course.cached_tokens}
    if course.reasoning_tokens:
        usage["completion_tokens_details"] = {"reasoning_tokens": course.reasoning_tokens}
    return usage


def report(course: Course) -> dict[str, Any]:
    """The `selfroute` field: where the answer came from, and what it took."""
    return {
        "route": course.route,
        "score": course.score,
        "denied": course.denied or None,
        "rule": course.rule or None,
        "redacted": dict(course.redacted),
        "cost_usd": course.cost_usd,
        "device": {
            "ms": course.device_ms,
            "prompt_tokens": course.device_prompt_tokens,
            "completion_tokens": course.device_completion_tokens,
        },
        "cloud": {
            "ms": course.cloud_ms,
            "prompt_tokens": course.cloud_prompt_tokens,
            "completion_tokens": course.cloud_completion_tokens,
        },
        "total_ms": course.total_ms,
    }
