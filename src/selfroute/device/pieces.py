"""What a streamed chat completion says, in the forms in which engines say it.

Read by hand and not by a schema: engines fill the fields with null, leave them out, and send a token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST = -9999.0
"""What stands for a log-probability of minus infinity, as it does in the API."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of a response; the last piece has its `finish`, and the usage where the engine counts.

    `others` are log-probabilities of what could have come in place of `text`, which is then one token.
    """

    text: str = ""
    reasoning: str = ""
    others: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Streamed:
    """The events of one completion, read into pieces."""

    def __init__(self) -> None:
        self.finish = ""
        self._usage: Mapping[str, Any] = {}

    def add(self, event: Any) -> Iterator[Piece]:
        """The pieces that an event makes."""
        if not isinstance(event, dict):
            return
        # Some send the usage with the last piece, some after it, some with each.
        self._usage = event.get("usage") or self._usage
        for choice in (event.get("choices") or ())[:1]:
            self.finish = choice.get("finish_reason") or self.finish
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
            content = delta.get("content") or ""
            if reasoning:
                yield Piece(reasoning=reasoning, tokens=0 if content else 1)
            if content:
                yield from pieces_of(content, (choice.get("logprobs") or {}).get("content") or ())

    def last(self) -> Piece:
        """The end: how it finished, and what it took."""
        return Piece(
            finish=self.finish,
            prompt_tokens=self._usage.get("prompt_tokens") or 0,
            completion_tokens=self._usage.get("completion_tokens") or 0,
        )


def pieces_of(content: str, tokens: Any) -> Iterator[Piece]:
    """A text as its tokens, if what the engine says of these fits the text; else as one piece.

    An engine may hold text back in case it begins something, and then send it with the token that shows it does not.
    """
    named = [(str(token.get("token") or ""), _others(token)) for token in tokens]
    if "".join(token for token, _ in named) != content:
        last, others = named[-1] if named else ("", {})
        if not last or not content.endswith(last):
            yield Piece(text=content, tokens=max(1, len(named)))
            return
        if held := content[: -len(last)]:
            yield Piece(text=held)
        named = [(last, others)]
    for token, others in named:
        if token:
            yield Piece(text=token, others=others, tokens=1)


def _others(token: Mapping[str, Any]) -> dict[str, float]:
    """Log-probabilities of what could have stood in a token's place, its own among them."""
    listed = [*(token.get("top_logprobs") or ()), token]
    known = {str(t["token"]): max(LEAST, float(t["logprob"])) for t in listed if t.get("logprob") is not None}
    return known if len(known) > 1 else {}
