"""Answers to multiple-choice questions against the option that a careful person reads, and through the protocol."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.protocol import parse
from selfroute.tasks.choice import ChoiceConfig, MultipleChoice
from selfroute.tasks.letters import LETTERS, letter_of, pick
from selfroute.types import Answer, Problem
from tests.golden.choice_responses import CAPITALS, HOSTILE, NONE, PICKED, TEN

TASK = MultipleChoice(ChoiceConfig())


def problem(options: tuple[str, ...], right: int) -> Problem:
    return Problem("choice-0", "Which?", {"options": options, "right": right})


def test_the_table_is_long_enough() -> None:
    cases = [(options, answer) for options, answer, _ in PICKED + NONE]
    assert len(cases) >= 60
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize(("options", "answer", "letter"), PICKED, ids=lambda value: ascii(value)[:40])
def test_an_answer_picks_one_option(options: tuple[str, ...], answer: str, letter: str) -> None:
    right = LETTERS.index(letter)
    assert pick(answer, options) == right
    assert TASK.verify(answer, problem(options, right)).reason == f"option {letter}"
    wrong = next(n for n, option in enumerate(options) if option != options[right])
    assert not TASK.verify(answer, problem(options, wrong)).correct


@pytest.mark.parametrize(("options", "answer", "why"), NONE, ids=lambda value: ascii(value)[:40])
def test_an_answer_picks_none_and_says_why(options: tuple[str, ...], answer: str, why: str) -> None:
    for right in range(len(options)):
        verdict = TASK.verify(answer, problem(options, right))
        assert not verdict.correct
        assert why in verdict.reason


@pytest.mark.parametrize("options", [CAPITALS, TEN, LETTERS], ids=["capitals", "ten", "letters"])
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: ascii(answer[:20]))
def test_hostile_answers_pick_none_in_time(options: tuple[str, ...], answer: str) -> None:
    started = time.process_time()
    picked = pick(answer, options)
    assert time.process_time() - started < 1
    assert isinstance(picked, str)
    assert 0 < len(picked) < 200


@given(st.text(alphabet=st.characters(), max_size=300), st.lists(st.text(max_size=20), min_size=2, max_size=26))
def test_any_answer_to_any_options_gets_a_verdict(answer: str, options: list[str]) -> None:
    verdict = TASK.verify(answer, problem(tuple(options), 0))
    assert verdict.reason
    assert isinstance(TASK.canonical(answer), str)


@given(st.lists(st.sampled_from(["A", "B", "(b)", "Paris", "answer is", "\\boxed{", "}", "not", ". ", " ", "$"])))
def test_what_is_right_is_one_option_and_no_other(parts: list[str]) -> None:
    answer = "".join(parts)
    correct = [n for n in range(4) if TASK.verify(answer, problem(CAPITALS, n)).correct]
    assert len(correct) <= 1


def test_threads_give_the_same_verdicts_as_one() -> None:
    cases = [(answer, problem(options, 1)) for options, answer, _ in PICKED + NONE] * 4
    alone = [TASK.verify(*case) for case in cases]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda case: TASK.verify(*case), cases)) == alone


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"First I thought \boxed{A}, but no. <answer>B</answer>", True),
        (r"It is \boxed{B}. <answer>A</answer>", False),
        ("A, B, C? <answer>B. Paris</answer>", True),
        ("<answer>A</answer> or rather <answer>B</answer>", True),
        ("<answer>B</answer> or rather <answer>A</answer>", False),
        ("<answer>B</answer><answer>A or B</answer>", False),
    ],
)
def test_the_reasoning_is_no_answer(response: str, right: bool) -> None:
    decision = parse(response)
    assert isinstance(decision, Answer)
    assert TASK.verify(decision.text, problem(CAPITALS, 1)).correct is right


def test_equal_answers_share_a_form() -> None:
    assert letter_of("(b)") == letter_of(r"\boxed{B}") == letter_of("B. Paris") == letter_of("The answer is B") == "B"
    assert letter_of("A or B") == ""
    assert TASK.canonical("Paris.") == TASK.canonical(" **Paris** ") != TASK.canonical("Rome")
