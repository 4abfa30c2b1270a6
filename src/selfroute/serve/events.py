"""What the story of a request tells, piece by piece, and what became of the request."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfroute.types import Answer, HelpCall, Undecided


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of reasoning, of the device or the cloud."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Other:
    """Something else of the cloud's answer, such as tool calls: further fields of the API's choice, as they came."""

    choice: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """Who goes on, and why: the device's `help` call, its `undecided` response or its failure (`device`); a denial."""

    to: Literal["cloud", "device"]
    why: str


@dataclass(frozen=True, slots=True)
class Done:
    """The response is complete."""

    finish_reason: str
    course: Course


Event = Reasoning | Content | Other | Turn | Done
Tell = Callable[[Event], Awaitable[None]]


DECISIONS: Mapping[type, Literal["answer", "help", "undecided"]] = {
    Answer: "answer",
    HelpCall: "help",
    Undecided: "undecided",
}


@dataclass(slots=True)
class Course:
    """What became of a request so far; see `history.RequestRecord`, which it ends as."""

    decision: Literal["answer", "help", "undecided", ""] = ""
    route: Literal["device", "cloud", "undecided", ""] = ""
    score: float | None = None
    denied: str = ""
    rule: str = ""
    redacted: Mapping[str, int] = field(default_factory=dict)
    status: int = 200
    error: str = ""
    device_prompt_tokens: int = 0
    device_completion_tokens: int = 0
    cloud_prompt_tokens: int = 0
    cloud_completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the cloud's prompt tokens, as far as it tells."""
    reasoning_tokens: int = 0
    """Of the cloud's completion tokens, likewise."""
    cost_usd: float = 0.0
    first_ms: float | None = None
    device_ms: float | None = None
    cloud_ms: float | None = None
    total_ms: float = 0.0
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)
    said: list[str] = field(default_factory=list)
    """The answer, where content is logged."""

    def ms(self, since: float | None = None) -> float:
        """Milliseconds since the request came, or since another moment."""
        return (time.monotonic() - (self.began if since is None else since)) * 1e3
