"""Arithmetic over exact rationals: judge an expression, compare two, and find one for a target. No `eval`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from selfroute.types import Verdict

# An honest answer for six numbers is under 60 characters; the limit keeps hostile input cheap.
MAX_ANSWER_CHARS = 500
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def verify(answer: str, numbers: Sequence[int], target: int) -> Verdict:
    """Judge an expression by exact rational arithmetic, without `eval`. Total: it never raises, on any text.

    >>> verify("(3*7)+25", [3, 7, 25], 46).correct
    True
    >>> verify("3*7+25", [3, 7, 7, 25], 46).reason
    'uses the numbers [3, 7, 25], not [3, 7, 7, 25]'
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, f"longer than {MAX_ANSWER_CHARS} characters")
    compact = "".join(answer.split())
    tokens = _TOKEN.findall(compact)
    # Spaces inside a number would vanish: "1 2" must not read as 12.
    if not answer.isascii() or sum(map(len, tokens)) != len(compact) or re.search(r"[0-9]\s+[0-9]", answer):
        return Verdict(False, "has a character outside 0-9 + - * / ( )")
    correct, reason = _judge(tokens, numbers, target)
    return Verdict(correct, reason, extracted=compact)


def _judge(tokens: Sequence[str], numbers: Sequence[int], target: int) -> tuple[bool, str]:
    literals = [t for t in tokens if t.isdigit()]
    if any(len(t) > 1 and t[0] == "0" for t in literals):
        return False, "a number has leading zeros"
    if any(len(t) > 12 for t in literals):
        return False, "a number is too long"
    used = [int(t) for t in literals]
    if Counter(used) != Counter(numbers):
        return False, f"uses the numbers {sorted(used)}, not {sorted(numbers)}"
    try:
        value = _fold(tokens, lambda text: Fraction(int(text)), _calculate)
    except (_MalformedError, ZeroDivisionError) as error:
        return False, str(error) if isinstance(error, _MalformedError) else "divides by zero"
    return value == target, f"makes {value}" + ("" if value == target else f", not {target}")


class _MalformedError(Exception):
    pass


def _calculate(a: Fraction, op: str, b: Fraction) -> Fraction:
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b


T = TypeVar("T")


def _fold(tokens: Sequence[str], number: Callable[[str], T], combine: Callable[[T, str, T], T]) -> T:
    """What infix tokens come to, by two stacks: no recursion, so nesting cannot overflow."""
    values: list[T] = []
    operators: list[str] = []

    def reduce() -> None:
        op, b, a = operators.pop(), values.pop(), values.pop()
        values.append(combine(a, op, b))

    operand_next = True
    for token in tokens:
        if token.isdigit():
            if not operand_next:
                raise _MalformedError("two numbers stand side by side")
            values.append(number(token))
            operand_next = False
        elif token == "(":
            if not operand_next:
                raise _MalformedError("an operator is missing before a parenthesis")
            operators.append(token)
        elif operand_next:
            raise _MalformedError(f"a number is missing before {token!r}")
        elif token == ")":
            while operators and operators[-1] != "(":
                reduce()
            if not operators:
                raise _MalformedError("unbalanced parentheses")
            operators.pop()
        else:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                reduce()
            operators.append(token)
            operand_next = True
    if operand_next:
        raise _MalformedError("the expression ends too early")
    while operators:
        if operators[-1] == "(":
            raise _MalformedError("unbalanced parentheses")
        reduce()
    return values[0]


def canonical(answer: str) -> str:
    """An answer in a form that expressions share which differ in the order of sums and products alone.

    Its value is left out on purpose: comparing that with the target is the verifier's work, which no router may do.
    What is no expression stands for itself.

    >>> canonical("(3*7)+25-1") == canonical("25-1 + 7*3")
    True
    >>> canonical("25+21"), canonical("25+")
    ('+21+25', '25+')
    """
    compact = "".join(answer.split())
    tokens = _TOKEN.findall(compact[:MAX_ANSWER_CHARS])
    if "".join(tokens) != compact:
        return compact
    try:
        return _fold(tokens, lambda text: _Ordered("", (text,)), _ordered).text
    except _MalformedError:
        return compact


@dataclass(frozen=True, slots=True)
class _Ordered:
    """A sum (`kind` "+-"), a product ("*/") or a number (""), its signed parts in order."""

    kind: str
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def signed(self, kind: str, flip: bool) -> list[str]:
        if self.kind != kind:
            return [kind[flip] + (f"({self.text})" if self.kind else self.text)]
        return [kind[(part[0] == kind[1]) != flip] + part[1:] for part in self.parts]


def _ordered(a: _Ordered, op: str, b: _Ordered) -> _Ordered:
    kind = "+-" if op in "+-" else "*/"
    return _Ordered(kind, tuple(sorted(a.signed(kind, False) + b.signed(kind, op == kind[1]))))


def solve(numbers: Sequence[int], target: int) -> str | None:
    """An expression that makes the target, or None if there is none: exhaustive, over exact rationals.

    >>> solve([3, 7, 25], 46)
    '(7*3)+25'
    """
    seen: set[tuple[Fraction, ...]] = set()

    def search(items: list[tuple[Fraction, str]]) -> str | None:
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        key = tuple(sorted(value for value, _ in items))
        if key in seen:
            return None
        seen.add(key)
        for i in range(len(items)):
            for j in range(i):
                rest = [item for n, item in enumerate(items) if n not in (i, j)]
                (a, x), (b, y) = items[i], items[j]
                candidates = [(a + b, f"{x}+{y}"), (a * b, f"{x}*{y}"), (a - b, f"{x}-{y}"), (b - a, f"{y}-{x}")]
                if b:
                    candidates.append((a / b, f"{x}/{y}"))
                if a:
                    candidates.append((b / a, f"{y}/{x}"))
                for value, text in candidates:
                    found = search([*rest, (value, f"({text})")])
                    if found is not None:
                        return found
        return None

    expression = search([(Fraction(n), str(n)) for n in numbers])
    return expression[1:-1] if expression and expression.startswith("(") else expression
