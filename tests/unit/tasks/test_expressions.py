from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.tasks.expressions import canonical


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3*7+25", "25 + (7*3)"),
        ("(1+2)+3", "3+(2+1)"),
        ("1-(2-3)", "1-2+3"),
        ("1-(2+3)", "(1-3)-2"),
        ("8/(2*4)", "8/4/2"),
        ("8/(4/2)", "8*2/4"),
        ("((5))", "5"),
    ],
)
def test_the_same_up_to_order(a: str, b: str) -> None:
    assert canonical(a) == canonical(b)


@pytest.mark.parametrize(("a", "b"), [("25+21", "46"), ("1-2", "2-1"), ("8/2", "2/8"), ("2*(3+4)", "2*3+4")])
def test_others_differ_even_with_the_same_value(a: str, b: str) -> None:
    assert canonical(a) != canonical(b)


@given(st.permutations([3, 7, 12, 12]))
def test_sums_of_any_order_are_one(order: list[int]) -> None:
    assert canonical("+".join(map(str, order))) == canonical("3+7+12+12")


@given(st.text(max_size=600))
def test_it_is_total(text: str) -> None:
    canonical(text)


@pytest.mark.parametrize("text", ["25+", "(1", "x", "1 x 2", "", "(" * 5000, "1" * 5000])
def test_what_is_no_expression_stands_for_itself(text: str) -> None:
    assert canonical(text) == "".join(text.split())
