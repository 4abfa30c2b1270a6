"""The way back: placeholders in the cloud's answer become what they stand for, in whatever pieces they come.

The cloud was given the placeholders and nothing else, so these alone are restored, each exactly as it was given, once:
what was restored is not read again. In a link they stay, lest an answer take what they stand for to another machine
when it is shown. What may be the beginning of a placeholder is held back, which is never more than one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from selfroute.types import CloudChunk

_TAIL = 16_384
"""Characters in which a link is looked for."""

_FORM = re.compile(r"(?:<|\\u003[cC])[A-Z0-9_]+(?:>|\\u003[eE])")
"""What looks like a placeholder."""

_WORD = re.compile(r"""[^\s"`]*""")
_BRACKET = re.compile(r"\]\(\s*<")
"""Where a link of Markdown begins that may have spaces in it."""


def in_link(text: str) -> bool:
    """Whether a text ends in a link that has not ended: a URL, or the places of Markdown and HTML that take one with
    spaces in it.

    In time that grows with the text, whatever stands in it: one pattern for all of this takes minutes of some texts,
    and a client can have the cloud write them.

    >>> [in_link(text) for text in ("see //a.org/?", "see //a.org/ and", "[a](<//a.org/b c", '<img src="//a.org/b c')]
    [True, False, True, True]
    """
    slashes = text.rfind("//")
    if slashes < 0:
        return False
    last_word = _WORD.match(text[::-1])
    assert last_word is not None
    if slashes >= len(text) - last_word.end():
        return True
    for quote in "\"'":
        opened = text.rfind(quote)
        if 0 <= opened < slashes and text[:opened].rstrip().endswith("="):
            return True
    line = text.rfind("\n") + 1
    if slashes < line or text.find(">", slashes) >= 0:
        return False
    # The bracket may stand on a line before.
    before = len(text[:line].rstrip())
    return _BRACKET.search(text, max(0, before - 2), slashes) is not None


class Restorer:
    """Restores one text.

    >>> restorer = Restorer({"<EMAIL_1>": "a@b.org"})
    >>> restorer.feed("Write to <EMA"), restorer.feed("IL_1>, or <EMAIL_"), restorer.end()
    ('Write to ', 'a@b.org, or ', '<EMAIL_')

    Args:
        originals: texts by placeholder.
        quoted: whether the text is JSON, in whose strings the placeholders stand.
    """

    def __init__(self, originals: Mapping[str, str], *, quoted: bool = False) -> None:
        self._values = dict(originals)
        if quoted:
            inside = {name: json.dumps(value, ensure_ascii=False)[1:-1] for name, value in originals.items()}
            # Some providers escape what HTML would take for a tag.
            for left, right in ((r"\u003c", r"\u003e"), (r"\u003C", r"\u003E")):
                self._values |= {f"{left}{name[1:-1]}{right}": value for name, value in inside.items()}
            self._values |= inside
        self._beginnings = {name[:n] for name in self._values for n in range(1, len(name))}
        self._longest = max(map(len, self._values), default=1)
        self._held = self._tail = ""

    def feed(self, text: str) -> str:
        """What is certain now."""
        text = self._held + text
        # A whole placeholder is found before another that its end may begin.
        done = max((m.end() for m in self._known(text)), default=0)
        first = max(done, len(text) - self._longest + 1)
        cut = next((at for at in range(first, len(text)) if text[at:] in self._beginnings), len(text))
        self._held = text[cut:]
        return self._restored(text[:cut])

    def end(self) -> str:
        """What was held back and never became a placeholder."""
        held, self._held = self._held, ""
        return held

    def _restored(self, text: str) -> str:
        pieces, at = [], 0
        for found in self._known(text):
            self._read(text[at : found.start()])
            pieces += [text[at : found.start()], found[0] if in_link(self._tail) else self._values[found[0]]]
            # Its brackets end no link.
            self._read("_")
            at = found.end()
        self._read(text[at:])
        return "".join([*pieces, text[at:]])

    def _known(self, text: str) -> list[re.Match[str]]:
        return [found for found in _FORM.finditer(text) if found[0] in self._values]

    def _read(self, text: str) -> None:
        self._tail = (self._tail + text)[-_TAIL:]


class Restoring:
    """Restores an answer as it comes: its content, its reasoning, and the arguments of each tool call.

    Args:
        originals: texts by placeholder.
        json_answer: whether the content is JSON, as the client asked for.
    """

    def __init__(self, originals: Mapping[str, str], *, json_answer: bool = False) -> None:
        self._originals, self._json_answer = originals, json_answer
        self._restorers: dict[tuple[str, Any], Restorer] = {}
        self._last: tuple[str, Any] | None = None

    def feed(self, chunk: CloudChunk) -> list[CloudChunk]:
        """The chunks to tell in the place of one."""
        told: list[CloudChunk] = []
        if chunk.reasoning:
            told += [*self._turn(("reasoning", 0)), CloudChunk(reasoning=self._feed(("reasoning", 0), chunk.reasoning))]
        if chunk.text:
            told += [*self._turn(("text", 0)), CloudChunk(text=self._feed(("text", 0), chunk.text))]
        if chunk.other:
            told += self._other(chunk.other)
        if chunk.final:
            told += [*self._turn(None), CloudChunk(final=chunk.final, finish_reason=chunk.finish_reason)]
        return told

    def _other(self, other: Mapping[str, Any]) -> list[CloudChunk]:
        delta = other.get("delta")
        if not isinstance(delta, Mapping):
            return [CloudChunk(other=other)]
        told: list[CloudChunk] = []
        changed = dict(delta)
        for name in ("refusal", "function_call"):
            if delta.get(name):
                told += self._turn((name, 0))
                changed[name] = self._argued((name, 0), delta[name])
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            changed["tool_calls"] = []
            for call in calls:
                call = call if isinstance(call, Mapping) else {}
                at = ("custom" if call.get("custom") else "function", call.get("index"))
                told += self._turn(at)
                changed["tool_calls"].append(self._argued(at, call))
        return [*told, CloudChunk(other={**other, "delta": changed})]

    def _argued(self, at: tuple[str, Any], value: Any) -> Any:
        """A refusal, a function's call or a tool's, restored where it holds text of the cloud's."""
        if isinstance(value, str):
            return self._feed(at, value)
        if not isinstance(value, Mapping):
            return value
        result = dict(value)
        for name in ("function", "custom"):
            if name in result:
                result[name] = self._argued(at, result[name])
        for name in ("arguments", "input"):
            if isinstance(result.get(name), str):
                result[name] = self._feed(at, result[name], quoted=name == "arguments")
        return result

    def _feed(self, at: tuple[str, Any], text: str, *, quoted: bool = False) -> str:
        if at not in self._restorers:
            self._restorers[at] = Restorer(self._originals, quoted=quoted or (self._json_answer and at[0] == "text"))
        return self._restorers[at].feed(text)

    def _turn(self, to: tuple[str, Any] | None) -> list[CloudChunk]:
        """What is still held of the text before, when another begins."""
        last, self._last = self._last, to
        if last is None or last == to or last not in self._restorers:
            return []
        rest = self._restorers[last].end()
        if not rest:
            return []
        kind, index = last
        match kind:
            case "text":
                return [CloudChunk(text=rest)]
            case "reasoning":
                return [CloudChunk(reasoning=rest)]
            case "refusal":
                return [CloudChunk(other={"delta": {"refusal": rest}})]
            case "function_call":
                return [CloudChunk(other={"delta": {"function_call": {"arguments": rest}}})]
            case _:
                call = {"index": index, kind: {"arguments" if kind == "function" else "input": rest}}
                return [CloudChunk(other={"delta": {"tool_calls": [call]}})]
