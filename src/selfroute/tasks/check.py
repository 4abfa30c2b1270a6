"""Whether a task judges as it should: its own reference answers are right, and answers to other problems are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from selfroute.tasks import Task
from selfroute.types import Problem


@dataclass(frozen=True, slots=True)
class Fault:
    """A verdict that should have been another one."""

    problem: str
    answer: str
    expected: bool
    reason: str
    extracted: str


def check(task: Task, problems: Sequence[Problem]) -> Iterator[Fault | None]:
    """A fault, or None, for each problem that has a reference: it must be right, and another problem's answer wrong.

    The other answer is the next one in line that has another canonical form, so a fault may be two forms of one value
    that neither shows.
    """
    solutions = [task.solution(p) for p in problems]
    forms = [None if s is None else task.canonical(s) for s in solutions]
    for n, (p, solution) in enumerate(zip(problems, solutions, strict=True)):
        if solution is None:
            continue
        verdict = task.verify(solution, p)
        if not verdict.correct:
            yield Fault(p.id, solution, True, verdict.reason, verdict.extracted)
            continue
        other = _another(forms, n)
        wrong = None if other is None else solutions[other]
        if wrong is None:
            yield None
            continue
        verdict = task.verify(wrong, p)
        yield Fault(p.id, wrong, False, verdict.reason, verdict.extracted) if verdict.correct else None


def _another(forms: Sequence[str | None], n: int) -> int | None:
    """The place of the next form in a circle that is another one; None where all are alike."""
    for step in range(1, len(forms)):
        place = (n + step) % len(forms)
        if forms[place] not in (None, forms[n]):
            return place
    return None
