"""A response read while it is generated: what may be shown at once, what is held back, and what it decides.

It is read as `protocol.parse` reads it, whatever pieces it comes in, with one difference: a help call with more than
`MAX_GAP` white-space characters behind it has ended the response, whatever follows. Tags, and what may be the beginning
of one, are never shown. Left out on purpose: engines, HTTP, and what is done with a decision. The same cases stand in
`tests/fixtures/stream` for other languages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfroute.cloud.thinking import Thinking
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL, HELP_CLOSE, HELP_OPEN, parse, with_thoughts
from selfroute.types import Answer, Decision, HelpCall

MAX_GAP = 16
"""White-space characters behind a help call after which nothing else is waited for."""

Kind = Literal["text", "open", "tag", "call"]

_WORDS = HELP_CALL.removeprefix(HELP_OPEN).removesuffix(HELP_CLOSE).strip()
_KINDS: dict[str, Kind] = {ANSWER_OPEN: "open", ANSWER_CLOSE: "tag", HELP_OPEN: "tag", HELP_CLOSE: "tag"}


class Tags:
    """Cuts a text into the tags and what stands between them; a whole help call is one piece.

    >>> tags = Tags()
    >>> [*tags.feed("x <ans"), *tags.feed("wer>4</answer"), *tags.feed(">")]
    [('text', 'x '), ('open', '<answer>'), ('text', '4'), ('tag', '</answer>')]
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[tuple[Kind, str]]:
        """The pieces that are certain now. What may begin a tag is held back, for ever if the rest never comes."""
        text = self._held + text
        pieces: list[tuple[Kind, str]] = []
        at = 0
        while at < len(text):
            bracket = text.find("<", at)
            plain: tuple[Kind, int] = "text", (bracket if bracket >= 0 else len(text)) - at
            kind, length = _tag(text[at:]) if bracket == at else plain
            if length == 0:
                break
            pieces.append((kind, text[at : at + length]))
            at += length
        self._held = text[at:]
        return pieces


def _tag(text: str) -> tuple[Kind, int]:
    """The tag that begins a text, and its length; 0 where it takes more text to tell."""
    rest = text
    for part in (HELP_OPEN, _WORDS, HELP_CLOSE):
        if part.startswith(rest):
            return "call", 0 if rest != HELP_CLOSE else len(text)
        if not rest.startswith(part):
            break
        rest = rest[len(part) :]
        if part == HELP_CLOSE:
            return "call", len(text) - len(rest)
        rest = rest.lstrip()
    for tag, kind in _KINDS.items():
        if text.startswith(tag):
            return kind, len(tag)
    return "text", 0 if any(tag.startswith(text) for tag in _KINDS) else 1


def without_tags(text: str) -> str:
    """A text with a space in place of each tag, so that what stood on both sides makes no other tag.

    >>> without_tags("say <unknown> or <unk<answer>nown> <ans")
    'say   or <unk nown> '
    """
    return "".join(piece if kind == "text" else " " for kind, piece in Tags().feed(text))


@dataclass(frozen=True, slots=True)
class Ending:
    """What a whole response comes to.

    `reasoning` was not shown before; `content` is the answer, or what a response that decided nothing says last;
    `passed_over` is an answer that was written and does not count, which makes it reasoning. `text` is the response
    without its thinking. `prefix` is the whole of it, without a help call that ends it: from there it can go on.
    """

    decision: Decision
    reasoning: str
    content: str
    passed_over: str
    text: str
    prefix: str


class Reader:
    """Reads one response.

    >>> reader = Reader()
    >>> [reader.feed(piece) for piece in ("2+3", "=6\\n<unk", "nown> I need external assistance </unknown>")]
    ['2+3', '=6', '']
    >>> reader.end(finished=True).decision
    HelpCall()
    """

    def __init__(self) -> None:
        self._thinking, self._thoughts, self._tags = Thinking(), Tags(), Tags()
        # All that came: thinking that the engine told apart, the text, and of that what follows its own thinking.
        self._apart: list[str] = []
        self._all: list[str] = []
        self._rest: list[str] = []
        # How much of the rest was read, and the white space behind a help call that may have ended it.
        self._at = 0
        self._gap: str | None = None
        # From the last answer tag on.
        self._held: list[str] | None = None
        # White space that is shown once something follows it.
        self._space = ""
        self._shown = self._thought = False

    @property
    def called(self) -> bool:
        """Whether a help call has ended the response, whatever else the model may write."""
        return self._gap is not None and len(self._gap) > MAX_GAP

    def feed(self, text: str, reasoning: str = "") -> str:
        """The reasoning that can be shown now; `reasoning` is thinking that the engine tells apart itself."""
        self._apart.append(reasoning)
        self._all.append(text)
        thoughts, rest = self._thinking.feed(text)
        return self._think(reasoning + thoughts) + self._read(rest)

    def end(self, *, finished: bool) -> Ending:
        """What the response comes to; one that is not `finished` was cut at the token limit."""
        thoughts, rest = self._thinking.end()
        shown = self._think(thoughts) + self._read(rest)
        rest, apart, whole = "".join(self._rest), "".join(self._apart), "".join(self._all)
        text = rest[: self._at] if self.called else rest
        thought = with_thoughts(apart, whole[: len(whole) - len(rest)])
        decision = parse(text, finished=finished or self.called)
        prefix = thought + (text[: text.rfind(HELP_OPEN)] if isinstance(decision, HelpCall) else text)
        last = text.rpartition(ANSWER_OPEN)[2]
        if isinstance(decision, Answer):
            after = self._show(without_tags(last.partition(ANSWER_CLOSE)[2]))
            return Ending(decision, shown + after, without_tags(decision.text).strip(), "", text, prefix)
        content = "" if isinstance(decision, HelpCall) else without_tags(last).strip()
        return Ending(decision, shown, content, self._show("".join(self._held or ())), text, prefix)

    def _think(self, thoughts: str) -> str:
        """Thinking, in which no tag counts."""
        if not thoughts:
            return ""
        self._thought = True
        return "".join([self._show(piece if kind == "text" else " ") for kind, piece in self._thoughts.feed(thoughts)])

    def _read(self, rest: str) -> str:
        if rest and self._thought:
            self._thought, self._space = False, "\n\n"
        self._rest.append(rest)
        shown = ""
        for kind, piece in self._tags.feed(rest):
            if self._gap is not None:
                after = self._gap + piece
                self._gap = after[: len(after) - len(after.lstrip())]
                if self.called:
                    break
                if self._gap != after:
                    self._gap = None
            self._at += len(piece)
            if kind == "call":
                self._gap = ""
            if kind == "open" and self._held is not None:
                shown += self._show("".join(self._held))
            if kind == "open":
                self._held = []
            said = piece if kind == "text" else " "
            if self._held is not None:
                self._held.append(said)
            else:
                shown += self._show(said)
        return shown

    def _show(self, text: str) -> str:
        """A text without its white space at the end, which waits for what follows, and that before the first word."""
        text = self._space + text
        if not self._shown:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        self._shown = self._shown or bool(said)
        return said


def resumed(prefix: str) -> Reader:
    """A reader of what follows a prefix that was shown already."""
    reader = Reader()
    reader.feed(prefix)
    return reader
