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

    def add(self, event: Reply) -> list[CloudChunk]:
        """The chunks that an event makes."""
        # Some send the usage with the last piece, some after it, some with each.
        self._usage = event.usage or self._usage
        chunks = []
        for choice in event.choices[:1]:
            self._finish_reason = choice.finish_reason or self._finish_reason
            delta = choice.delta or Message()
            self._content.append(delta.content or "")
            self._thoughts.append(delta.thoughts)
            reasoning, text = self._split.feed(delta.content or "")
            chunks.append(CloudChunk(text=text, reasoning=delta.thoughts + reasoning, other=choice.other))
        return [c for c in chunks if c.text or c.reasoning or c.other]

    def rest(self) -> list[CloudChunk]:
        """What was held back."""
        reasoning, text = self._split.end()
        return [CloudChunk(text=text, reasoning=reasoning)] if text or reasoning else []

    def reply(self) -> Reply:
        """The same as an answer that was not streamed."""
        message = Message(content="".join(self._content), reasoning_content="".join(self._thoughts))
        return Reply(choices=[Choice(message=message, finish_reason=self._finish_reason)], usage=self._usage)


def merged(chunks: Sequence[CloudChunk]) -> list[CloudChunk]:
    """Chunks that came together, those of one kind in a row as one.

    >>> [c.text or c.reasoning for c in merged([CloudChunk(reasoning="2+2"), CloudChunk(text="fo"), CloudChunk("ur")])]
    ['2+2', 'four']
    """
    if len(chunks) < 2:
        return [*chunks]
    made: list[CloudChunk] = []
    for (text, reasoning, other), run in groupby(chunks, lambda c: (bool(c.text), bool(c.reasoning), bool(c.other))):
        together = list(run)
        if other or (text and reasoning):
            made += together
        else:
            joined = "".join(c.text for c in together), "".join(c.reasoning for c in together)
            made.append(CloudChunk(*joined))
    return made


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
