"""Countdown: make a target from given numbers, each used exactly once, with + - * / and parentheses.

Holds the generator, the verifier and the exact solver.
Left out on purpose: how a device model searches (that is the warm start's), and partial credit.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

from pydantic import Field, model_validator

from selfroute.config import Config
from selfroute.errors import TaskError
from selfroute.tasks.expressions import canonical, solve, verify
from selfroute.tasks.files import read_rows
from selfroute.tasks.splits import problem_hash, split_of_hash
from selfroute.types import About, Problem, Solved, Split, Verdict


class CountdownConfig(Config):
    """Which Countdown problems there are, and how many."""

    num_numbers: int | tuple[int, ...] = 3
    """Numbers a problem gives (3 to 6); of a list such as [3, 4, 5], each as often as the others."""
    number_min: int = 1
    """Smallest number."""
    number_max: int = 20
    """Largest number."""
    target_min: int = 10
    """Smallest target."""
    target_max: int = 99
    """Largest target."""
    operators: str = Field("+-*/", pattern=r"^[-+*/]+$")
    """What the generator makes targets with; an answer may use all four. Not used with `path`."""
    train: int = Field(5000, ge=1)
    """Training problems; with `path`, at most."""
    calibration: int = Field(500, ge=1)
    """Calibration problems; with `path`, at most."""
    test: int = Field(1000, ge=1)
    """Test problems; with `path`, at most."""
    seed: int = 0
    """Seed of the generator; not used with `path`."""
    path: str | None = None
    """A .jsonl or .parquet file with columns `nums` and `target`, used in place of the generator."""

    @model_validator(mode="after")
    def _ranges(self) -> CountdownConfig:
        if not self.counts or not all(3 <= count <= 6 for count in self.counts):
            raise ValueError("num_numbers must be 3 to 6")
        if not 1 <= self.number_min <= self.number_max:
            raise ValueError("need 1 <= number_min <= number_max")
        if not 1 <= self.target_min <= self.target_max:
            raise ValueError("need 1 <= target_min <= target_max")
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """How many numbers a problem may give."""
        return (self.num_numbers,) if isinstance(self.num_numbers, int) else self.num_numbers


class Countdown:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = CountdownConfig
    ABOUT = (
        About(
            "countdown",
            "generated from a seed, or task.path=FILE",
            "5,000 train / 500 calibration / 1,000 test",
            "Apache-2.0",
        ),
    )

    def __init__(self, config: CountdownConfig) -> None:
        self.config = config

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split: generated, or read from `path`; splits never share (sorted numbers, target).

        A file gives what it has for a split, up to the number asked for.

        Raises:
            TaskError: the file is missing or holds bad rows or none of the split, or too few distinct problems were
                found in the generator's range.
        """
        sizes = {"train": self.config.train, "calibration": self.config.calibration, "test": self.config.test}
        wanted = sizes[split]
        source = read_rows(Path(self.config.path)) if self.config.path else self._generate()
        problems: dict[str, Problem] = {}
        for numbers, target in source:
            if len(problems) >= wanted:
                break
            if split_of(numbers, target) == split:
                new = problem(numbers, target)
                problems.setdefault(new.id, new)
        if self.config.path and not problems:
            raise TaskError(
                f"{self.config.path} holds no {split} problem (a hash of each problem decides its split, 80 % train, "
                "8 % calibration, 12 % test): give a larger file"
            )
        if not self.config.path and len(problems) < wanted:
            raise TaskError(
                f"only {len(problems)} distinct {split} problems were found, {wanted} were asked for: widen the number "
                f"or target range, or ask for fewer (task.{split}=N)"
            )
        return list(problems.values())

    def _generate(self) -> Iterator[tuple[tuple[int, ...], int]]:
        # Problems are drawn as random expressions, so each is solvable. The draws are bounded: where the ranges hold
        # too few problems, or targets that expressions rarely make, `load` says so.
        c = self.config
        rng = random.Random(f"countdown-{c.seed}")
        for _ in range(200 * (c.train + c.calibration + c.test) + 1000):
            drawn = draw(c, rng)
            if drawn:
                yield drawn

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Solvable problems of the training split, without end; never one of calibration or test."""
        while True:
            drawn = draw(self.config, rng)
            if drawn and split_of(*drawn) == "train":
                yield problem(*drawn)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether `answer` makes the target from exactly the given numbers."""
        return verify(answer, problem.reference["numbers"], problem.reference["target"])

    def solution(self, problem: Problem) -> str | None:
        """An expression that makes the target."""
        return solve(problem.reference["numbers"], problem.reference["target"])

    def read(self, text: str) -> Problem:
        """A problem in a user's own words, such as `numbers 3, 7, 25; target 46` or `make 46 from 3, 7 and 25`.

        The target is the number after `target` or `make`; without such a word, the last one.

        Raises:
            TaskError: the text does not hold three to six numbers and a target.
        """
        number = r"[-+]?[0-9.]*[0-9]"
        named = re.search(rf"\b(?:target|make)\b[ :=]*(?:is |of )?({number})", text, re.IGNORECASE)
        last = f"{text[: named.start(1)]} {text[named.end(1) :]} {named[1]}" if named else text
        found = re.findall(number, last)
        if not 4 <= len(found) <= 7 or not all(re.fullmatch(r"[0-9]{1,9}", n) for n in found):
            raise TaskError(
                f'need 3 to 6 whole numbers and a target, such as "numbers 3, 7, 25; target 46"; got {text!r:.200}'
            )
        numbers = [int(n) for n in found]
        return problem(numbers[:-1], numbers[-1])

    def variants(self, problem: Problem, count: int) -> list[str]:
        """Questions that ask the same in other words: the numbers in other orders, as many as there are."""
        rng = random.Random(f"variants/{problem.id}")
        numbers, target = list(problem.reference["numbers"]), problem.reference["target"]
        orders = [order for order in dict.fromkeys(permutations(numbers)) if order != tuple(numbers)]
        return [_question(order, target) for order in rng.sample(orders, min(count, len(orders)))]

    def canonical(self, answer: str) -> str:
        """An answer in a form that equal answers share."""
        return canonical(answer)


def draw(config: CountdownConfig, rng: random.Random) -> tuple[tuple[int, ...], int] | None:
    """Numbers and a target that they can make; None where the draw was outside the target's range."""
    counts = config.counts
    count = counts[0] if len(counts) == 1 else rng.choice(counts)
    numbers = tuple(rng.randint(config.number_min, config.number_max) for _ in range(count))
    target = random_value(numbers, rng, config.operators)
    return (numbers, target) if target is not None and config.target_min <= target <= config.target_max else None


def problem(numbers: Sequence[int], target: int) -> Problem:
    """The problem of some numbers and a target, its id the hash that also decides its split."""
    return Problem(
        id=f"countdown-{_hash(numbers, target):016x}",
        question=_question(numbers, target),
        reference={"numbers": tuple(numbers), "target": target},
    )


def _question(numbers: Sequence[int], target: int) -> str:
    listed = ", ".join(map(str, numbers))
    return f"Use each of the numbers {listed} exactly once with + - * / and parentheses to make {target}."


_QUESTION = re.compile(r"numbers ([0-9, ]{1,80}) exactly once with .{1,60} to make ([0-9]{1,9})\.")


def read_question(text: str) -> tuple[tuple[int, ...], int] | None:
    """Numbers and target of a question that `problem` wrote, or None."""
    match = _QUESTION.search(text)
    if match is None:
        return None
    return tuple(int(n) for n in match[1].split(",")), int(match[2])


def answer_question(question: str) -> Solved | None:
    """The exact solver's answer to a question that `problem` wrote; None for other text."""
    read = read_question(question)
    if read is None:
        return None
    numbers, target = read
    # A problem without a solution gets a wrong answer, as from any LLM.
    return Solved(f"{sorted(numbers)}/{target}", lambda: solve(numbers, target), _wrong(numbers, target))


def _wrong(numbers: Sequence[int], target: int) -> str:
    for op in "+*-":
        expression = op.join(map(str, numbers))
        if not verify(expression, numbers, target).correct:
            return expression
    # Every way comes to the target (all numbers are 0): one is left out.
    return "+".join(map(str, numbers[1:]))


def split_of(numbers: Sequence[int], target: int) -> Split:
    """The split that a problem belongs to for ever, whatever file or seed it came from.

    By hash of (sorted numbers, target).
    """
    return split_of_hash(_hash(numbers, target))


def _hash(numbers: Sequence[int], target: int) -> int:
    return problem_hash([sorted(numbers), target])


def random_value(numbers: Sequence[int], rng: random.Random, operators: str) -> int | None:
    """The value of a random expression over all numbers with whole, non-negative steps; None if it got stuck."""
    left = list(numbers)
    while len(left) > 1:
        rng.shuffle(left)
        a, b = left.pop(), left.pop()
        op = rng.choice(operators)
        if (op == "-" and a < b) or (op == "/" and (b == 0 or a % b)):
            return None
        left.append(apply(a, op, b))
    return left[0]


def apply(a: int, op: str, b: int) -> int:
    """One whole-number step; the caller has checked that a division is exact."""
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a // b
