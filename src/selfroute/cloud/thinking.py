"""Reasoning that a server leaves in the answer's text, told apart while it streams."""

from __future__ import annotations

from selfroute.protocol import THINK_CLOSE, THINK_OPEN


class Thinking:
    """Splits a text that begins with `<think>` into its reasoning and the answer, whatever pieces it comes in.

    >>> split = Thinking()
    >>> split.feed("<thi"), split.feed("nk>2+2</th"), split.feed("ink>\\n\\n4"), split.end()
    (('', ''), ('2+2', ''), ('', '4'), ('', ''))
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = "start"

    def feed(self, piece: str) -> tuple[str, str]:
        """Reasoning and answer that are certain now."""
        self._held += piece
        reasoning = ""
        if self._state == "start":
            text = self._held.lstrip()
            if text.startswith(THINK_OPEN):
                self._state, self._held = "thinking", text[len(THINK_OPEN) :]
            elif THINK_OPEN.startswith(text):
                return "", ""
            else:
                self._state = "answer"
        if self._state == "thinking":
            reasoning, found, after = self._held.partition(THINK_CLOSE)
            if found:
                self._state, self._held = "gap", after
            else:
                keep = _overlap(self._held, THINK_CLOSE)
                reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state != "answer":
            return reasoning, ""
        answer, self._held = self._held, ""
        return reasoning, answer

    def end(self) -> tuple[str, str]:
        """What was held back in case it began a tag."""
        held, self._held = self._held, ""
        return (held, "") if self._state == "thinking" else ("", held)


def _overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that begins `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
