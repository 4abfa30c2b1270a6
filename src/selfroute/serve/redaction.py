"""Placeholders: what leaves in the place of what is found, the same for the same text all through a request.

A request to the cloud is walked as the tree that it is: every text in it counts, but the API's own words do not. A
placeholder, such as `<EMAIL_1>`, is none that stands in the request already. Left out on purpose: finding
(`finding`), and the way back (`restoring`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from selfroute.serve.finding import Span

_OF_THE_API = frozenset({
    "role", "content", "name", "type", "text", "refusal", "tool_calls", "tool_call_id", "id", "function", "arguments",
    "custom", "input", "index", "function_call", "functions", "image_url", "url", "detail", "input_audio", "data",
    "format", "tools", "tool_choice", "parallel_tool_calls", "parameters", "description", "strict", "properties",
    "required", "additionalProperties", "items", "enum", "anyOf", "response_format", "json_schema", "schema", "stop",
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "user", "metadata", "logprobs",
    "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "reasoning_effort", "reasoning_content",
    "modalities",
})  # fmt: skip
"""Names of the API's fields; any other is a text, as the client chose it."""

_KINDS = frozenset({
    "system", "developer", "user", "assistant", "tool", "function", "custom", "text", "refusal", "image_url",
    "input_audio", "object", "string", "number", "integer", "boolean", "array", "null", "json_object", "json_schema",
})  # fmt: skip
"""What a `role` or `type` may say without being a text."""

_OPAQUE = ("image_url", "input_audio")
"""Parts of a message that hold no text."""

_FILES = ("images", "audios", "videos", "files", "attachments")
"""Fields of a message that are none of the API's, and in which some engines take what holds no text."""

_IMAGE = re.compile(r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/_-]*={0,2}")
_AUDIO = re.compile(r"[A-Za-z0-9+/_-]{256,}={0,2}")
"""Files in base 64; a text of that form in the place of sound would be short."""

_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)((?:\\u[0-9a-fA-F]{4})+)")
_PLACEHOLDER = re.compile(r"<([A-Z0-9_]+_[0-9]+)>")
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)")
_LETTERED = re.compile(r"(?<!\\)((?:\\\\)*)(\\(?:[bfnrt]|u[0-9a-fA-F]{4}))")


def unreadable(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first part of a message that holds no text, or "".

    >>> unreadable([{"role": "user", "content": [{"type": "text"}, {"type": "image_url"}]}])
    'messages.0.content.1'
    """
    for index, message in enumerate(messages):
        if held := next((name for name in _FILES if message.get(name)), None):
            return f"messages.{index}.{held}"
        content = message.get("content")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and part.get("type") in _OPAQUE:
                return f"messages.{index}.content.{at}"
    return ""


def without_file(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message less the files that its parts hold, in which nothing can be read.

    >>> image = {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}
    >>> without_file({"content": [{"type": "image_url", "image_url": image}]})
    {'content': [{'type': 'image_url', 'image_url': {'detail': 'low'}}]}
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_without_file(part) for part in content]}


def _without_file(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _OPAQUE:
        return part
    name, form = ("url", _IMAGE) if kind == "image_url" else ("data", _AUDIO)
    held = part.get(kind)
    if isinstance(held, str) and form.fullmatch(held):
        return {field: value for field, value in part.items() if field != kind}
    if isinstance(held, Mapping) and isinstance(held.get(name), str) and form.fullmatch(held[name]):
        return {**part, kind: {field: value for field, value in held.items() if field != name}}
    return part


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A tree of JSON with each text changed, the names that the client chose too.

    >>> mapped({"role": "user", "content": "hi", "metadata": {"hi": 1}}, str.upper)
    {'role': 'user', 'content': 'HI', 'metadata': {'HI': 1}}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [mapped(member, change) for member in value]
    if not isinstance(value, Mapping):
        return value
    result = {}
    for name, member in value.items():
        fixed = name in ("role", "type") and isinstance(member, str) and member in _KINDS
        changed = member if fixed else mapped(member, change)
        if name == "name" and changed != member:
            changed = named(changed)
        result[name if name in _OF_THE_API else change(name)] = changed
    return result


def named(value: Any) -> Any:
    """A name with its placeholders as APIs let names be.

    >>> named("<REDACTED_1>-status")
    'REDACTED_1-status'
    """
    return _PLACEHOLDER.sub(r"\1", value) if isinstance(value, str) else value


def texts_of(value: Any) -> list[str]:
    """The texts of a tree, in the order in which `mapped` comes to them."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    mapped(value, collect)
    return texts


def plain(text: str) -> str:
    r"""A text that is JSON, as tools' arguments are, with letters in place of their escapes; any other as it is.

    >>> print(plain(r'{"name": "M\u00fcller", "quote": "\u0022"}'), plain(r"M\u00fcller"))
    {"name": "Müller", "quote": "\u0022"} M\u00fcller
    """
    return _ESCAPED.sub(lambda m: m[1] + _letters(m[2]), text) if r"\u" in text and _is_json(text) else text


def legible(text: str) -> str:
    r"""A text for whoever looks for words in it, of the same length: in one that is JSON, an escape's letter is none of
    the word's that stands behind it.

    >>> print(legible(r'{"said": "to\nProject Falcon"}'), legible(r"to\nProject Falcon"))
    {"said": "to  Project Falcon"} to\nProject Falcon
    """
    return _LETTERED.sub(lambda m: m[1] + " " * len(m[2]), text) if "\\" in text and _is_json(text) else text


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        from_json(text)
    except ValueError:
        return False
    return True


def _letters(escapes: str) -> str:
    units = bytes.fromhex(escapes.replace(r"\u", ""))
    try:
        letters = units.decode("utf-16-be")
    except UnicodeDecodeError:
        return escapes
    return "".join(c if c >= " " and c not in '"\\' else f"\\u{ord(c):04x}" for c in letters)


class Placeholders:
    """What stands for what, in one request.

    Args:
        texts: all that leaves, in which no placeholder may stand already.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._free: dict[str, Iterator[int]] = {}
        self._of: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()

    @property
    def originals(self) -> dict[str, str]:
        """The texts, by placeholder."""
        return {placeholder: original for original, placeholder in self._of.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Different texts by their kind."""
        return dict(sorted(self._kinds.items()))

    def put(self, text: str, spans: Sequence[Span]) -> str:
        """A text with placeholders in the place of its spans."""
        pieces, at = [], 0
        # All of an escape or nothing of it: half of one is no JSON.
        escapes = [m.span() for m in _ESCAPE.finditer(text)] if "\\" in text and _is_json(text) else []
        for start, end, kind in spans:
            start = max(at, next((a for a, b in escapes if a < start < b), start))
            end = next((b for a, b in escapes if a < end < b), end)
            pieces += [text[at:start], self._placeholder(_value(text, start, end), kind)]
            at = end
        return "".join([*pieces, text[at:]])

    def _placeholder(self, original: str, kind: str) -> str:
        if original not in self._of:
            # A rule's name may tell what it hides.
            label = "REDACTED" if kind.startswith("rule:") else re.sub(r"[^A-Z0-9]+", "_", kind.upper())
            if label not in self._free:
                self._free[label] = self._numbers(label)
            self._of[original] = f"<{label}_{next(self._free[label])}>"
            self._kinds[kind.removeprefix("rule:")] += 1
        return self._of[original]

    def _numbers(self, label: str) -> Iterator[int]:
        """Numbers from 1 that stand behind the label nowhere."""
        taken = {n for text in self._texts for n in re.findall(rf"{label}_(\d+)", text, re.IGNORECASE)}
        number = 0
        while True:
            number += 1
            if str(number) not in taken:
                yield number


def _value(text: str, start: int, end: int) -> str:
    """What a span says; in a text that is JSON, without its escapes."""
    said = text[start:end]
    if "\\" not in said or text.lstrip()[:1] not in ("{", "["):
        return said
    try:
        value = from_json(f'"{said}"')
    except ValueError:
        return said
    return value if isinstance(value, str) else said
