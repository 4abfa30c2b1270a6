r"""Whether an answer to a maths problem is the reference, in stages that each may decide:

    the same text -> exact numbers -> words -> tuples, sets, intervals, matrices part by part -> math-verify

Numbers and words are decided in microseconds; formulas go to math-verify in a pool of processes, within a hard time
limit. An answer must be worked out: where the reference is a number, only one that is written out will do, and nowhere
an operation that the reference is without, since `37\times49` would hand the problem back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from selfroute.tasks.latex import ROW, Normal, asked, extract, normal, squeezed, units_differ
from selfroute.tasks.literals import number
from selfroute.tasks.pool import Done, Pool
from selfroute.tasks.shapes import Shape, as_intervals, shape, ungrouped
from selfroute.tasks.worked import left_to_do, unlike
from selfroute.types import Verdict

MAX_ANSWER_CHARS = 4000
"""Longer answers are not read; an honest one is its final answer, with perhaps a sentence around it."""
MAX_FORMULA_CHARS = 500
MAX_PARTS = 40
MAX_DEPTH = 3
"""Of a set of tuples of tuples."""
LIMIT_S = 5.0
"""Of one verdict's time with math-verify, in seconds, without those in which a busy machine keeps it waiting."""

_POOL = Pool("selfroute.tasks.symbolic:equal", size=min(4, os.cpu_count() or 1))

# What a value may be the value of: m+n, AB, P(A), |z|, Area.
_ATOM = (
    r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|phi|omega|lambda|mu|angle|triangle)(?![a-zA-Z])|"
    r"\\overline\{[A-Z]+\}|\\frac\{[a-zA-Z]+\}\{[a-zA-Z]+\})"
    r"(?:_\w|_\{[^{}]*\})?'*(?:\([^()]*\))?"
)
_NAMES = re.compile(rf"[\[|]?(?:{_ATOM}[-+/ ]?)+[\]|]?")
_CONSTANT = re.compile(r"(?:\\(?:pi|sqrt|frac)(?![a-zA-Z])|[^a-zA-Z\\=<>,])+")
_MEASURED = re.compile(r"(.*(?:[0-9]|\\pi)) ([gmsh])(?:\^[23])?")
_WANTED_FORM = re.compile(r"solve for|in terms of|in the form|slope-intercept|standard form", re.IGNORECASE)
_LOWEST = re.compile(
    r"simplif|simplest|reduce|lowest terms|common fraction|relatively prime|coprime|irreducible", re.IGNORECASE
)
_CONVERT = re.compile(r"\b(?:express|convert|write)\b(?=[^.?]*\b(?:as|in|to)\b)|decimal|percent", re.IGNORECASE)
_DIGITS = re.compile(r"[-+0-9.,]*")
_BASE = re.compile(r"[0-9A-F]_(?:[0-9]|\{[0-9]+\})")


def judge(answer: str, references: Sequence[str], question: str = "") -> Verdict:
    r"""Whether an answer is one of the references. Total: it never raises on any text, and its time is bounded.

    Args:
        answer: what the device or the cloud answered; its last `\boxed{}` counts, or all of it where there is none.
        references: golds; any of them will do.
        question: says whether a percentage is asked for (then 10 and 10% mean the same) or lowest terms, and what an
            answer must not repeat.

    Raises:
        TaskError: no worker for math-verify can be started, whatever the answer.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, f"longer than {MAX_ANSWER_CHARS} characters")
    given = extract(answer)
    if not references:
        return Verdict(False, "no reference answer is known", extracted=given, judged=False)
    if len(given) > MAX_FORMULA_CHARS:
        return Verdict(False, f"the final answer is longer than {MAX_FORMULA_CHARS} characters", extracted=given)
    return replace(_judge(given, tuple(references), question), extracted=given)


# The G responses of a problem often agree, and an answer that hangs is waited for once.
@lru_cache(maxsize=16384)
def _judge(given: str, references: tuple[str, ...], question: str) -> Verdict:
    left_s = LIMIT_S

    def symbolic(a: str, b: str) -> Done:
        nonlocal left_s
        done = _POOL.call(a, b, limit_s=max(0.05, left_s))
        left_s -= done.seconds
        return done

    comparison, reasons = _Comparison(question, symbolic), []
    for reference in references:
        found = comparison.compare(_read(given), _read(extract(reference)))
        if found.correct:
            return found
        reasons.append(found.reason)
    return Verdict(False, "; ".join(dict.fromkeys(reasons)))


def canonical(answer: str) -> str:
    """The final answer in a form that equal numbers, and one formula in several spellings, share.

    >>> canonical(r"\\boxed{\\dfrac{1}{2}}"), canonical("x = 0.5"), canonical(r"x^{2} + 1")
    ('1/2', '1/2', 'x^2+1')
    """
    given = _read(extract(answer[-MAX_ANSWER_CHARS:])[:MAX_FORMULA_CHARS])
    value = number(given.text)
    return given.text.replace(ROW, "\\\\") if value is None else str(value.value)


def _read(text: str) -> Normal:
    read = normal(text)
    return replace(read, text=ungrouped(read.text))


class _Comparison:
    """Answers to one question against its references. `symbolic` compares two formulas."""

    def __init__(self, question: str, symbolic: Callable[[str, str], Done]) -> None:
        self.question, self.symbolic = question, symbolic
        self.percent = bool(re.search(r"percent|%", question, re.IGNORECASE))
        self.lowest = bool(_LOWEST.search(question))

    def compare(self, a: Normal, b: Normal, depth: int = 0) -> Verdict:
        """The answer `a` against the reference `b`."""
        if b.unit and not a.unit and a.text.endswith(b.unit):
            a = _read(a.text.removesuffix(b.unit))
        if _CONSTANT.fullmatch(b.text):
            a = self._value(a, b.left)
        if not a.text:
            return Verdict(False, "no final answer")
        if units_differ(a.unit, b.unit):
            return Verdict(False, f"in {a.unit}, not {b.unit}")
        if a.left and b.left and a.left != b.left:
            return Verdict(False, f"is of {a.left}, not {b.left}")
        if a.text == b.text:
            return Verdict(True, "the same text")
        if a.words or b.words:
            # Short words, such as yes, are told from formulas by a text command alone.
            if a.text.lower() == b.text.lower():
                return Verdict(True, "the same words")
            return Verdict(False, f"is {_cut(a.text)}, not {_cut(b.text)}")
        for decide in (self._numbers, self._bases, self._parts):
            found = decide(a, b, depth)
            if found:
                return found
        return self._formulas(*self._equations(a, b))

    def _value(self, a: Normal, left: str) -> Normal:
        """A constant without what it is said to be the value of, such as `m+n`, and without a unit of one letter."""
        name, equals, value = a.text.rpartition("=")
        if equals and (_NAMES.fullmatch(name) or name in asked(self.question)) and left in ("", name):
            a = replace(_read(value), left=name)
        measured = _MEASURED.fullmatch(a.text)
        return replace(a, text=measured[1], unit=measured[2]) if measured else a

    def _equations(self, a: Normal, b: Normal) -> tuple[str, str]:
        """Both formulas; where only one of them still is an equation, the other with its left side put back."""
        one, other = a.text, b.text
        if _WANTED_FORM.search(self.question):
            return one, other
        if a.left and "=" in other:
            one = f"{a.left}={one}"
        elif b.left and "=" in one and not _CONSTANT.fullmatch(other):
            other = f"{b.left}={other}"
        return one, other

    def _numbers(self, a: Normal, b: Normal, depth: int) -> Verdict | None:
        gold, given = number(b.text), number(a.text)
        if gold is None:
            return None
        if given is None:
            # 100,200 is a number, or two of them, and {5} a set of one.
            made = shape(a.text)
            listed = made and ("," in b.text or (made.kind == "list" and len(made.parts) == 1))
            return None if listed else Verdict(False, f"not a number written out: {_cut(a.text)}")
        if given.bar and not given.lowest and (self.lowest or not gold.bar or gold.value.denominator == 1):
            return Verdict(False, f"not worked out: the fraction {_cut(a.text)}")
        want, got = gold.value, given.value
        equal = want == got
        if self.percent and gold.percent and not given.percent:
            # 10 is 10 %, and 0.1 is a tenth of one.
            want, equal = want * 100, want * 100 == got
        elif self.percent and given.percent and not gold.percent:
            equal = equal or want == got * 100
        if equal and self._restated(a.text, b.text):
            return Verdict(False, "not worked out: it stands in the question")
        return Verdict(equal, f"the number {_cut(str(got))}" + ("" if equal else f", not {_cut(str(want))}"))

    def _restated(self, given: str, gold: str) -> bool:
        """Whether the question has a number in the form of the answer, and another form is the reference."""
        given, gold = _plain(given), _plain(gold)
        if _DIGITS.fullmatch(given) or given.removesuffix("%") == gold.removesuffix("%"):
            return False
        # Recipes and chances have fractions that may be the answer by accident.
        if re.match(r"[0-9]*\\frac", given) and not _CONVERT.search(self.question):
            return False
        # In a formula only all of it counts: 2^3x is not 2^3.
        outside = _plain(squeezed(re.sub(r"\$+[^$]*\$+", " ", self.question)))
        alone = re.search(rf"(?<![0-9.]){re.escape(given)}(?![0-9])", outside)
        return alone is not None or given in map(_plain, asked(self.question))

    def _bases(self, a: Normal, b: Normal, depth: int) -> Verdict | None:
        # math-verify takes no notice of a number's base.
        based = _BASE.search(a.text) or _BASE.search(b.text)
        return Verdict(False, f"is {_cut(a.text)}, not {_cut(b.text)}") if based else None

    def _parts(self, a: Normal, b: Normal, depth: int) -> Verdict | None:
        gold, given = shape(b.text), shape(a.text)
        if gold and gold.kind != "list" and (not given or given.kind == "list"):
            rewritten = as_intervals(a.text)
            a = Normal(rewritten) if rewritten else a
            given = shape(a.text)
        elif given and given.kind != "list" and (not gold or gold.kind == "list"):
            rewritten = as_intervals(b.text)
            b = Normal(rewritten) if rewritten else b
            gold = shape(b.text)
        if not gold and not given:
            return None
        # One value in braces is a set of one.
        gold, given = gold or Shape("list", (b.text,)), given or Shape("list", (a.text,))
        if a.text == b.text:
            return Verdict(True, "the same interval")
        if gold.kind != given.kind or len(gold.parts) != len(given.parts):
            return Verdict(False, f"is {_named(given)}, not {_named(gold)}")
        if len(gold.parts) > MAX_PARTS or depth >= MAX_DEPTH:
            return Verdict(False, "has too many parts to be compared")
        return self._pairs(given, gold, depth)

    def _pairs(self, given: Shape, gold: Shape, depth: int) -> Verdict:
        # Equality holds in chains, so the first partner that fits is as good as any.
        left = [_read(part) for part in given.parts]
        reason = "part by part"
        for part in gold.parts:
            for candidate in left[:1] if gold.ordered else left:
                found = self.compare(candidate, _read(part), depth + 1)
                if found.correct:
                    left.remove(candidate)
                    break
                reason = found.reason
            else:
                return Verdict(False, f"no part is {_cut(part)}: {reason}")
        return Verdict(True, "equal part by part")

    def _formulas(self, a: str, b: str) -> Verdict:
        undone = left_to_do(a, b)
        if undone:
            return Verdict(False, f"not worked out: it has {undone}")
        done = self.symbolic(a, b)
        if done.failure:
            return Verdict(False, done.failure)
        if done.result is None:
            return Verdict(False, f"math-verify cannot read {_cut(a)}, or {_cut(b)}")
        if not done.result:
            return Verdict(False, f"math-verify: {_cut(a)} is not {_cut(b)}")
        if len(a) > 3 and a in squeezed(self.question):
            return Verdict(False, "not worked out: it stands in the question")
        wanted = unlike(a, b, self.question)
        if wanted:
            return Verdict(False, f"not worked out: it is not {wanted}")
        return Verdict(True, "math-verify: equal")


def _plain(text: str) -> str:
    """Text with its fractions with a bar, and no braces around exponents."""
    text = re.sub(r"(?<![0-9.])([0-9]+)/([0-9]+)", r"\\frac{\1}{\2}", text)
    return re.sub(r"\^\{(-?[0-9]+)\}", r"^\1", text)


def _named(made: Shape) -> str:
    return (
        f"{len(made.parts)} in a {made.kind}" if made.kind in ("list", "union") else f"{made.kind} of {len(made.parts)}"
    )


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
