"""Addition of two whole numbers: how hard a problem is stands in plain sight, in how many digits it has.

A testbed where a router that sees the prompt alone has all it needs. Left out on purpose: any other arithmetic.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pydantic import Field, model_validator

from selfroute.config import Config
from selfroute.errors import TaskError
from selfroute.tasks.splits import problem_hash, split_of_hash
from selfroute.types import About, Problem, Solved, Split, Verdict


class AdditionConfig(Config):
    """Which additions there are, and how many."""

    digits_min: int = Field(1, ge=1)
    """Fewest digits of both numbers."""
    digits_max: int = Field(6, le=18)
    """Most digits. Each count is drawn as often, for both numbers alike; as pairs are distinct, those of one digit soon
    run out (there are 55)."""
    train: int = Field(5000, ge=1)
    """Training problems."""
    calibration: int = Field(500, ge=1)
    """Calibration problems."""
    test: int = Field(1000, ge=1)
    """Test problems."""
    seed: int = 0
    """Seed of the generator."""

    @model_validator(mode="after")
    def _ranges(self) -> AdditionConfig:
        if self.digits_min > self.digits_max:
            raise ValueError("need digits_min <= digits_max")
        return self


class Addition:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = AdditionConfig
    ABOUT = (About("addition", "generated from a seed", "5,000 train / 500 calibration / 1,000 test", "Apache-2.0"),)

    def __init__(self, config: AdditionConfig) -> None:
        self.config = config

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split; splits never share a pair of numbers.

        Raises:
            TaskError: too few distinct problems were found.
        """
        c = self.config
        wanted = {"train": c.train, "calibration": c.calibration, "test": c.test}[split]
        rng = random.Random(f"addition-{c.seed}")
        problems: dict[str, Problem] = {}
        for _ in range(200 * (c.train + c.calibration + c.test) + 1000):
            if len(problems) >= wanted:
                return list(problems.values())
            a, b = draw(c, rng)
            if split_of(a, b) == split:
                new = problem(a, b)
                problems.setdefault(new.id, new)
        raise TaskError(
            f"only {len(problems)} distinct {split} problems were found, {wanted} were asked for: raise "
            f"task.digits_max, or ask for fewer (task.{split}=N)"
        )

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, without end; never one of calibration or test."""
        while True:
            a, b = draw(self.config, rng)
            if split_of(a, b) == "train":
                yield problem(a, b)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` is the sum. Total: it never raises, on any text."""
        text, total = answer.strip(), str(problem.reference["sum"])
        if not re.fullmatch(r"[0-9]{1,30}", text):
            return Verdict(False, "not a whole number")
        reason = f"is {text}" + ("" if text == total else f", not {total}")
        return Verdict(text == total, reason, extracted=text)

    def solution(self, problem: Problem) -> str:
        """The sum."""
        return str(problem.reference["sum"])

    def read(self, text: str) -> Problem:
        """A problem in a user's own words, such as `12 plus 34`.

        Raises:
            TaskError: the text does not hold two whole numbers.
        """
        found = re.findall(r"[-+]?[0-9.]*[0-9]", text)
        if len(found) != 2 or not all(re.fullmatch(r"[0-9]{1,18}", n) for n in found):
            raise TaskError(f'need two whole numbers, such as "12 plus 34"; got {text!r:.200}')
        return problem(*map(int, found))

    def variants(self, problem: Problem, count: int) -> list[str]:
        """Questions that ask the same in other words: the numbers swapped."""
        a, b = problem.reference["numbers"]
        return [_question(b, a)][: count if a != b else 0]

    def canonical(self, answer: str) -> str:
        """An answer in a form that equal answers share."""
        return answer.strip()


def draw(config: AdditionConfig, rng: random.Random) -> tuple[int, int]:
    """Two numbers with the same count of digits, without leading zeros."""
    digits = rng.randint(config.digits_min, config.digits_max)
    low = 10 ** (digits - 1) if digits > 1 else 0
    return rng.randint(low, 10**digits - 1), rng.randint(low, 10**digits - 1)


def problem(a: int, b: int) -> Problem:
    """The problem of two numbers."""
    return Problem(
        id=f"addition-{problem_hash(sorted((a, b))):016x}",
        question=_question(a, b),
        reference={"numbers": (a, b), "sum": a + b},
    )


def _question(a: int, b: int) -> str:
    return f"Add the numbers {a} and {b}."


def split_of(a: int, b: int) -> Split:
    """The split that a pair of numbers belongs to for ever, in either order."""
    return split_of_hash(problem_hash(sorted((a, b))))


def answer_question(question: str) -> Solved | None:
    """The exact answer to a question that `problem` wrote; None for other text."""
    match = re.search(r"Add the numbers ([0-9]{1,18}) and ([0-9]{1,18})\.", question)
    if match is None:
        return None
    a, b = int(match[1]), int(match[2])
    return Solved(f"{sorted((a, b))}", lambda: str(a + b), str(a + b + 1))
