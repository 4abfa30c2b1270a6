"""The way back: placeholders in the cloud's answer become what they stand for, in whatever pieces they come.

The cloud was given the placeholders and nothing else, so these alone are restored, each exactly as it was given, once:
what was restored is not read again. In a link they stay, lest an answer take what they stand for to another machine
when it is shown. What may be the beginning of a placeholder is held back, which is never more than one of them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from selfroute.serve.redaction import named
from selfroute.types import CloudChunk

_TAIL, _AHEAD = 1024, 16
"""Characters in which a link is looked for, of one that began before them what `link` says; and more than it takes to
tell that one begins."""

_FORM = re.compile(r"(?:<|\\u003[cC])[A-Z0-9_]+(?:>|\\u003[eE])")
"""What looks like a placeholder."""

_ELSEWHERE = re.compile(r"//|\b(?:https?|ftp|wss?):|\bwww\.", re.IGNORECASE)
"""How an address begins that names another machine: with these schemes, browsers need no slashes."""

_LONG = re.compile(r"&#x?[0-9a-f]{8}", re.IGNORECASE)
"""A number of a character, as long as none is."""

_AS_BROWSERS_READ = str.maketrans({"\\": "/", "\t": None, "\n": None, "\r": None})

_ENDS = " \t\n\r\f"
_LINKED = re.compile(r"\][(:]|=")
"""Behind these of Markdown and HTML nothing but white space ends an address; elsewhere quotation marks do, too."""

_BRACKET = re.compile(r"\][(:]\s*<")
_CLOSED = re.compile(r"(?<!\\)(?:\\\\)*>")
"""Between these, an address of Markdown has spaces in it."""

_PIECE = re.compile(
    r'(?P<said>(?:[^"\\]+|\\(?:u[0-9a-fA-F]{4}|[^u]))+)|(?P<quote>")|(?P<begun>\\(?:u[0-9a-fA-F]{0,3})?$)|.', re.DOTALL
)
"""Of JSON: some of a string, a quotation mark, the beginning of an escape at the end."""

_SPACES = re.compile(rf"[{_ENDS}]{{2,}}")


def link(text: str) -> str:
    """The beginning of a link that a text ends in, in short, or "": of a URL, or of the places of Markdown and HTML
    that take one with spaces in it.

    In time that grows with the text, whatever stands in it: one pattern for all of this takes minutes of some texts,
    and a client can have the cloud write them.

    >>> [link(text) for text in ("see //a.org/?", "see //a.org/ and", "[a](<//a.org/b c", '<img src="//a.org/b c')]
    ['//', '', '](<//', '="//']
    """
    begin = max(map(text.rfind, _ENDS)) + 1
    word = text[begin:]
    if _elsewhere(word[max(map(word.rfind, '"`')) + 1 :]):
        return "//"
    if text[:begin].rstrip(_ENDS).endswith(("](", "]:", "=")):
        linked = 0
    else:
        linked = found.end() if (found := _LINKED.search(word)) else len(word)
    if _elsewhere(word[linked:]):
        return "=//"
    for quote in "\"'":
        opened = text.rfind(quote)
        if opened > 0 and text[:opened].rstrip().endswith("=") and _elsewhere(text[opened:]):
            return f"={quote}//"
    # Of this line, but for the bracket, which may stand on the one before.
    start = max(0, len(text[: text.rfind("\n") + 1].rstrip()) - 2)
    for closed in _CLOSED.finditer(text, start):
        start = closed.end()
    opener = _BRACKET.search(text, start)
    return "](<//" if opener and _elsewhere(text[opener.end() :]) else ""


def _elsewhere(address: str) -> bool:
    """Whether the beginning of an address leads to another machine."""
    if _LONG.search(address):
        return True
    return _ELSEWHERE.search(html.unescape(address).translate(_AS_BROWSERS_READ)) is not None


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
        self._quoted = quoted
        self._held = self._tail = self._escape = ""

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
            pieces += [text[at : found.start()], found[0] if link(self._tail) else self._values[found[0]]]
            # Its brackets end no link.
            self._read("_")
            at = found.end()
        self._read(text[at:])
        return "".join([*pieces, text[at:]])

    def _known(self, text: str) -> list[re.Match[str]]:
        return [found for found in _FORM.finditer(text) if found[0] in self._values]

    def _read(self, text: str) -> None:
        """Go on with what was told; of JSON, with what its string says so far."""
        if self._quoted:
            self._read_json(text)
        else:
            self._tail += text
        if len(self._tail) > 2 * _TAIL:
            tail = _SPACES.sub(_one, self._tail)
            self._tail = link(tail[: _AHEAD - _TAIL]) + tail[-_TAIL:]

    def _read_json(self, text: str) -> None:
        text, self._escape = self._escape + text, ""
        for piece in _PIECE.finditer(text):
            match piece.lastgroup:
                case "said":
                    self._tail += _said(piece[0])
                case "quote":
                    self._tail = ""
                case "begun":
                    self._escape = piece[0]


def _one(spaces: re.Match[str]) -> str:
    """One space in the place of many, that browsers read alike."""
    return next((c for c in (" ", "\f", "\n") if c in spaces[0]), "\t")


def _said(inside: str) -> str:
    """What the inside of a string of JSON says; as it is, where it is none."""
    try:
        return str(json.loads(f'"{inside}"', strict=False))
    except ValueError:
        return inside


class Restoring:
    """Restores an answer as it comes: its content, its reasoning, and the arguments of each tool call.

    Args:
        originals: texts by placeholder.
        json_answer: whether the content is JSON, as the client asked for.
    """

    def __init__(self, originals: Mapping[str, str], *, json_answer: bool = False) -> None:
        self._originals, self._json_answer = originals, json_answer
        self._in_names = {named(placeholder): original for placeholder, original in originals.items()}
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
        if isinstance(result.get("name"), str):
            result["name"] = self._name(result["name"])
        for name in ("arguments", "input"):
            if isinstance(result.get(name), str):
                result[name] = self._feed(at, result[name], quoted=name == "arguments")
        return result

    def _name(self, name: str) -> str:
        """A tool's name, which comes whole."""
        longest_first = "|".join(sorted(self._in_names, key=len, reverse=True))
        return re.sub(f"(?<!<)(?:{longest_first})(?!>)", lambda m: self._in_names[m[0]], name)

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
