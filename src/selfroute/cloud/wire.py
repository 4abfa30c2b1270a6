"""What OpenAI-compatible servers send, in the forms that they send it; what selfroute does not know is passed on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from selfroute.cloud.thinking import Thinking
from selfroute.types import CloudChunk


class Details(BaseModel):
    """What the prompt's tokens were, or the completion's."""

    cached_tokens: int | None = Field(None, ge=0)
    reasoning_tokens: int | None = Field(None, ge=0)


class Usage(BaseModel):
    """What a call is charged for; None where the server does not tell."""

    prompt_tokens: int | None = Field(None, ge=0)
    completion_tokens: int | None = Field(None, ge=0)
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None
    prompt_cache_hit_tokens: int | None = Field(None, ge=0)

    @property
    def cached_tokens(self) -> int:
        """As OpenAI says it, or as DeepSeek does."""
        details = self.prompt_tokens_details
        return (details.cached_tokens if details else None) or self.prompt_cache_hit_tokens or 0

    @property
    def reasoning_tokens(self) -> int:
        """Those of the completion's."""
        details = self.completion_tokens_details
        return (details.reasoning_tokens if details else None) or 0


class Message(BaseModel):
    """What the model wrote, with whatever else it holds, such as tool calls."""

    model_config = ConfigDict(extra="allow")

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def thoughts(self) -> str:
        """Reasoning under the name that DeepSeek and llama.cpp give it, or that OpenRouter and vLLM do."""
        return self.reasoning_content or self.reasoning or ""

    @property
    def more(self) -> bool:
        """Whether it is an answer without a text."""
        return any((self.model_extra or {}).get(name) for name in _ANSWERS)


_ANSWERS = ("tool_calls", "function_call", "refusal", "audio")
"""What may stand in the place of a text."""


class Choice(BaseModel):
    """One of the answers; selfroute asks for one."""

    message: Message | None = None
    finish_reason: str | None = None
    logprobs: Any = None


class Reply(BaseModel):
    """An answer."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Delta(TypedDict, total=False):
    """A piece of what the model writes, with whatever else it holds, such as tool calls."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    content: str | None
    reasoning_content: str | None
    reasoning: str | None


class Part(TypedDict, total=False):
    """A piece of one of the answers."""

    delta: Delta | None
    finish_reason: str | None
    logprobs: dict[str, Any] | None


class Event(TypedDict, total=False):
    """An event of an answer that is streamed. A dictionary, for there are hundreds to an answer."""

    choices: list[Part]
    usage: Usage | None
    error: Any


EVENT = TypeAdapter(Event)

_TOLD = frozenset({"role", "content", "reasoning_content", "reasoning"})
"""Fields of a piece that are read, or say nothing."""


class Collected:
    """A streamed answer put together again."""

    def __init__(self) -> None:
        self._split = Thinking()
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._other: dict[str, Any] = {}
        # Numbers of the tool calls: by their ids, by the cloud's own, of the last piece, and the first that is free.
        self._by_id: dict[str, int] = {}
        self._by_index: dict[int, int] = {}
        self._number = self._free = 0
        # Whether the last call has its arguments, or some of them.
        self._whole = False
        self._finish_reason: str | None = None
        self._usage: Usage | None = None

    def add(self, events: Sequence[Event]) -> list[CloudChunk]:
        """The chunks of events that came together, those of one kind in a row as one.

        >>> said = [{"reasoning": "2+2"}, {"content": "fo"}, {"content": "ur"}]
        >>> events = [{"choices": [{"delta": delta}]} for delta in said]
        >>> [chunk.reasoning or chunk.text for chunk in Collected().add(events)]
        ['2+2', 'four']
        """
        chunks = []
        pieces = [piece for event in events for piece in self._pieces(event)]
        for (content, thoughts, other), run in groupby(pieces, _kind):
            together = list(run)
            if not (other or (content and thoughts)):
                together = [("".join([c for c, _, _ in together]), "".join([t for _, t, _ in together]), {})]
            for piece in together:
                self._content.append(piece[0])
                self._thoughts.append(piece[1])
                reasoning, text = self._split.feed(piece[0])
                chunks.append(CloudChunk(text=text, reasoning=piece[1] + reasoning, other=piece[2]))
        return [c for c in chunks if c.text or c.reasoning or c.other]

    def _pieces(self, event: Event) -> list[_Piece]:
        # Some send the usage with the last piece, some after it, some with each.
        self._usage = event.get("usage") or self._usage
        if not (choices := event.get("choices")):
            return []
        choice = choices[0]
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        delta, logprobs = choice.get("delta") or Delta(), choice.get("logprobs")
        # Under the name that DeepSeek and llama.cpp give it, or that OpenRouter and vLLM do.
        thoughts = delta.get("reasoning_content") or delta.get("reasoning") or ""
        more = {name: value for name, value in delta.items() if name not in _TOLD and value is not None}
        if isinstance(calls := more.get("tool_calls"), list):
            more["tool_calls"] = [self._numbered(call) if isinstance(call, dict) else call for call in calls]
        other = ({"delta": more} if more else {}) | ({"logprobs": logprobs} if logprobs else {})
        self._other |= more
        return [(delta.get("content") or "", thoughts, other)]

    def _numbered(self, call: dict[str, Any]) -> dict[str, Any]:
        """A piece of a tool call with its `index`, by which clients put calls together.

        Gemini leaves it out: an id that is new begins a call, and so does a name, without ids, after one that is there
        whole; another piece goes on with the last. Some who speak for it say 0 of every call: there a name with an id
        that is new begins one.
        """
        id, index, function = (call.get(name) for name in ("id", "index", "function"))
        id = id if isinstance(id, str) else ""
        named, argued = (isinstance(function, dict) and bool(function.get(name)) for name in ("name", "arguments"))
        begins = bool(id) and id not in self._by_id
        if type(index) is int:
            if index not in self._by_index:
                self._by_index[index] = self._free if index in self._by_index.values() else index
            elif begins and named and self._by_index[index] in self._by_id.values():
                self._by_index[index] = self._free
            self._number = self._by_index[index]
        elif id:
            self._number = self._by_id.get(id, self._free)
        elif named and self._whole:
            self._number = self._free
        if id:
            self._by_id[id] = self._number
        self._whole = argued or (self._whole and not named)
        self._free = max(self._free, self._number + 1)
        return {**call, "index": self._number}

    def rest(self) -> list[CloudChunk]:
        """What was held back."""
        reasoning, text = self._split.end()
        return [CloudChunk(text=text, reasoning=reasoning)] if text or reasoning else []

    def reply(self) -> Reply:
        """The same as an answer that was not streamed."""
        said = {"content": "".join(self._content), "reasoning_content": "".join(self._thoughts)}
        message = Message.model_validate(self._other | said)
        return Reply(choices=[Choice(message=message, finish_reason=self._finish_reason)], usage=self._usage)


def chunks_of(reply: Reply) -> list[CloudChunk]:
    """An answer that was not streamed, as a stream's chunks: tool calls are counted, each in one of its own.

    >>> calls = [{"id": id, "function": {"name": "now", "arguments": "{}"}} for id in "ab"]
    >>> reply = Reply.model_validate({"choices": [{"message": {"content": None, "tool_calls": calls}}]})
    >>> [chunk.other["delta"]["tool_calls"][0]["index"] for chunk in chunks_of(reply)]
    [0, 1]
    """
    choice = reply.choices[0]
    message: dict[str, Any] = choice.message.model_dump() if choice.message else {}
    given = message.pop("tool_calls", None)
    calls = [call for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    deltas = [message, *({"tool_calls": [{**call, "index": n}]} for n, call in enumerate(calls))]
    parts = [Part(delta=cast(Delta, delta)) for delta in deltas]
    if isinstance(choice.logprobs, dict):
        parts[0]["logprobs"] = choice.logprobs
    collected = Collected()
    return collected.add([Event(choices=[part]) for part in parts]) + collected.rest()


_Piece = tuple[str, str, dict[str, Any]]
"""An event's content, thoughts and what else it holds."""


def _kind(piece: _Piece) -> tuple[bool, bool, bool]:
    return bool(piece[0]), bool(piece[1]), bool(piece[2])


def message_of(body: bytes) -> str:
    """What an error's body says, in a line."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(text).get("error")
        text = str(error.get("message", error) if isinstance(error, dict) else error or text)
    except (ValueError, AttributeError, RecursionError):
        pass
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:300] or "no reason given"


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date; None where it says nothing of use."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
