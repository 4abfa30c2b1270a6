"""Verifiers for a user's own rows, by name: the same text, a number, a pattern.

    row -> cells -> problem -> ... <answer>...</answer> -> verify -> Verdict

Each is total and bounded in time on any answer. Left out on purpose: options, formulas and programs, which are verified
as their tasks verify them (`borrowed`), and functions of the user's own (`own`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from selfroute.tasks.columns import Cells, Row, RowError, name_of, text, texts
from selfroute.tasks.latex import extract, normal, units_differ
from selfroute.tasks.literals import Number as Written
from selfroute.tasks.literals import number
from selfroute.tasks.pool import Pool
from selfroute.tasks.splits import problem_hash
from selfroute.types import Problem, Verdict

if TYPE_CHECKING:
    from selfroute.tasks.custom import CustomConfig

MAX_ANSWER_CHARS = 20_000
"""Longer answers are not read."""
MAX_NUMBER_CHARS = 500
"""Nor are longer numbers."""

_MATCHERS = Pool("selfroute.tasks.patterns:matches", size=min(4, os.cpu_count() or 1))


class Verifier(Protocol):
    """What judges the answers of a user's own problems.

    `problem` makes a row's problem, or raises `RowError`. `solution` is a right answer, None where there is none;
    `canonical` a form that equal answers share. A verifier may have more: `ready`, which finds out what is missing
    before anything is spent; `verify_many`, where a verdict takes time; `read`, for a user's own words.
    """

    def problem(self, cells: Cells, row: Row) -> Problem: ...

    def verify(self, answer: str, problem: Problem) -> Verdict: ...

    def solution(self, problem: Problem) -> str | None: ...

    def canonical(self, answer: str) -> str: ...


class Exact:
    """The same text as a reference, capitals and spaces aside where they are to be ignored."""

    def __init__(self, config: CustomConfig) -> None:
        self.config = config

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem."""
        return made(cells["question"], {"answers": answers(cells, self.config)})

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` is one of the references. Total: it never raises, on any text."""
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(False, f"longer than {MAX_ANSWER_CHARS:,} characters")
        given, golds = self.canonical(answer), problem.reference["answers"]
        if given in map(self.canonical, golds):
            return Verdict(True, "the same text", extracted=given)
        return Verdict(False, f"is {given[:60]!r}, not {golds[0][:60]!r}", extracted=given)

    def solution(self, problem: Problem) -> str | None:
        """The first reference."""
        return first(problem)

    def canonical(self, answer: str) -> str:
        """The text without what is ignored."""
        shown = unicodedata.normalize("NFC", answer)
        if "space" in self.config.ignore:
            shown = " ".join(shown.split())
        return shown.casefold() if "case" in self.config.ignore else shown


class Number:
    """A number that is written out, in whatever form, no further from a reference than the tolerance."""

    def __init__(self, config: CustomConfig) -> None:
        self.config = config
        # As it is written, not as binary fractions round it.
        self.tolerance = Fraction(repr(config.tolerance))

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem; every reference must be a number."""
        golds = answers(cells, self.config)
        for gold in golds:
            if _read(gold)[0] is None:
                raise RowError(f"{name_of(self.config.columns, 'answer')} must be a number, not {gold[:60]!r}")
        return made(cells["question"], {"answers": golds})

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` is a number near enough to a reference. Total: it never raises, on any text."""
        given, unit = _read(answer)
        if given is None:
            return Verdict(False, f"not a number written out: {answer[:60]!r}")
        golds, extracted = problem.reference["answers"], extract(answer)
        asked = "percent" in problem.question.lower() or "%" in problem.question
        for gold in golds:
            wanted, its_unit = _read(gold)
            if wanted and not units_differ(unit, its_unit) and self._near(given, wanted, asked):
                return Verdict(True, f"the number {extracted[:60]}", extracted=extracted)
        return Verdict(False, f"is {extracted[:60]}, not {golds[0][:60]}", extracted=extracted)

    def _near(self, given: Written, wanted: Written, asked: bool) -> bool:
        """Near as it stands; or, where percent are asked for and one of the two is without the sign, without it."""
        pairs: list[tuple[Fraction, Fraction]] = [(given.value, wanted.value)]
        if (asked or wanted.percent) and given.percent != wanted.percent:
            pairs.append((_bare(given), _bare(wanted)))
        return any(abs(a - b) <= self.tolerance * max(Fraction(1), abs(b)) for a, b in pairs)

    def solution(self, problem: Problem) -> str | None:
        """The first reference."""
        return first(problem)

    def canonical(self, answer: str) -> str:
        """The number as a fraction, or else the text."""
        given, _ = _read(answer)
        return " ".join(answer[:200].split()) if given is None else str(given.value)


class Regex:
    """An answer that a pattern matches from its first to its last character."""

    def __init__(self, config: CustomConfig) -> None:
        self.config = config

    def problem(self, cells: Cells, row: Row) -> Problem:
        """A row's problem, with its own pattern or the task's."""
        columns = self.config.columns
        pattern = self.config.pattern
        if columns.pattern:
            pattern = text(cells["pattern"], columns.pattern)
            fault = pattern_fault(pattern)
            if fault:
                raise RowError(f"{columns.pattern} {fault}")
        golds = answers(cells, self.config) if columns.answer else ()
        return made(cells["question"], {"pattern": pattern, "answers": golds})

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether the pattern matches all of `answer`; one that takes too long to tell is wrong.

        Raises:
            TaskError: no worker can be started, whatever the answer.
        """
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(False, f"longer than {MAX_ANSWER_CHARS:,} characters")
        pattern, given = problem.reference["pattern"], answer.strip()
        # A pattern may take for ever on an answer, and holds the interpreter while it does.
        done = _MATCHERS.call(pattern, given, limit_s=self.config.time_limit_s)
        if done.failure:
            return Verdict(False, f"the pattern {pattern[:60]!r}: {done.failure}", extracted=given)
        reason = f"{'matches' if done.result else 'does not match'} {pattern[:60]!r}"
        return Verdict(done.result, reason, extracted=given)

    def solution(self, problem: Problem) -> str | None:
        """An example, where there is one."""
        return first(problem)

    def canonical(self, answer: str) -> str:
        """The text, spaces at its ends aside."""
        return answer.strip()


def made(question: str, reference: Mapping[str, Any]) -> Problem:
    """The problem of a question; the same question in other capitals or spaces is the same problem."""
    number = problem_hash(" ".join(question.lower().split()))
    return Problem(f"custom-{number:016x}", question, reference)


def answers(cells: Cells, config: CustomConfig) -> tuple[str, ...]:
    """A row's reference answers.

    Raises:
        RowError: there is none, or one is longer than an answer may be.
    """
    column = name_of(config.columns, "answer")
    found = texts(cells["answer"], column)
    if any(len(one) > MAX_ANSWER_CHARS for one in found):
        raise RowError(f"{column} is longer than {MAX_ANSWER_CHARS:,} characters")
    return found


def first(problem: Problem) -> str | None:
    """A problem's first reference answer."""
    golds = problem.reference.get("answers")
    return golds[0] if golds else None


def pattern_fault(pattern: str) -> str:
    """What is wrong with a regular expression; "" where it is one."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a pattern: {error}"
    return ""


def _read(answer: str) -> tuple[Written | None, str]:
    """The number that an answer's last box, or all of it, writes out, and its unit."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None, ""
    given = extract(answer)
    if len(given) > MAX_NUMBER_CHARS:
        return None, ""
    read = normal(given)
    return (None, "") if read.words else (number(read.text), read.unit)


def _bare(given: Written) -> Fraction:
    return given.value * 100 if given.percent else given.value
