r"""Whether a formula is worked out, as far as the reference is: `37\pi\cdot49` is not, for `1813\pi`.

Works on text in the one spelling of `latex.normal`. Left out on purpose: whether the two are equal.
"""

from __future__ import annotations

import re

# Operations that turn a problem into its answer without solving it, by what they are.
_OPERATIONS = {
    "a factorial": re.compile(r"!"),
    "a sum": re.compile(r"\\sum(?![a-z])"),
    "a product": re.compile(r"\\prod(?![a-z])"),
    "an integral": re.compile(r"\\i{1,3}nt(?![a-z])|\\oint"),
    "a limit": re.compile(r"\\lim(?![a-z])"),
    "a derivative": re.compile(r"\\frac\{d\}|\\partial"),
    "a binomial": re.compile(r"\\[dt]?binom(?![a-z])|\\choose"),
    "a divisor or remainder": re.compile(r"\\(?:gcd|lcm|[bp]?mod)(?![a-z])"),
    "a minimum or maximum": re.compile(r"\\(?:min|max|inf|sup)(?![a-z])"),
    "a rounding": re.compile(r"\\[lr](?:floor|ceil)"),
    "an absolute value or determinant": re.compile(r"\\det(?![a-z])|[vV]matrix|\|"),
    "a logarithm": re.compile(r"\\(?:ln|log|lg)(?![a-z])"),
    "a trigonometric function": re.compile(
        r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?(?![a-z])|(?<![a-z\\])(?:sin|cos|tan)(?![a-z])"
    ),
    "a product of numbers": re.compile(
        r"(?:[0-9]|\\frac\{[0-9]+\}\{[0-9]+\})(?:\\times|\\cdot|\*)(?!10\^)[0-9]|[0-9]\)?\([0-9.]+\)"
    ),
    "a quotient": re.compile(r"\\div(?![a-z])"),
    "a sum of numbers": re.compile(r"(?<![0-9a-zA-Z}^.\\])[0-9.]+[-+][0-9.]+(?![0-9.a-zA-Z\\^{(])"),
    "a product of roots": re.compile(r"\\sqrt\{[0-9.]+\}(?:\\times|\\cdot|\*)?\\sqrt\{[0-9.]+\}"),
    "a root of a power": re.compile(r"\\sqrt\{[0-9.]+\^|\\sqrt\[([0-9])\]\{[0-9.]+\^\1\}"),
    "a tower of powers": re.compile(r"\^\{?[0-9.]+\^"),
}

_SUM = re.compile(r"(?<=[0-9a-zA-Z})\]])[-+]")
# Of these, a form with more numbers may be as good: products of sums, equations, logarithms, powers of e.
_FREE = re.compile(_SUM.pattern + r"|[=<>]|\\pm|\\(?:ln|log|le|ge|ne)(?![a-z])|e\^")
_CONSTANT = re.compile(r"(?:\\(?:pi|sqrt|frac)(?![a-zA-Z])|[^a-zA-Z\\])+")
_BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_WHOLE = re.compile(r"\\frac\{([0-9]+)(?:[^{}]|\{[^{}]*\})*\}\{([0-9]+)\}|([0-9]+)[^-+0-9/]*/([0-9]+)")
# Exponents and powers of ten; what is under a root; below a bar. A number is not split up by being written so.
_FORMS = (
    (re.compile(rf"(?:(?:\\times|\\cdot|\*)10)?\^(?:[0-9]|{_BRACED})"), ""),
    (re.compile(r"\\sqrt(?:\[[0-9]+\])?\{(?:[0-9.]+|\\frac\{[0-9]+\}\{[0-9]+\})\}"), " s "),
    (re.compile(rf"\\frac{_BRACED}\{{[0-9.]+"), r"\\frac{\1}{"),
    (re.compile(r"/[0-9.]+"), ""),
)

_FACTOR = re.compile(r"(?<!common )\bfactor(?:i[sz]e)?\b(?! of)|\bfactored\b", re.IGNORECASE)
_EXPAND = re.compile(r"\bexpand(?:ed)?\b|\bmultiply out\b", re.IGNORECASE)
_FACTORS = re.compile(r"\([^()]*[0-9a-zA-Z})][-+][^()]*\)(?:\^([0-9]))?")
_UNEXPANDED = re.compile(r"\)\^|\)(?:\\cdot|\\times|\*)?\(")


def left_to_do(answer: str, reference: str) -> str:
    r"""What an answer has that a reference, which is equal to it, has worked out; "" where there is nothing.

    >>> left_to_do(r"37\pi\cdot49", r"1813\pi"), left_to_do(r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}")
    ('more numbers than the reference', '')
    """
    extra = [name for name, pattern in _OPERATIONS.items() if pattern.search(answer) and not pattern.search(reference)]
    if extra:
        return extra[0]
    if _FREE.search(reference):
        return ""
    if _CONSTANT.fullmatch(reference) and _SUM.search(answer):
        return "a sum"
    if _divides(answer) and not _divides(reference):
        return "a fraction for a whole number"
    return "more numbers than the reference" if _numbers(answer) > max(1, _numbers(reference)) else ""


def unlike(answer: str, reference: str, question: str) -> str:
    """What an answer is not, of what a question asks for and a reference is: factored or expanded; "" for nothing.

    >>> unlike("-25+x^2", "(x-5)(x+5)", "Factor x^2-25."), unlike("(1+x)^2", "x^2+2x+1", "Expand (x+1)^2.")
    ('factored', 'expanded')
    """
    if _FACTOR.search(question) and _factors(reference) and not _is_sum(reference):
        return "factored" if _is_sum(answer) or _factors(answer) < _factors(reference) else ""
    if _EXPAND.search(question) and _is_sum(reference) and not _UNEXPANDED.search(reference):
        whole = _factors(answer) and not _is_sum(answer)
        return "expanded" if whole or _UNEXPANDED.search(answer) else ""
    return ""


def _is_sum(text: str) -> bool:
    """Whether a formula is a sum outside of all brackets."""
    while (inner := re.sub(r"\([^()]*\)|\{[^{}]*\}", "g", text)) != text:
        text = inner
    return _SUM.search(text) is not None


def _factors(text: str) -> int:
    """How many factors in a formula are sums, each as often as its power says."""
    return sum(int(power or 1) for power in _FACTORS.findall(text))


def _divides(text: str) -> bool:
    """Whether a number below a bar divides the one above it."""
    pairs = [(a or c, b or d) for a, b, c, d in _WHOLE.findall(text)]
    return any(int(low) > 1 and int(top) % int(low) == 0 for top, low in pairs)


def _numbers(text: str) -> int:
    """How many numbers a formula is made of, but for 0 and 1."""
    for pattern, to in _FORMS:
        text = pattern.sub(to, text)
    return sum(found not in ("0", "1") for found in re.findall(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", text))
