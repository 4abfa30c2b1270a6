"""Whether two formulas are equal, by math-verify: runs in a worker of a pool, since it may hang.

math-verify's own time limits are off: they use SIGALRM, and the pool's limit ends what hangs.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

DIGITS = 30
"""Decimal digits to which two constants are compared."""


def equal(answer: str, reference: str) -> bool | None:
    """Whether two formulas in LaTeX are equal; None where one of them cannot be read."""
    gold, given = _read(reference), _read(answer)
    if not gold or not given:
        return None
    same = verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and not _apart(gold[0], given[0])


def _read(text: str) -> list[Any]:
    # Whether it takes a formula for a complex one depends on spaces around i.
    text = re.sub(r"(?<![\\a-zA-Z])i(?![a-zA-Z])", " i ", text)
    read: list[Any] = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return read


def _apart(a: Any, b: Any) -> bool:
    """Whether two constants differ by more than rounding: math-verify takes small ones, such as 2^-98, for zero."""
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return False
    # Units of percent are left to it.
    difference, size = (a - b).doit().evalf(DIGITS), abs(a.doit().evalf(DIGITS))
    return bool(difference.is_comparable and abs(difference) > size * 10 ** (-DIGITS // 2))
