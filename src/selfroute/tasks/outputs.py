"""Whether what a program printed or returned is what was expected: the benchmarks' rules, without their gaps.

Printed text is compared line by line, white space at the ends of lines and of the text aside; spaces within a line
count. With a tolerance, a token *written* as a decimal fraction or with an exponent may differ by it, absolutely
or relatively; whole numbers never may (several harnesses let them, so that 1000000 passes for 1000001).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from selfroute.tasks.inside.wire import unpack

_FRACTION = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def text_fault(got: str, expected: str, tolerance: float = 0.0) -> str | None:
    """What is wrong with printed text; None where it is right.

    >>> text_fault("1 2 \\n3\\n\\n", "1 2\\n3")
    >>> text_fault("1\\n2", "1 2")
    "got '1' in line 1, expected '1 2'"
    >>> text_fault("0.3333", "0.33333333", 1e-3)
    """
    got_lines, lines = ([line.strip() for line in text.strip().split("\n")] for text in (got, expected))
    for number, (one, line) in enumerate(zip(got_lines, lines, strict=False), 1):
        if one != line and not (tolerance and _close_tokens(one.split(), line.split(), tolerance)):
            return f"got {show(one)} in line {number}, expected {show(line)}"
    if len(got_lines) != len(lines):
        return f"got {len(got_lines)} lines, expected {len(lines)}"
    return None


def _close_tokens(got: list[str], expected: list[str], tolerance: float) -> bool:
    return len(got) == len(expected) and all(
        one == token
        or bool(_FRACTION.fullmatch(token) and _NUMBER.fullmatch(one) and _close(float(one), float(token), tolerance))
        for one, token in zip(got, expected, strict=True)
    )


def _close(got: float, expected: float, tolerance: float) -> bool:
    return math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)


@dataclass(frozen=True, slots=True, eq=False)
class Unbuilt:
    """A set or dict that a program returned, as the list of its elements or pairs: it chooses whole numbers of one hash
    if it likes, and a table of n of these takes n^2 steps to build."""

    kind: str
    values: list[Any]

    def __repr__(self) -> str:
        if self.kind == "dict":
            return f"{{{', '.join(f'{key!r}: {value!r}' for key, value in self.values)}}}"
        return f"{self.kind}({self.values!r})"


_KINDS: Mapping[str, Callable[[list[Any]], Any]] = {
    "t": tuple,
    "s": partial(Unbuilt, "set"),
    "z": partial(Unbuilt, "frozenset"),
    "d": partial(Unbuilt, "dict"),
}


def returned(answers: str) -> Any:
    """The value that a program returned, with `Unbuilt` for sets and dicts.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: it is no plain data.
    """
    return unpack(json.loads(answers), kinds=_KINDS)


def value_fault(got: Any, expected: Any, tolerance: float = 0.0) -> str | None:
    """What is wrong with a value as `returned` gives it; None where it is right.

    JSON has no tuples, so that a tuple passes for a list, and no sets, which pass for nothing. Files of problems often
    wrap an expected value in a list of its own: the one inside it passes too.

    >>> value_fault((1, 2), [1, 2])
    >>> value_fault(5, [5])
    >>> value_fault(6, 5)
    'got 6, expected 5'
    """
    if _same(got, expected, tolerance) or (
        isinstance(expected, list) and len(expected) == 1 and _same(got, expected[0], tolerance)
    ):
        return None
    return f"got {show(got)}, expected {show(expected)}"


def _same(got: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, list):
        return (
            isinstance(got, (list, tuple))
            and len(got) == len(expected)
            and all(_same(g, e, tolerance) for g, e in zip(got, expected, strict=True))
        )
    if isinstance(expected, dict):
        if not isinstance(got, Unbuilt) or got.kind != "dict" or len(got.values) != len(expected):
            return False
        # Of keys that are expected a table may be built.
        known = {key: value for key, value in got.values if key in expected}
        return len(known) == len(expected) and all(_same(known[k], e, tolerance) for k, e in expected.items())
    if tolerance and isinstance(expected, float) and isinstance(got, (int, float)):
        try:
            return _close(got, expected, tolerance)
        except OverflowError:
            return False
    return bool(got == expected)


def show(value: Any, length: int = 60) -> str:
    """A value for people, cut to a length.

    >>> show("a" * 99, 9)
    "'aaaa ..."
    """
    if isinstance(value, str):
        value = value[: length + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python refuses to write numbers of more than 4,300 digits.
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= length else text[: length - 4] + " ..."
