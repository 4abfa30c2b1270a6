"""The stream reader: any chunking of a response reads as the whole, and no tag is ever shown."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL, HELP_CLOSE, HELP_OPEN, parse, reasoning_of
from selfroute.serve.stream import MAX_GAP, Ending, Reader, resumed, without_tags
from selfroute.types import Answer, HelpCall, Undecided

TAGS = (ANSWER_OPEN, ANSWER_CLOSE, HELP_OPEN, HELP_CLOSE)
VECTORS = Path(__file__).parents[2] / "fixtures" / "stream"


@dataclass
class Read:
    shown: list[str]
    called: bool
    ending: Ending

    @property
    def reasoning(self) -> str:
        return "".join(self.shown) + self.ending.reasoning


def read(chunks: Sequence[str], *, finished: bool = True) -> Read:
    reader = Reader()
    shown = [reader.feed(chunk) for chunk in chunks]
    return Read(shown, reader.called, reader.end(finished=finished))


def vectors() -> list[Any]:
    return [
        pytest.param(case, id=f"{file.stem}: {case['name']}")
        for file in sorted(VECTORS.glob("*.json"))
        for case in json.loads(file.read_text(encoding="utf-8"))
    ]


def texts(case: dict[str, Any]) -> list[str]:
    if "chunks" in case:
        return case["chunks"]
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(bytes.fromhex(piece)) for piece in case["chunks_hex"]]


@pytest.mark.parametrize("case", vectors())
def test_vectors(case: dict[str, Any]) -> None:
    chunks = texts(case)
    for pieces in (chunks, ["".join(chunks)], list("".join(chunks))):
        found = read(pieces, finished=case.get("finished", True))
        ending = found.ending
        assert found.reasoning == case["reasoning"]
        assert {Answer: "answer", HelpCall: "help", Undecided: "undecided"}[type(ending.decision)] == case["decision"]
        assert ending.content == case["content"]
        assert ending.passed_over == case.get("passed_over", "")
        if "prefix" in case:
            assert ending.prefix == case["prefix"]
    if "shown" in case:
        assert read(chunks).shown == case["shown"]


PIECES = st.sampled_from(
    [
        *TAGS,
        HELP_CALL,
        HELP_CALL,
        "<unknown>\n I need external assistance\n</unknown>",
        "I need external assistance",
        "<unk",
        "nown>",
        "<",
        "</",
        ">",
        "<answer",
        "<think>",
        "</think>",
        '"',
        "```\n",
        " ",
        "\n",
        " " * (MAX_GAP + 1),
        "2+3=5",
        "a < b",
        "é",
        "👩‍🔬",
        "\u00a0",
    ]
)
RESPONSES = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


@st.composite
def cut(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A response, and the same in pieces."""
    text = draw(RESPONSES)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    ends = [0, *places, len(text)]
    return text, [text[a:b] for a, b in pairwise(ends)]


@given(cut(), st.booleans())
def test_any_chunking_reads_as_the_whole(case: tuple[str, list[str]], finished: bool) -> None:
    text, chunks = case
    found, whole = read(chunks, finished=finished), read([text], finished=finished)
    assert found.reasoning == whole.reasoning
    assert found.called == whole.called
    assert (found.ending.decision, found.ending.content, found.ending.passed_over, found.ending.prefix) == (
        whole.ending.decision, whole.ending.content, whole.ending.passed_over, whole.ending.prefix,
    )  # fmt: skip


@given(cut(), st.booleans())
def test_no_tag_is_shown_not_even_in_part(case: tuple[str, list[str]], finished: bool) -> None:
    found = read(case[1], finished=finished)
    for said in (found.reasoning + found.ending.passed_over, found.ending.content):
        assert not any(tag in said for tag in TAGS)


@given(st.lists(st.sampled_from(["2+3=5", " ", "\n", "a < b", "é", '"']), max_size=6).map("".join), st.data())
def test_what_may_begin_a_tag_is_held_back(text: str, data: st.DataObject) -> None:
    tag = data.draw(st.sampled_from([*TAGS, HELP_CALL]))
    beginning = tag[: data.draw(st.integers(0, len(tag)))]
    assert "".join(read([*text, *beginning]).shown) == text.strip()


@given(RESPONSES, st.booleans())
def test_a_response_decides_what_parse_says_of_it(text: str, finished: bool) -> None:
    found = read([text], finished=finished)
    if not found.called and not text.lstrip().startswith("<think>"):
        assert found.ending.decision == parse(text, finished=finished)
        assert found.ending.text == text
    if isinstance(found.ending.decision, Answer):
        assert found.ending.content == without_tags(found.ending.decision.text).strip()


@given(st.lists(st.sampled_from(["2+3=5", " ", "\n", "a < b", "é", "<unk", '"']), max_size=8).map("".join))
def test_the_reasoning_before_a_help_call_is_what_reasoning_of_says(text: str) -> None:
    found = read(list(text + "\n" + HELP_CALL))
    assert found.ending.decision == HelpCall()
    assert found.reasoning == reasoning_of(text + "\n" + HELP_CALL)


@given(RESPONSES, RESPONSES)
def test_a_declined_help_call_goes_on_where_it_was(text: str, more: str) -> None:
    first = read(list(text + HELP_CALL))
    assume(first.ending.decision == HelpCall())
    prefix = first.ending.prefix
    # What began a tag until another followed it was shown, and is held back again.
    assume(not any(prefix.endswith(tag[:n]) for tag in TAGS for n in range(1, len(tag))))
    reader = resumed(prefix)
    shown = reader.feed(more)
    ending = reader.end(finished=True)
    whole = read([prefix + more])
    assert first.reasoning + shown + ending.reasoning == whole.reasoning
    assert (ending.decision, ending.content) == (whole.ending.decision, whole.ending.content)


def test_thinking_that_the_engine_tells_apart() -> None:
    reader = Reader()
    shown = [reader.feed("", "so <unk"), reader.feed("", "nown> hard"), reader.feed("\nNo. " + HELP_CALL)]
    ending = reader.end(finished=True)
    assert "".join(shown) == "so   hard\n\n\nNo."
    assert ending.decision == HelpCall()
    assert ending.prefix == "<think>so <unknown> hard</think>\n\n\nNo. "


def test_a_long_response_of_brackets_takes_no_time() -> None:
    read(["<" * 20_000, *"<unknown> " * 500])
