"""Whether a task judges as it should: its own reference answers are right, and answers to other problems are wrong; or,
where an LLM judges, its grades are those that people gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from selfroute.errors import TaskError
from selfroute.measures import Measure, proportion
from selfroute.tasks import Task
from selfroute.types import Problem


@dataclass(frozen=True, slots=True)
class Fault:
    """A verdict that should have been another one."""

    problem: str
    answer: str
    expected: bool
    reason: str


def check(task: Task, problems: Sequence[Problem]) -> Iterator[Fault | None]:
    """A fault, or None, for each problem: its reference must be right, and another problem's answer wrong.

    A problem without a solution passes. The other answer is the next one in line that has another canonical form, so a
    fault may be two forms of one value that neither shows.
    """
    solutions = [task.solution(p) for p in problems]
    forms = [None if s is None else task.canonical(s) for s in solutions]
    for n, (p, solution) in enumerate(zip(problems, solutions, strict=True)):
        if solution is None:
            yield None
            continue
        verdict = task.verify(solution, p)
        if not verdict.correct:
            yield Fault(p.id, solution, True, verdict.reason)
            continue
        other = _another(forms, n)
        wrong = None if other is None else solutions[other]
        verdict = verdict if wrong is None else task.verify(wrong, p)
        yield Fault(p.id, wrong, False, verdict.reason) if wrong is not None and verdict.correct else None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far grades agree with labels: `alike`, the share that is on the same side of `pass_score`, with its interval;
    `kappa`, Cohen's, that share above what chance gives; `rank`, Spearman's, of the grades themselves. The last two are
    NaN where one side never varies."""

    alike: Measure
    kappa: float
    rank: float


def agreement(grades: Sequence[float], labels: Sequence[float], pass_score: float) -> Agreement:
    """How far the grades of some answers agree with their labels, both in [0, 1].

    Raises:
        TaskError: scikit-learn is not installed.
    """
    try:
        from scipy.stats import spearmanr
        from sklearn.metrics import cohen_kappa_score
    except ModuleNotFoundError as error:
        raise TaskError(f"agreement needs {error.name}: pip install 'selfroute[tasks]'") from error
    ours, theirs = ([value >= pass_score for value in side] for side in (grades, labels))
    alike = [a == b for a, b in zip(ours, theirs, strict=True)]
    vary = len(set(ours)) > 1 and len(set(theirs)) > 1
    spread = len(set(grades)) > 1 and len(set(labels)) > 1
    return Agreement(
        proportion(np.array(alike, dtype=float)),
        float(cohen_kappa_score(ours, theirs)) if vary else math.nan,
        float(spearmanr(grades, labels).statistic) if spread else math.nan,
    )


def _another(forms: Sequence[str | None], n: int) -> int | None:
    """The place of the next form in a circle that is another one; None where all are alike."""
    for step in range(1, len(forms)):
        place = (n + step) % len(forms)
        if forms[place] not in (None, forms[n]):
            return place
    return None
