"""The help-call protocol: the prompt that offers the choice, the tags, `parse`, and the decision point.

Left out on purpose: matching tags in a stream (the gateway's), and any knowledge of a task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selfroute.errors import DeviceError
from selfroute.types import Answer, CloudRequest, Decision, HelpCall, Message, Undecided

HELP_OPEN = "<unknown>"
HELP_CLOSE = "</unknown>"
HELP_CALL = f"{HELP_OPEN} I need external assistance {HELP_CLOSE}"
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"

INSTRUCTION = (
    f"Think step by step, then end with {ANSWER_OPEN}your answer{ANSWER_CLOSE}. "
    f"If you cannot solve it, end with {HELP_CALL} instead."
)
"""The system prompt that offers the choice; the same text for every task and every model."""

_HELP_AT_END = re.compile(r"<unknown>\s*I need external assistance\s*</unknown>\s*\Z")


def chat(question: str) -> tuple[Message, ...]:
    """The device's messages for one problem: the choice, then the question."""
    return ({"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question})


def offered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A client's conversation for the device: the choice stands below the client's own system prompt.

    Several system prompts become one at the beginning, where every chat template takes it; parts of a message become
    its text.

    >>> [m["role"] for m in offered([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}])]
    ['system', 'user']
    """
    said = [{"role": m["role"], "content": text_of(m.get("content"))} for m in messages]
    system = [m["content"] for m in said if m["role"] in SYSTEM and m["content"]]
    turns = [m for m in said if m["role"] not in SYSTEM]
    return ({"role": "system", "content": "\n\n".join([*system, INSTRUCTION])}, *turns)


def handed_over(messages: Sequence[Message], reasoning: str) -> tuple[Message, ...]:
    """A conversation for the cloud with the device's reasoning below what the user said last."""
    if not reasoning:
        return tuple(messages)
    note = f"{_HANDED_OVER}\n\n{reasoning}"
    *before, last = messages
    content = last.get("content")
    if last["role"] != "user" or not content:
        return (*messages, {"role": "user", "content": note})
    if isinstance(content, str):
        return (*before, {**last, "content": f"{content}\n\n{note}"})
    return (*before, {**last, "content": [*content, {"type": "text", "text": note}]})


def without_reasoning(messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation for the cloud less the reasoning before answers that a client sends back, which may be the
    device's.

    Before a tool's call it is the cloud's own, and some providers want it back.

    >>> without_reasoning([{"role": "assistant", "content": "4", "reasoning_content": "2+2"}])
    ({'role': 'assistant', 'content': '4'},)
    """
    return tuple(
        {name: value for name, value in m.items() if name != "reasoning_content"}
        if "reasoning_content" in m and not m.get("tool_calls")
        else m
        for m in messages
    )


def text_of(content: Any) -> str:
    """What a message says: its text, or that of its parts.

    >>> text_of([{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}])
    'What is\\nthis?'
    """
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "\n".join(text for text in parts if isinstance(text, str))
    return content if isinstance(content, str) else ""


SYSTEM = ("system", "developer")
"""Roles of a message that instructs the model."""


def cloud_request(question: str, reasoning: str = "") -> CloudRequest:
    """What the cloud is asked: the problem, and below it the device's reasoning, if it is to have it.

    >>> print(cloud_request("Add the numbers 2 and 3.", "2+3=6").messages[-1]["content"])
    Add the numbers 2 and 3.
    <BLANKLINE>
    A smaller model began as follows, and then asked for your help. It may be wrong:
    <BLANKLINE>
    2+3=6
    """
    system = {"role": "system", "content": f"Think step by step, then end with {ANSWER_OPEN}your answer{ANSWER_CLOSE}."}
    return CloudRequest(handed_over((system, {"role": "user", "content": question}), reasoning))


_HANDED_OVER = "A smaller model began as follows, and then asked for your help. It may be wrong:"


def reasoning_of(text: str) -> str:
    """A response's reasoning, up to its first help tag.

    >>> reasoning_of("2+3=6\\n<unknown> I need external assistance </unknown>")
    '2+3=6'
    """
    return text.partition(HELP_OPEN)[0].strip()


def parse(text: str, *, finished: bool = True) -> Decision:
    """Read a response as an answer, a help call, or neither.

    A help call counts only when it ends the response, and wins over an answer before it: text after the tag, or a
    tag quoted in mid-sentence, is reasoning. The last answer tag counts; it is well-formed when it is the only one,
    closed, not empty, and ends the response. A response cut at the token limit, or that ends in the model's own
    thinking, has not decided.

    >>> parse("1:3*7=21,21+25=46!\\n<answer>3*7+25</answer>")
    Answer(text='3*7+25', well_formed=True)
    >>> parse("I am lost. <unknown> I need external assistance </unknown>")
    HelpCall()
    >>> parse("<unknown> I need external assistance </unknown> or so I thought")
    Undecided()
    >>> parse("<answer>3*7+25", finished=False)
    Undecided()
    """
    if not finished or in_thoughts(text):
        return Undecided()
    if _HELP_AT_END.search(text, max(0, len(text) - 4096)):
        return HelpCall()
    start = text.rfind(ANSWER_OPEN)
    if start < 0:
        return Undecided()
    body = text[start + len(ANSWER_OPEN) :]
    inside, close, after = body.partition(ANSWER_CLOSE)
    inside = inside.strip()
    if not inside:
        return Undecided()
    only_one = text.count(ANSWER_OPEN) == 1
    return Answer(inside, well_formed=bool(close) and only_one and not after.strip())


THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
"""Around a model's own thinking, which its chat template knows of; no tag counts in it."""


def in_thoughts(text: str) -> bool:
    """Whether a response's text so far ends in the model's own thinking.

    >>> [in_thoughts(text) for text in ("<think>so", "<think>so</think> ", "so <think>")]
    [True, False, False]
    """
    return text.lstrip().startswith(THINK_OPEN) and THINK_CLOSE not in text


def with_thoughts(thoughts: str, text: str) -> str:
    """A response as its model wrote it, of thinking that was told apart and the text behind it.

    >>> with_thoughts("so", "4"), with_thoughts("", "4")
    ('<think>so</think>\\n\\n4', '4')
    """
    return f"{THINK_OPEN}{thoughts}{THINK_CLOSE}\n\n{text}" if thoughts else text


class Tokenizer(Protocol):
    """The two calls that the decision point needs; every `transformers` tokenizer has them."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True, slots=True)
class DecisionPoint:
    """The first token where the two tags part: after the tokens `prefix`, `help` or `answer` comes next.

    `prefix` is what the tags share, such as `<`; it is empty where the tags part at once, and starts with a piece of
    the text before the tag where a tokenizer merges the two (`.<`).
    """

    prefix: tuple[int, ...]
    help: int
    answer: int

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether `token_ids` stop right before the decision."""
        n = len(self.prefix)
        return n == 0 or tuple(token_ids[-n:]) == self.prefix


# What may stand before a tag. Tokenizers that merge across such a border part the tags elsewhere there.
_BORDERS = tuple(mark + gap for mark in ("x", "1", *".,:;!?)]}=-*`\"'") for gap in ("\n", "", " ", "\n\n"))


def decision_points(tokenizer: Tokenizer) -> tuple[DecisionPoint, ...]:
    """Every form the decision point takes under a tokenizer; the first is the one after a line break.

    Both tags are tokenized behind each usual border, as a model meets them in text; the form is the tokens they
    share past the border and the first token that differs.

    Raises:
        DeviceError: the tokenizer maps both tags to the same tokens (no decision can be told apart).
    """
    points: list[DecisionPoint] = []
    for border in _BORDERS:
        base = tokenizer.encode(border, add_special_tokens=False)
        help_ids = tokenizer.encode(border + HELP_CALL, add_special_tokens=False)
        answer_ids = tokenizer.encode(border + ANSWER_OPEN, add_special_tokens=False)
        shared = _shared(help_ids, answer_ids)
        if shared == min(len(help_ids), len(answer_ids)):
            raise DeviceError(
                f"this tokenizer cannot tell {ANSWER_OPEN!r} from {HELP_CALL!r} (unknown characters?): "
                "use a tokenizer that covers plain ASCII"
            )
        start = min(_shared(base, help_ids), shared)
        point = DecisionPoint(tuple(help_ids[start:shared]), help_ids[shared], answer_ids[shared])
        if point not in points:
            points.append(point)
    return tuple(points)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def find_decision(
    token_ids: Sequence[int], points: Sequence[DecisionPoint], tokenizer: Tokenizer
) -> tuple[int, DecisionPoint] | None:
    """Where a finished response decided: the index of the token that chose the tag which `parse` goes by, and its form.

    None when it decided nothing, or spelled its tag in an unusual way (then there is no clean pair of tokens to
    compare).
    """
    decision = parse(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    if isinstance(decision, Undecided):
        return None
    wanted = HELP_OPEN if isinstance(decision, HelpCall) else ANSWER_OPEN
    for index in range(len(token_ids) - 1, -1, -1):
        token = token_ids[index]
        for point in points:
            chosen = point.help if wanted == HELP_OPEN else point.answer
            if token != chosen or not point.ends(token_ids[:index]):
                continue
            tag = tokenizer.decode(list(token_ids[index - len(point.prefix) :]), skip_special_tokens=True)
            # A merged border leaves a character or two before the tag.
            if wanted in tag[: len(wanted) + 2]:
                return index, point
    return None


def boundaries(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The places where a response could have asked, past each line break: how many tokens stand before each."""
    breaks = {token for token in set(token_ids) if "\n" in tokenizer.decode([token])}
    return [index + 1 for index, token in enumerate(token_ids) if token in breaks]


def last_boundary(token_ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """The last place where a cut response could have decided; 0 where it has no line break."""
    return max(boundaries(token_ids, tokenizer), default=0)
