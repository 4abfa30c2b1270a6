"""Where a response's text comes to the choice between the tags, seen from outside: token by token, without its ids.

An engine by URL says what it wrote and, if it can, what else might have come. That is enough to read l, to turn the
dial and to forbid the help call: the text goes on in another way from where the tags part. Left out on purpose: HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from selfroute.protocol import ANSWER_OPEN, HELP_CALL, HELP_OPEN, in_thoughts

Side = Literal["help", "answer"]

_TAGS: Mapping[Side, str] = {"help": HELP_OPEN, "answer": ANSWER_OPEN}


@dataclass(frozen=True, slots=True)
class Fork:
    """A token with which a response goes one of the two ways.

    Args:
        start: where the tag begins in the text.
        side: the way it went.
        score: l, the log-odds of the help call against the answer (nats); None where the engine gives no
            log-probabilities. Where it names too few tokens to hold both, l lies further out than this.
        answer: the answer tag, as far as the likeliest token goes on with it.
    """

    start: int
    side: Side
    score: float | None
    answer: str


def fork(text: str, token: str, others: Mapping[str, float]) -> Fork | None:
    """The choice that `token` makes behind `text`, if it makes one.

    Args:
        text: the response so far.
        token: what comes next.
        others: log-probabilities of what could have come, the token among them; empty where they are not known.

    The longest token that goes on with a tag is the one that the tokenizer spells the tag with; a shorter one, such as
    the `a` of `<a href`, is no choice of an answer.

    >>> found = fork("2+2=4?\\n<", "unknown", {"unknown": -0.5, "answer": -1.0, "a": -7.0})
    >>> found.side, found.score, found.answer
    ('help', 0.5, '<answer')
    >>> fork("see <", "a", {"a": -0.1, "answer": -2.0}) is None
    True
    """
    opened = text.endswith("<")
    if not opened and "<" not in token:
        return None
    head = "" if opened else token.partition("<")[0]
    start = len(text) - 1 if opened else len(text) + len(head)
    spelled: dict[Side, tuple[int, float, str]] = {}
    for other, log_prob in (others or {token: 0.0}).items():
        tag = "<" + other if opened else other.removeprefix(head)
        side = _side(tag)
        if side and (opened or other.startswith(head)):
            spelled[side] = max(spelled.get(side, (0, 0.0, "")), (len(tag), log_prob, tag))
    tag = (text + token)[start:]
    side = _side(tag)
    if side is None or (others and len(tag) < spelled.get(side, (0, 0.0, ""))[0]):
        return None
    answer = spelled["answer"][2] if "answer" in spelled else ANSWER_OPEN[:-1]
    if not others:
        # Two letters of a tag say little where it is not known what else could have come.
        return Fork(start, side, None, answer) if tag.startswith(_TAGS[side]) else None
    least = min(others.values())
    log_odds = [spelled[side][1] if side in spelled else least for side in _TAGS]
    return Fork(start, side, log_odds[0] - log_odds[1], answer)


def _side(tag: str) -> Side | None:
    """Which of the tags a text is the beginning of, or begins with; `<` alone is of neither."""
    for side, whole in _TAGS.items():
        if len(tag) > 1 and (whole.startswith(tag) or tag.startswith(whole)):
            return side
    return None


@dataclass(frozen=True, slots=True)
class Step:
    """What a token comes to: text that is certain now, and whether the response is led another way from there.

    With `ask` it ends, with `answer` it must be made to go on behind its text.
    """

    text: str
    turn: Literal["", "ask", "answer"] = ""


class Guide:
    """Leads one response through its choices, as the dial or a ban on help calls has it.

    Args:
        before: what the response begins with; none of it is given out again.
        forbid_help: whether the help call is never taken.
        by_dial: whether a response asks exactly when l + bias > 0; else as it does by itself.
        bias: the dial, in nats.
    """

    def __init__(
        self, before: str = "", *, forbid_help: bool = False, by_dial: bool = False, bias: float = 0.0
    ) -> None:
        self._text, self._given = before, len(before)
        self._forbid_help, self._by_dial, self._bias = forbid_help, by_dial, bias
        self.score: float | None = None
        """l at the last choice."""

    def feed(self, token: str, others: Mapping[str, float]) -> Step:
        """Follow the response by one token; `others` as for `fork`."""
        text = self._text
        self._text += token
        found = fork(text, token, others) or self._completed(text)
        if found and not in_thoughts(text):
            self.score = self.score if found.score is None else found.score
            asks = found.side == "help"
            if self._by_dial and found.score is not None:
                asks = found.score + self._bias > 0
            if self._forbid_help:
                asks = False
            if asks and found.side == "answer":
                return self._lead(self._text[: found.start] + HELP_CALL, "ask")
            if not asks and found.side == "help":
                return self._lead(self._text[: found.start] + found.answer, "answer")
        return Step(self._certain())

    def end(self) -> str:
        """What was held back."""
        return self._give(len(self._text))

    def _completed(self, text: str) -> Fork | None:
        """A help tag that the text has just completed, in whatever pieces it came."""
        start = self._text.rfind(HELP_OPEN)
        if start < 0 or start + len(HELP_OPEN) <= len(text):
            return None
        return Fork(start, "help", None, ANSWER_OPEN[:-1])

    def _lead(self, text: str, turn: Literal["ask", "answer"]) -> Step:
        self._text = text
        return Step(self._give(len(text)), turn)

    def _certain(self) -> str:
        """All that cannot be taken back any more: where help is forbidden, all but what may become its tag."""
        start = self._text.rfind("<")
        may_ask = self._forbid_help and start >= 0 and HELP_OPEN.startswith(self._text[start:])
        return self._give(start if may_ask else len(self._text))

    def _give(self, end: int) -> str:
        given, self._given = self._text[self._given : end], max(self._given, end)
        return given
