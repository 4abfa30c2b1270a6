r"""Maths: the problems of MATH, GSM8K and the usual benchmarks, answered by a number, a formula, or a few of them.

    row -> Problem(question, answers) -> ... <answer>\boxed{...}</answer> -> equivalence.judge -> Verdict

Left out on purpose: how two answers are compared (`equivalence`), and where rows come from (`datasets`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from selfroute.errors import TaskError
from selfroute.tasks.datasets import DataConfig, Loader
from selfroute.tasks.equivalence import canonical, judge
from selfroute.tasks.mathsets import MATH_SETS, Layout, answers_of, question_of
from selfroute.tasks.splits import problem_hash
from selfroute.types import Problem, Split, Verdict

ASK = r"Give the final answer as \boxed{...}."
_WORDINGS = (
    "Solve this problem.\n\nPROBLEM\n\n" + ASK,
    "PROBLEM\n\nWhat is the answer? Write it as \\boxed{...}.",
    "Here is a maths problem:\n\nPROBLEM\n\nWork it out, and put the result into \\boxed{...}.",
    "PROBLEM\n\nThink it through with care. The final answer belongs into \\boxed{...}.",
)


class MathsConfig(DataConfig):
    """Which maths problems, and where they are."""

    dataset: Literal[
        "math-lighteval", "math-500", "agieval-math", "amc23", "aime24", "aime25", "minervamath", "gsm8k"
    ] = "math-lighteval"
    """The data set; `math-lighteval` and `gsm8k` can be trained on, the others are tests."""


class Maths:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = MathsConfig
    ABOUT = tuple(one.about(f"maths dataset={name}") for name, one in MATH_SETS.items())

    def __init__(self, config: MathsConfig) -> None:
        if find_spec("math_verify") is None:
            raise TaskError("maths needs math-verify: pip install 'selfroute[tasks]'")
        self.config = config
        about = MATH_SETS[config.dataset]
        self.data = Loader(
            config.dataset, about, config, partial(_problem_of, layouts=about.layouts), instead="math-lighteval"
        )

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as `Loader.load` says."""
        return self.data.load(split)

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        return self.data.training_problems(rng)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` is the reference, and which stage decided. Total: it never raises, on any text."""
        return judge(answer, problem.reference["answers"], problem.question)

    def solution(self, problem: Problem) -> str | None:
        """The reference answer."""
        answers = problem.reference["answers"]
        return answers[0] if answers else None

    def read(self, text: str) -> Problem:
        """A problem in a user's own words. No reference is known, so no answer to it is judged correct.

        Raises:
            TaskError: there is no text.
        """
        if not text.strip():
            raise TaskError("need a problem, such as: What is 3/4 of 28?")
        return _problem(text.strip(), ())

    def variants(self, problem: Problem, count: int) -> list[str]:
        """The same problem with another request around it."""
        text = problem.question.removesuffix(f"\n\n{ASK}")
        return [wording.replace("PROBLEM", text) for wording in _WORDINGS[:count]]

    def canonical(self, answer: str) -> str:
        """An answer in a form that equal numbers, and one formula in several spellings, share."""
        return canonical(answer)


def _problem_of(row: Mapping[str, Any], layouts: tuple[Layout, ...]) -> Problem | str:
    """A row's problem, or what is wrong with it."""
    layout = next((one for one in layouts if one.question in row and one.answer in row), None)
    if layout is None:
        wanted = ", or ".join(f"{one.question!r} and {one.answer!r}" for one in layouts)
        return f"needs the columns {wanted}; it has {', '.join(map(str, row)) or 'none'}"
    question = row[layout.question]
    if not isinstance(question, str) or not question_of(question):
        return f"{layout.question} must be text, not {str(question)[:60]!r}"
    answers, fault = answers_of(row[layout.answer], layout.how)
    return f"{layout.answer} {fault}" if fault else _problem(question_of(question), answers)


def _problem(text: str, answers: tuple[str, ...]) -> Problem:
    # Copies of one problem differ in spaces and in dollar signs.
    number = problem_hash(re.sub(r"[\s$]+", "", text).lower())
    return Problem(f"maths-{number:016x}", f"{text}\n\n{ASK}", {"answers": answers})
