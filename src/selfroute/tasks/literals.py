r"""Numbers that are written out, exactly: 033, 27.0, 1,234, \frac{3}{4}, 1\frac{1}{2}, 2^{10}, 6\times10^{23}, 15%.

Left out on purpose: arithmetic. `37\times49` is no number here, so that a problem cannot be handed back as its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

MAX_BITS = 6000
"""Larger numbers are not worked out."""

_PLAIN = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = rf"{_PLAIN}(?:\^(?:[0-9]{{1,5}}|\{{-?[0-9]{{1,5}}\}}))?"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<n>{_POWER})",
        rf"(?P<n>-?{_POWER})/(?P<d>-?{_POWER})",
        rf"\\frac\{{(?P<n>[+-]?{_POWER})\}}\{{(?P<d>[+-]?{_POWER})\}}",
        r"(?P<whole>[0-9]+)\\frac\{(?P<n>[0-9]+)\}\{(?P<d>[0-9]+)\}",
        r"(?P<whole>[0-9]+) (?P<n>[0-9]+)/(?P<d>[0-9]+)",
        rf"(?P<n>{_PLAIN})(?:(?:\\times|\\cdot|\*)10\^(?:\{{(?P<e>[+-]?[0-9]{{1,4}})\}}|(?P<e2>-?[0-9]{{1,4}}))"
        r"|[eE](?P<e3>[+-]?[0-9]{1,4}))",
        r"(?P<n>[0-9]*\.[0-9]*)\\overline\{(?P<again>[0-9]+)\}",
    )
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Number:
    """A number that is written out, and how.

    `value` is exact; `percent` tells that it was in percent, and was divided by 100; `bar` that it is a fraction with a
    bar, `lowest` that no whole number divides both its parts.
    """

    value: Fraction
    percent: bool
    bar: bool
    lowest: bool


def number(text: str) -> Number | None:
    r"""The number that a text in the one spelling of `latex.normal` writes out; None for anything else.

    >>> number(r"-1\frac{1}{2}").value, number("15%").value, number("033").value
    (Fraction(-3, 2), Fraction(3, 20), Fraction(33, 1))
    >>> number(r"37\times49")
    """
    percent = text.endswith("%")
    text = text.removesuffix("%")
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("+", "-") else text
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    for form in _FORMS:
        match = form.fullmatch(text)
        if match:
            return _made(match.groupdict(), sign, percent)
    return None


def _made(parts: dict[str, str | None], sign: int, percent: bool) -> Number | None:
    top, bottom = _power(parts["n"] or ""), _power(parts.get("d") or "1")
    exponent = int(parts.get("e") or parts.get("e2") or parts.get("e3") or 0)
    if top is None or not bottom or abs(exponent) * 4 > MAX_BITS:
        return None
    value = int(parts.get("whole") or 0) + top / bottom * Fraction(10) ** exponent
    again = parts.get("again")
    if again:
        places = len((parts["n"] or "").partition(".")[2])
        value += Fraction(int(again), (10 ** len(again) - 1) * 10**places)
    whole = top.denominator == bottom.denominator == 1 and bottom > 1
    lowest = whole and gcd(top.numerator, bottom.numerator) == 1
    return Number(sign * value / (100 if percent else 1), percent, bool(parts.get("d")), lowest)


def _power(text: str) -> Fraction | None:
    sign = -1 if text.startswith("-") else 1
    base, _, raised = text.lstrip("+-").partition("^")
    value, exponent = Fraction(f"0{base}"), int(raised.strip("{}") or 1)
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if bits * abs(exponent) > MAX_BITS or (value == 0 and exponent <= 0):
        return None
    return sign * value**exponent
