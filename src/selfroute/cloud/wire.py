"""What OpenAI-compatible servers send, in the forms that they send it; what selfroute does not know is passed on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from selfroute.cloud.thinking import Thinking
from selfroute.types import CloudChunk


class Details(BaseModel):
    """What the prompt's tokens were."""

    cached_tokens: int | None = Field(None, ge=0)


class Usage(BaseModel):
    """What a call is charged for; None where the server does not tell."""

    prompt_tokens: int | None = Field(None, ge=0)
    completion_tokens: int | None = Field(None, ge=0)
    prompt_tokens_details: Details | None = None
    prompt_cache_hit_tokens: int | None = Field(None, ge=0)

    @property
    def cached_tokens(self) -> int:
        """As OpenAI says it, or as DeepSeek does."""
        details = self.prompt_tokens_details
        return (details.cached_tokens if details else None) or self.prompt_cache_hit_tokens or 0


class Message(BaseModel):
    """What the model wrote, whole or a piece of it."""

    model_config = ConfigDict(extra="allow")

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def thoughts(self) -> str:
        """Reasoning under the name that DeepSeek and llama.cpp give it, or that OpenRouter and vLLM do."""
        return self.reasoning_content or self.reasoning or ""


class Choice(BaseModel):
    """One of the answers; selfroute asks for one."""

    message: Message | None = None
    delta: Message | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def other(self) -> dict[str, Any]:
        """What a piece holds beside text, such as tool calls."""
        said = self.delta.model_extra if self.delta else None
        if not (said or self.logprobs):
            return {}
        delta = {name: value for name, value in (said or {}).items() if name != "role" and value is not None}
        return ({"delta": delta} if delta else {}) | ({"logprobs": self.logprobs} if self.logprobs else {})


class Reply(BaseModel):
    """An answer, or an event of one that is streamed."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class Collected:
    """A streamed answer put together again."""

    def __init__(self) -> None:
        self._split = Thinking()
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._finish_reason: str | None = None
        self._usage: Usage | None = None

    def add(self, events: Sequence[Reply]) -> list[CloudChunk]:
        """The chunks of events that came together, those of one kind in a row as one.

        >>> said = [{"reasoning": "2+2"}, {"content": "fo"}, {"content": "ur"}]
        >>> events = [Reply(choices=[Choice(delta=Message(**delta))]) for delta in said]
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

    def _pieces(self, event: Reply) -> list[_Piece]:
        # Some send the usage with the last piece, some after it, some with each.
        self._usage = event.usage or self._usage
        if not event.choices:
            return []
        choice = event.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        delta = choice.delta
        return [(delta.content or "" if delta else "", delta.thoughts if delta else "", choice.other)]

    def rest(self) -> list[CloudChunk]:
        """What was held back."""
        reasoning, text = self._split.end()
        return [CloudChunk(text=text, reasoning=reasoning)] if text or reasoning else []

    def reply(self) -> Reply:
        """The same as an answer that was not streamed."""
        message = Message(content="".join(self._content), reasoning_content="".join(self._thoughts))
        return Reply(choices=[Choice(message=message, finish_reason=self._finish_reason)], usage=self._usage)


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
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
