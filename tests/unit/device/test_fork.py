"""The choice between the tags, read off tokens and their log-probabilities, and responses led another way there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selfroute.device.fork import Guide, fork
from selfroute.protocol import HELP_CALL, HELP_OPEN

ODDS = {"unknown": -0.5, "answer": -1.0, "un": -9.0, "a": -7.0}
"""What may come behind `<`, as the shipped model's tokenizer has it."""


@pytest.mark.parametrize(
    ("text", "token", "others", "side", "score"),
    [
        ("so\n<", "unknown", ODDS, "help", 0.5),
        ("so\n<", "answer", ODDS, "answer", 0.5),
        # Tags that are one token each part at once.
        ("so\n", "<unknown>", {"<unknown>": -0.1, "<answer>": -3.0, "so": -5.0}, "help", 2.9),
        # A tokenizer that merges across the border keeps what stands before the tag.
        ("so", ".<an", {".<an": -0.25, ".<un": -1.5, "<un": -0.2}, "answer", -1.25),
        # Of twenty tokens none is the other tag: l lies at least as far out as the last of them.
        ("so\n<", "unknown", {"unknown": -0.1, "x": -8.0}, "help", 7.9),
        ("so\n<", "answer", {"answer": -0.1, "x": -8.0}, "answer", -7.9),
    ],
)
def test_a_fork(text: str, token: str, others: dict[str, float], side: str, score: float) -> None:
    found = fork(text, token, others)
    assert found is not None
    assert found.side == side
    assert found.score == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "token", "others"),
    [
        ("2 ", "<", {"<": -0.1, "+": -3.0}),
        ("2 <", " 3", {" 3": -0.1, "unknown": -3.0}),
        # Not how the tokenizer spells the tag: the beginning of something else.
        ("a list: <", "un", ODDS),
        ("a link: <", "a", ODDS),
        ("</", "answer", {"answer": -0.1, "unknown": -4.0}),
        ("so\n<", "unk", {}),
    ],
)
def test_no_fork(text: str, token: str, others: dict[str, float]) -> None:
    assert fork(text, token, others) is None


def test_a_whole_tag_is_a_fork_without_log_probabilities_too() -> None:
    found = fork("so\n", HELP_OPEN, {})
    assert found is not None
    assert (found.side, found.score) == ("help", None)


def lead(guide: Guide, tokens: Sequence[str], others: dict[str, float] | None = None) -> tuple[str, str]:
    """What comes out until the guide turns the response, and how it does."""
    text = ""
    for token in tokens:
        step = guide.feed(token, others or {})
        text += step.text
        if step.turn:
            return text, step.turn
    return text + guide.end(), ""


@pytest.mark.parametrize(
    ("bias", "token", "text", "turn"),
    [
        (0.0, "unknown", "so\n<unknown", ""),
        (0.0, "answer", "so\n" + HELP_CALL, "ask"),
        (-0.4, "answer", "so\n" + HELP_CALL, "ask"),
        (-0.6, "answer", "so\n<answer", ""),
        (-0.6, "unknown", "so\n<answer", "answer"),
    ],
)
def test_the_dial_decides_for_the_model(bias: float, token: str, text: str, turn: str) -> None:
    guide = Guide(by_dial=True, bias=bias)
    assert lead(guide, ["so\n", "<", token], ODDS) == (text, turn)
    assert guide.score == 0.5


def test_without_the_dial_the_model_decides() -> None:
    guide = Guide(bias=-100.0)
    assert lead(guide, ["<", "unknown"], ODDS) == ("<unknown", "")
    assert guide.score == 0.5


def test_the_dial_moves_nothing_without_log_probabilities() -> None:
    guide = Guide(by_dial=True, bias=100.0)
    assert lead(guide, ["so\n<answer>4</answer>"]) == ("so\n<answer>4</answer>", "")
    assert guide.score is None


def test_a_tag_in_a_models_thinking_is_no_choice() -> None:
    guide = Guide(forbid_help=True, by_dial=True, bias=100.0)
    text = f"<think>or {HELP_CALL}?</think>4"
    assert lead(guide, [text[n : n + 1] for n in range(len(text))]) == (text, "")


@given(st.data())
def test_forbidden_help_never_comes_out_whatever_the_pieces(data: st.DataObject) -> None:
    begin = data.draw(st.sampled_from(["", "2 < 3\n", "<b>no</b> <unk", "<unknow", "a <"]))
    text = begin + HELP_CALL
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert lead(Guide(forbid_help=True), pieces) == (begin + "<answer", "answer")


@given(st.text(alphabet="<unkow>a 1\n"), st.data())
def test_all_that_is_no_tag_comes_out_as_it_went_in(text: str, data: st.DataObject) -> None:
    assume(HELP_OPEN not in text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert lead(Guide(forbid_help=True), pieces) == (text, "")


def test_what_the_response_begins_with_is_not_given_out_again() -> None:
    assert lead(Guide("so\n<", forbid_help=True), ["unknown"], ODDS) == ("answer", "answer")
    assert lead(Guide("so\n"), ["<answer>4"]) == ("<answer>4", "")
