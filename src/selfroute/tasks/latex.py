r"""Answers as people and models write them in LaTeX, brought to one spelling. No meaning is worked out here.

\boxed{\dfrac12 \text{ cm}}  ->  extract: \dfrac12 \text{ cm}  ->  normal: \frac{1}{2}, unit cm
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

_WRAP = (
    r"\\(?:text|text(?:bf|it|rm|sf|tt|sc|up|normal)|math(?:rm|bf|it|sf|tt)|boldsymbol|pmb|bm|mbox|hbox|emph|underline|rm|bf)"
    r"(?![a-z])\s*"
)
WRAPPED = re.compile(_WRAP + r"\{([^{}]*)\}")
"""A command that only changes how its text looks."""
ROW = "\ue000"
"""Stands for the row break of a matrix, two backslashes, so that no pattern takes half of it for a command."""

_VULGAR = {c: unicodedata.normalize("NFKC", c).split("⁄") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_CHARACTERS = str.maketrans(
    dict.fromkeys("−–—﹣－", "-")
    | {"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "％": "%"}
    | {"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "∞": r"\infty ", "√": r"\sqrt ", "±": r"\pm "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "∅": r"\emptyset "}
    | {"°": r"\degree ", "º": r"\degree ", "⟨": r"\langle ", "⟩": r"\rangle "}
    | {c: rf"\frac{{{top}}}{{{bottom}}}" for c, (top, bottom) in _VULGAR.items()}
)

# In order; what stands on the left is another spelling of the right, or has no meaning.
_SPELLINGS = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\[()\[\]]|(?<!\\)\$", " "),
        (r"(?<![_^}a-zA-Z\]])\{\\(?:rm|bf|it|sf|tt)\s+([^{}]*)\}", r"\\text{\1}"),
        (r"\\(?:rm|bf|it|sf|tt|bfseries|boldmath)(?![a-zA-Z])(?!\s*\{)", " "),
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-z])|\\(?:hspace|phantom)\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\^\s*(?:\{\s*)?\\(?:circ|degree)(?![a-z])\s*\}?", r"\\degree "),
        (r"\\(?:leqslant|leq|le)(?![a-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geq|ge)(?![a-z])|>=", r"\\ge "),
        (r"\\neq?(?![a-z])|!=", r"\\ne "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\[lr]?vert(?![a-z])|\\mid(?![a-z])", "|"),
        (r"\\[lc]?dots(?![a-z])", r"\\dots "),
        (r"\\operatorname\*?\s*\{([a-z]+)\}", r"\\\1 "),
        (r"\\%", "%"),
        (r"\*\*", "^"),
        (r"(?<![a-zA-Z\\])(sin|cos|tan|cot|ln|log|pi|sqrt)(?![a-z])", r"\\\1 "),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
    )
)

_UNITS = {
    word: line.split()[0]
    for line in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "s sec second seconds",
        "min minute minutes",
        "h hr hrs hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "g gram grams",
        "kg kilogram kilograms",
        "lb lbs pound pounds",
        "dollar dollars usd",
        "cent cents",
        "degree degrees",
        "radian radians rad",
        "mph",
        "am a.m",
        "pm p.m",
        "unit units",
    )
    for word in line.split()
}
"""Words of units whose difference matters, by the unit that they mean."""

# After a number these change it.
_AMOUNTS = re.compile(
    r"\b(?:and|or|if|for|when|to|plus|minus|times|over|divided|mod|modulo|not|so|point(?=\s+\w)|base(?=\s*\w)|pi|"
    r"bn|mn|mln|tn|(?:hundred|thousand|lakh|crore|\w+illion|dozen)s?|tens|squared|cubed|factorial|hal(?:f|ves)|"
    r"(?:third|quarter|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w+illion)th)s?)\b"
    # So does a command, such as a logarithm's.
    r"|\\(?!cdot|degree)",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"(?:percent|per cent|pct)\b\.?", re.IGNORECASE)
_LEAD = re.compile(
    r"\A\W{0,9}(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*", re.I
)
# Emphasis and a heading in Markdown; 2**10 is a power.
_MARKDOWN = re.compile(r"(?<![\w)}\]*\\])(\*{1,3})(?=[^\s*])([^*]+)(?<=\S)\1(?=[\s.,;:!?)]|\Z)|`|\A\s*#+\s*")
# The option's letter before its value.
_OPTION = re.compile(r"\A" + _WRAP + r"\{\s*\([A-Z]\)\s*\}\s*(?=-?(?:[0-9.]|\\(?:frac|sqrt|pi)))")
_LEFT = re.compile(
    r"\A((?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\w|_\{\w+\}|')?(?:\([a-z](?:,[a-z])*\))?|\([a-z](?:,[a-z])+\))(?:=|\\in(?![a-z]))\s*"
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")
# Digits and signs in it make it more than a unit, exponents aside.
_UNIT_IN_TEXT = re.compile(
    r"(.*?[0-9a-zA-Z})\]%])\s*" + _WRAP + r"\{((?:[^{}0-9<>=+*^]|\^\{?-?[0-9]\}?)*)\}\s*(?:\^\{?-?[0-9]\}?)?"
)
_UNIT_IN_LETTERS = re.compile(
    r"(.*(?:[0-9})\]]|\\pi(?![a-z])))\s*"
    r"((?:[a-z.]+ )*[a-z]{2,}(?:/[a-z]+)?|(?<= )[a-z]/[a-z]+)\.?\s*(?:\^\{?[23]\}?)?",
    re.IGNORECASE,
)
_SQUARE = re.compile(r"\b(?:square|sq|cubic|cu)\b\.?")


@dataclass(frozen=True, slots=True)
class Normal:
    r"""An answer in one spelling.

    `unit` is a unit after or before it ("" where there is none), its names brought to one; `left` is what stood before
    a single `=` or `\in`; `words` says that it is text and no formula.
    """

    text: str
    unit: str = ""
    left: str = ""
    words: bool = False


def extract(answer: str) -> str:
    r"""What is inside the last `\boxed{}` or `\fbox{}`, by matching braces; the text itself where there is none.

    A box that never closes holds the rest.

    >>> extract(r"First \boxed{1}, so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract("The answer is 12.")
    '12.'
    """
    start = max(answer.rfind(r"\boxed"), answer.rfind(r"\fbox"))
    if start < 0:
        return _LEAD.sub("", _MARKDOWN.sub(r"\2", answer)).strip()
    rest = re.sub(r"\A\\(?:boxed|fbox)\s*", "", answer[start:])
    if not rest.startswith("{"):
        # \boxed 5 holds what comes next.
        return re.split(r"[\s$]", rest, maxsplit=1)[0]
    return rest[1 : closing(rest)].strip()


def closing(text: str) -> int:
    r"""The index of the brace that closes the one at the start, the length where none does. `\{` is no brace."""
    depth, i = 0, 0
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
        i += 1
    return len(text)


@lru_cache(maxsize=16384)
def normal(text: str) -> Normal:
    r"""An answer in one spelling, with its unit, its left side and whether it is text told apart.

    >>> normal(r"$x = \dfrac12\,\text{cm}$")
    Normal(text='\\frac{1}{2}', unit='cm', left='x', words=False)
    >>> normal(r"\text{ East }").text
    'east'
    """
    text = text.strip()
    unit = "dollar" if r"\$" in text or re.fullmatch(r"\$[0-9.,]+", text) else ""
    text = _spelled(text.replace(r"\$", "")).strip(ROW + " ").rstrip(" .,;:")
    words = _words(text)
    if words:
        return Normal(words, words=True)
    text, found = _without_unit(_OPTION.sub("", text))
    text = _squeezed(text)
    left = _LEFT.match(text)
    if left and not re.search(r"[=<>]|\\[lg]e(?![a-z])", text[left.end() :]):
        return Normal(text[left.end() :], found or unit, left[1])
    return Normal(text, found or unit)


def asked(question: str) -> set[str]:
    """The formulas between dollar signs in a question, in the one spelling."""
    return {normal(part).text for part in re.split(r"\$+", question)[1::2]}


def squeezed(text: str) -> str:
    """Longer text, such as a question, in the same spelling, so that an answer can be looked for in it."""
    return _squeezed(_spelled(text))


def _spelled(text: str) -> str:
    text = re.sub(f"[{_RAISED}]+", lambda m: "^{" + "".join(str(_RAISED.index(c)) for c in m[0]) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = "".join(c if c.isprintable() else " " for c in text).replace("\\\\", ROW)
    for pattern, to in _SPELLINGS:
        text = pattern.sub(to, text)
    return text


def _words(text: str) -> str:
    """Text in small letters if the answer is text; "" for formulas.

    In a text command, or with a word of four letters: shorter ones may be products of variables.
    """
    plain, wraps = WRAPPED.subn(r"\1", text)
    plain = re.sub(r"\s*,\s*", ",", " ".join(plain.split())).strip(" .,")
    inner = plain[1:-1] if re.fullmatch(r"\([A-Za-z]\)", plain) else plain
    if not _WORDS.fullmatch(inner) or len(inner) == 1:
        return ""
    whole = wraps and not WRAPPED.sub("", text).strip(" .,")
    return inner.lower() if whole or re.search(r"[A-Za-z]{4}", inner) else ""


def _without_unit(text: str) -> tuple[str, str]:
    """The text without a unit at its end, and the unit."""
    match = _UNIT_IN_TEXT.fullmatch(text)
    # One letter may be a constant, such as \mathrm{e}.
    if match and _PERCENT.match(match[2].strip()):
        return match[1] + "%", ""
    named = match and (_unit(match[2]) in _UNITS or len(re.findall(r"[a-zA-Z]", match[2])) > 1)
    if match and named and not _AMOUNTS.search(match[2]):
        return match[1], _unit(match[2])
    if text.endswith("\\degree"):
        return text.removesuffix("\\degree").rstrip(), "degree"
    match = _UNIT_IN_LETTERS.fullmatch(text)
    if match and _PERCENT.fullmatch(match[2]):
        return match[1] + "%", ""
    if match and all(_unit(part) in _UNITS for part in match[2].split("/")):
        return match[1], _unit(match[2])
    match = re.fullmatch(r"([-+]?[0-9][0-9.,/]*)\s+([a-zA-Z]{3,}(?: [a-zA-Z]+){0,2})", text)
    if match and not _AMOUNTS.search(match[2]):
        return match[1], _unit(match[2])
    return text, ""


def _unit(words: str) -> str:
    """The unit that some words mean; of several, such as `square cm`, the last one that is known."""
    plain = _SQUARE.sub("", re.sub(r"\^.*", "", words.lower())).strip(" .,")
    return _UNITS.get(plain, plain)


def units_differ(a: str, b: str) -> bool:
    """Whether two units are both known and not the same; a missing or unknown one differs from none."""
    return a != b and a in _UNITS and b in _UNITS


def _unwrapped(match: re.Match[str]) -> str:
    inside = match[1].strip()
    if len(inside) == 1:
        return inside
    return "," if inside.lower() in ("and", "or", ", and", ", or") else f" {inside} "


def _squeezed(text: str) -> str:
    """Text without its commands, degree signs, and spaces but for those between two letters or digits."""
    text = re.sub(_WRAP + r"(?=\{)", "", WRAPPED.sub(_unwrapped, text))
    text = re.sub(r"(?<=[\s0-9})])(?:and|or)(?=[\s\\(-])", ",", text)
    text = re.sub(r"([_^])\s*\{\s*([0-9a-zA-Z])\s*\}", r"\1\2", re.sub(r"\\degree(?![a-z])", "", text))
    text = " ".join(text.split())
    text = re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)
    text = re.sub(r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1", text)
    text = re.sub(r",{2,}", ",", text).strip(",").removeprefix("+")
    while text.startswith("{") and closing(text) == len(text) - 1:
        text = text[1:-1]
    return text
