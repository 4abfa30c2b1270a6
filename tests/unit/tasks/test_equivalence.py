from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.golden.maths_pairs import RIGHT, WRONG

from selfroute.tasks.equivalence import LIMIT_S, MAX_ANSWER_CHARS, MAX_FORMULA_CHARS, canonical, judge
from selfroute.tasks.latex import extract, normal
from selfroute.tasks.literals import number
from selfroute.tasks.shapes import as_intervals, shape

SPELLED = (
    r"\frac \sqrt \boxed \text \pm \cup \{ \} \begin{pmatrix} \end{pmatrix} \le \pi \infty \times \int \\ \ "
    "{ } ( ) [ ] , + - * / ^ _ = < > % $ ! | & 1 23 0.5 x east cm 10^ ° ½ ²"
)
PIECES = st.sampled_from([*SPELLED.split(" "), " ", "\x00", "\ud800"])
LATEX = st.lists(PIECES, max_size=30).map("".join)
REFERENCES = ["8", r"\frac{1}{2}", "x^2+1", "(1,2)", "1,2", r"\text{east}", r"[0,\infty)", "10\\%", "2516_8"]


@settings(deadline=None, max_examples=400)
@given(LATEX | st.text(max_size=200), st.sampled_from(REFERENCES[:2] + REFERENCES[5:6]))
def test_any_text_gets_a_verdict_at_once(answer: str, reference: str) -> None:
    started = time.monotonic()
    verdict = judge(answer, [reference])
    assert time.monotonic() - started < 1
    assert verdict.reason
    assert canonical(answer) is not None


@settings(deadline=None, max_examples=40)
@given(LATEX, st.sampled_from(REFERENCES))
def test_any_formula_gets_a_verdict_within_its_limit(answer: str, reference: str) -> None:
    started = time.monotonic()
    verdict = judge(answer, [reference])
    # A worker may have to start anew.
    assert time.monotonic() - started < LIMIT_S + 20
    assert verdict.reason


@settings(deadline=None)
@given(st.text(max_size=300))
def test_reading_never_raises(text: str) -> None:
    read = normal(extract(text))
    number(read.text)
    shape(read.text)
    as_intervals(read.text)


@settings(deadline=None)
@given(st.fractions(), st.sampled_from(["{n}/{d}", r"\frac{{{n}}}{{{d}}}", r"$\dfrac{{{n}}}{{{d}}}$"]))
def test_numbers_are_exact(value: object, form: str) -> None:
    n, d = value.numerator, value.denominator  # type: ignore[attr-defined]
    text = form.format(n=n, d=d) if d > 1 else str(n)
    assert judge(text, [f"{n}/{d}" if d > 1 else str(n)]).correct
    assert not judge(text, [f"{n + 1}/{d}" if d > 1 else str(n + 1)]).correct


def test_long_answers_are_refused_before_any_work() -> None:
    started = time.monotonic()
    assert judge("7" * 5_000_000, ["7"]).reason == f"longer than {MAX_ANSWER_CHARS} characters"
    assert judge("7" * (MAX_FORMULA_CHARS + 1), ["7"]).reason.startswith("the final answer is longer")
    assert time.monotonic() - started < 0.05


def test_the_reason_names_the_stage() -> None:
    for answer, reference, reason in (
        ("x", "x", "the same text"),
        ("0.5", "1/2", "the number 1/2"),
        ("3", "4", "the number 3, not 4"),
        (r"37\times49", "1813", r"not a number written out: 37\times49"),
        ("3626/2", "1813", "not worked out: the fraction 3626/2"),
        (r"\int_0^1 \pi", r"\pi", "not worked out: it has an integral"),
        ("west", "east", "is west, not east"),
        ("2,1", "1,2", "equal part by part"),
        ("(1,2)", "1,2", "is () of 2, not 2 in a list"),
        ("5 meters", "5 cm", "in m, not cm"),
        ("1+x", "x+1", "math-verify: equal"),
        ("1+x", "x+2", "math-verify: 1+x is not x+2"),
        (r"\frac{x}{", "x+2", r"math-verify cannot read \frac{x}{, or x+2"),
    ):
        assert judge(answer, [reference]).reason == reason


def test_eight_threads_give_the_verdicts_of_one() -> None:
    pairs = [pair for table in (RIGHT, WRONG) for kind in ("formulas", "sets and lists") for pair in table[kind]]
    # Spelled anew, since verdicts are remembered.
    alone = [judge(f"{a} ", [r]).correct for a, r in pairs]
    barrier = threading.Barrier(8)

    def all_of_them(n: int) -> list[bool]:
        barrier.wait()
        return [judge(f"{a}{' ' * (n + 2)}", [f"{r}{' ' * (n + 1)}"]).correct for a, r in pairs]

    with ThreadPoolExecutor(8) as pool:
        assert all(verdicts == alone for verdicts in pool.map(all_of_them, range(8)))


def test_a_formula_that_hangs_is_undecided_and_the_next_is_judged() -> None:
    # sympy expands it for longer than anyone waits.
    hanging = "(x+y+z+w)^{99}(x-y+z)^{99}"
    started = time.monotonic()
    verdict = judge(hanging, ["x^3+2"])
    assert time.monotonic() - started < LIMIT_S + 20
    assert not verdict.correct
    assert verdict.reason == "undecided after 5 s"
    assert judge("2+x^3", ["x^3+2"]).correct
    # Asked again, it costs nothing.
    started = time.monotonic()
    assert judge(hanging, ["x^3+2"]) == verdict
    assert time.monotonic() - started < 0.1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("x = 3", "3"),
        (r"3\text{ cm}", "3"),
        (r"\boxed{x^{2} + 1}", "x^2+1"),
        ("East", r"\text{east}"),
    ],
)
def test_canonical_forms_are_shared(a: str, b: str) -> None:
    assert canonical(a) == canonical(b)
    assert canonical(a) != canonical("7")
