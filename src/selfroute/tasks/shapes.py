r"""What an answer consists of: a tuple, an interval, a set, a list, a matrix, a union; and inequalities as intervals.

Works on text in the one spelling of `latex.normal`. Left out on purpose: what the parts are worth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from selfroute.tasks.latex import ROW

_OPEN, _CLOSE = ("(", "[", "\\{", "{", "\\langle"), (")", "]", "\\}", "}", "\\rangle")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:\{[clr|]+\})?(.*)\\end\{\1\}", re.DOTALL)
_LESS = re.compile(r"<|\\le(?![a-z])|>|\\ge(?![a-z])")


@dataclass(frozen=True, slots=True)
class Shape:
    """The parts of an answer and how they stand together.

    `kind` is `list` (a set, or values side by side: in any order), `union` (of intervals, in any order), a pair of
    brackets such as `(]` (in order), or the size of a matrix such as `2x2` (row by row).
    """

    kind: str
    parts: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        return self.kind not in ("list", "union")


def shape(text: str) -> Shape | None:
    r"""What an answer consists of; None for a single formula.

    >>> shape("(1,2]"), shape(r"\{3,1\}")
    (Shape(kind='(]', parts=('1', '2')), Shape(kind='list', parts=('3', '1')))
    >>> shape(r"1\pm\pi").parts
    ('1+\\pi', '1-\\pi')
    """
    enclosed = _enclosed(text)
    if enclosed:
        return enclosed
    union = split(text, "\\cup")
    if len(union) > 1:
        return Shape("union", tuple(union))
    parts = [signed for part in split(text, ",") for signed in _signs(part)]
    return Shape("list", tuple(parts)) if len(parts) > 1 else None


def _enclosed(text: str) -> Shape | None:
    matrix = _MATRIX.fullmatch(text)
    if matrix and matrix[1][0] not in "vV":
        rows = [row.split("&") for row in matrix[2].strip(ROW).split(ROW)]
        cells = tuple(cell.strip() for row in rows for cell in row)
        # A row or a column is a vector, however it is written.
        return Shape("()" if 1 in (len(rows), len(cells) // len(rows)) else f"{len(rows)}x{len(rows[0])}", cells)
    tokens = _TOKEN.findall(text)
    if len(tokens) < 2 or tokens[0] not in _OPEN or tokens[-1] not in _CLOSE or not _one_pair(tokens):
        return None
    inside = "".join(tokens[1:-1])
    parts = split(inside, ",")
    if tokens[0] == "\\{":
        return Shape("list", tuple(signed for part in parts for signed in _signs(part)))
    if len(parts) == 1:
        return None
    return Shape("()" if tokens[0] == "\\langle" else tokens[0] + tokens[-1], tuple(parts))


def ungrouped(text: str) -> str:
    """The text without parentheses around the whole of it, where they are no tuple's.

    >>> ungrouped("((x+1))"), ungrouped("(x+1)(x-1)"), ungrouped("(1,2)")
    ('x+1', '(x+1)(x-1)', '(1,2)')
    """
    while text.startswith("(") and text.endswith(")") and _one_pair(_TOKEN.findall(text)):
        if len(split(text[1:-1], ",")) > 1:
            break
        text = text[1:-1]
    return text


def _one_pair(tokens: list[str]) -> bool:
    """Whether the first bracket is closed by the last token."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return i == len(tokens) - 1
    return False


def split(text: str, mark: str) -> list[str]:
    """The parts between marks that stand in no bracket."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPEN) - (token in _CLOSE)
        if token == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _signs(part: str) -> list[str]:
    r"""Both values of a part with one `\pm`."""
    if part.count("\\pm") != 1:
        return [part]
    before, after = part.split("\\pm")
    return [f"{before}+{after.strip()}".removeprefix("+"), f"{before}-{after.strip()}"]


def as_intervals(text: str) -> str | None:
    r"""Inequalities in one variable as the interval or union that they stand for; None for anything else.

    >>> as_intervals(r"-1\le x<3"), as_intervals("x<0,x>2"), as_intervals("x+y<3")
    ('[-1,3)', '(-\\infty,0)\\cup(2,\\infty)', None)
    """
    found = [_interval(part) for part in split(text, ",")]
    return None if None in found else "\\cup".join(part for part in found if part)


def _interval(part: str) -> str | None:
    signs = ["<" if s in ("<", "\\le") else ">" for s in _LESS.findall(part)]
    strict = [s in "<>" for s in _LESS.findall(part)]
    ends = [end.strip() for end in _LESS.split(part)]
    if len(set(signs)) != 1 or len(ends) > 3:
        return None
    if signs[0] == ">":
        ends, strict = ends[::-1], strict[::-1]
    if len(ends) == 2:
        # x < 3, or 3 < x
        left_variable = re.fullmatch(r"[a-z]", ends[0])
        ends = ["-\\infty", *ends] if left_variable else [*ends, "\\infty"]
        strict = [True, *strict] if left_variable else [*strict, True]
    low, variable, high = ends
    if not re.fullmatch(r"[a-z]|\\theta", variable):
        return None
    return f"{'(' if strict[0] else '['}{low},{high}{')' if strict[1] else ']'}"
