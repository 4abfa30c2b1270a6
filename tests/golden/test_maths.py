"""The maths verifier against the verdicts of a careful person, through the protocol that a response goes through."""

from __future__ import annotations

import time

import pytest

from selfroute.protocol import parse
from selfroute.tasks.equivalence import LIMIT_S, judge
from selfroute.types import Answer
from tests.golden.maths_pairs import QUESTIONS, RIGHT, WRONG

CASES = [
    *(("", answer, reference, True) for pairs in RIGHT.values() for answer, reference in pairs),
    *(("", answer, reference, False) for pairs in WRONG.values() for answer, reference in pairs),
    *QUESTIONS,
]


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 150
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize(("question", "answer", "reference", "right"), CASES)
def test_verdicts(question: str, answer: str, reference: str, right: bool) -> None:
    verdict = judge(answer, [reference], question)
    assert verdict.correct is right, verdict.reason
    assert verdict.reason


@pytest.mark.parametrize("reference", sorted({reference for _, _, reference, _ in CASES}))
def test_every_reference_is_its_own_answer(reference: str) -> None:
    assert judge(reference, [reference]).correct
    assert judge(rf"So it is $\boxed{{{reference}}}$." if "boxed" not in reference else reference, [reference]).correct


def test_any_of_several_golds_will_do() -> None:
    assert judge("2", ["1", "2"]).correct
    assert judge("3", ["1", "2"]).reason == "the number 3, not 1; the number 3, not 2"
    assert judge("3", []).reason == "no reference answer is known"
    assert [judge("3", golds).judged for golds in ([], ["3"], ["4"])] == [False, True, True]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"I first thought \boxed{7}, but no. <answer>\boxed{8}</answer>", True),
        (r"It is \boxed{8}. <answer>\boxed{7}</answer>", False),
        (r"It is \boxed{8}. <answer>7</answer>", False),
        (r"<answer>\boxed{7}</answer> or <answer>\boxed{8}</answer>", True),
        (r"<answer>\boxed{8}</answer> or <answer>\boxed{7}</answer>", False),
        ("<answer>8</answer>", True),
        (r"<answer>$8$ apples</answer>", True),
    ],
)
def test_a_box_in_the_reasoning_is_no_answer(response: str, right: bool) -> None:
    decision = parse(response)
    assert isinstance(decision, Answer)
    assert judge(decision.text, ["8"]).correct is right


HOSTILE = [
    "1" * 1_000_000,
    "x+" * 500_000 + "1",
    r"\boxed{" * 100_000,
    r"\frac{" * 10_000 + "1" + "}" * 10_000,
    "{" * 10_000 + "7" + "}" * 10_000,
    "(" * 10_000 + "7" + ")" * 10_000,
    r"\boxed{" + "(" * 480 + ")" * 18 + "}",
    r"\boxed{" + r"\sqrt{" * 80 + "}",
    r"\boxed{" + r"\frac{1}{1+" * 40 + "1" + "}" * 40 + "}",
    "9^{9^{9^{9}}}",
    "9^{99999}",
    "1e9999",
    "0.1^{99999}",
    r"\frac{1}{10^{99999}}",
    r"\boxed{(10^{10}x)^{10^{10}}}",
    r"\text{" * 600,
    "," * 480,
    "1," * 240,
    r"\pm" * 160,
    r"\{" * 240,
    r"\cup" * 120,
    "\x00\x01\x1b[31m7",
    "\ud800",
    "\u202e7",
    "７" * 400,
    "𝟕",
    "½" * 400,
    "²" * 400,
    "💥" * 400,
    r"\input{/etc/passwd}",
    "__import__('os').system('true')",
    r"\begin{pmatrix}" + r"1&\\" * 100 + r"\end{pmatrix}",
    "\\",
    "$",
    "%",
    "_",
    "^",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda a: ascii(a[:20]))
@pytest.mark.parametrize("reference", ["8", "x^2+1", "(1,2)", r"\text{east}", r"[0,\infty)"])
def test_hostile_answers_are_wrong_in_time_and_never_raise(answer: str, reference: str) -> None:
    started = time.monotonic()
    verdict = judge(answer, [reference])
    # A worker may have to start anew.
    assert time.monotonic() - started < LIMIT_S + 20
    assert not verdict.correct
    assert 0 < len(verdict.reason) < 400
