from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.cloud.thinking import Thinking


def split(pieces: list[str]) -> tuple[str, str]:
    thinking = Thinking()
    parts = [thinking.feed(piece) for piece in pieces] + [thinking.end()]
    return "".join(r for r, _ in parts), "".join(a for _, a in parts)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("", "", ""),
        ("four", "", "four"),
        ("<think>2+2</think>\n\nfour", "2+2", "four"),
        ("\n<think>\n2+2\n</think>four", "\n2+2\n", "four"),
        ("<think></think>four", "", "four"),
        # Cut while it was thinking.
        ("<think>2+2</thi", "2+2</thi", ""),
        ("<thi", "", "<thi"),
        ("  <thing>", "", "  <thing>"),
        # A tag later on is text.
        ("the tag <think>x</think>", "", "the tag <think>x</think>"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    ],
)
def test_a_whole_text(text: str, reasoning: str, answer: str) -> None:
    assert split([text]) == (reasoning, answer)
    assert split(list(text)) == (reasoning, answer)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", " ", "\n", "a", "bc"]), max_size=12),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_the_pieces_do_not_matter(tokens: list[str], cuts: list[int]) -> None:
    text = "".join(tokens)
    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert split(pieces) == split([text])
