"""Procedural problems of reasoning-gym, whose own scorers judge, inside the sandbox.

A family is in the list if its reference answers score 1 and its scorer does not run what it is given; many of
reasoning-gym's scorers do, with `eval`. Left out on purpose: those others (Countdown is ours), partial credit, and
curricula.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from selfroute.config import Config
from selfroute.errors import TaskError
from selfroute.tasks.box import Limits, Ran
from selfroute.tasks.inside.wire import pack
from selfroute.tasks.outputs import returned
from selfroute.tasks.pool import Pool
from selfroute.tasks.sandbox import Job, Sandbox, cores
from selfroute.tasks.splits import problem_hash, split_of_hash
from selfroute.types import About, Problem, Split, Verdict

Family = Literal[
    "mini_sudoku", "maze", "knights_knaves", "shortest_path", "path_star", "chain_sum", "products", "number_sorting"
]
FAMILIES: dict[Family, str] = {
    "mini_sudoku": "games",
    "maze": "games",
    "knights_knaves": "logic",
    "shortest_path": "graphs",
    "path_star": "graphs",
    "chain_sum": "arithmetic",
    "products": "arithmetic",
    "number_sorting": "algorithmic",
}
"""The families, and where in reasoning-gym each stands."""

Setting = bool | int | float


class GymConfig(Config):
    """Which problems of reasoning-gym, how hard, and how many."""

    family: Family = "mini_sudoku"
    """Its name in reasoning-gym."""
    settings: dict[str, Setting] = Field({}, validate_default=True)
    """The family's own settings, such as `min_empty` of mini_sudoku; those left out are at its defaults."""
    train: int = Field(5000, ge=1)
    """Training problems."""
    calibration: int = Field(500, ge=1)
    """Calibration problems."""
    test: int = Field(1000, ge=1)
    """Test problems."""
    seed: int = Field(0, ge=0)
    """Seed of the generator. Those of two seeds have nothing in common but problems that both happen to make."""
    unsafe_sandbox: bool = False
    """Where the scorer cannot be isolated, run it all the same, with resource limits only."""

    @field_validator("settings")
    @classmethod
    def _of_the_family(cls, settings: dict[str, Setting], info: ValidationInfo) -> dict[str, Setting]:
        return _settings(info.data["family"], settings) if "family" in info.data else settings


_APART = 1 << 32
"""Numbers from one seed to the next: an item follows from seed + index alone, so neighbouring ones share nearly all."""
_BATCH = 100
"""Items of one call; a call that takes long makes fewer."""
_BATCH_S = 300.0
_PATIENCE_S = 30.0
"""How long no new problem may come."""
_LONGEST = 20_000
"""Characters of an answer that is looked at."""
_LIMITS = Limits(cpu_s=2.0, wall_s=20.0, memory_mb=256, processes=4, output_kb=64)
_IMPORTS = "import collections, copy, dataclasses, decimal, enum, fractions, math, random, re, string, typing"
"""What the scorers' modules import: once for a sandbox, before its first answer."""
_POOL = Pool("selfroute.tasks.gym_items:items", size=1)


class Gym:
    """The task: `load` gives the problems of a split, `verify` scores an answer, `verify_many` many at a time."""

    Config = GymConfig
    ABOUT = tuple(
        About(
            f"gym family={family}",
            "generated from a seed by reasoning-gym 0.1.25",
            "5,000 train / 500 calibration / 1,000 test",
            "Apache-2.0",
        )
        for family in FAMILIES
    )

    def __init__(self, config: GymConfig) -> None:
        self.config = config
        self.sandbox = Sandbox(unsafe=config.unsafe_sandbox)
        self._made: dict[Split, dict[str, Problem]] = {"train": {}, "calibration": {}, "test": {}}
        self._count = 0

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, which a hash of a problem's text decides: no two splits or seeds mix them.

        Raises:
            TaskError: the family makes too few with these settings, the scorer cannot be isolated here, or it does not
                take the family's own answer.
        """
        # Found out now, before anything is paid for.
        self.sandbox.isolated()
        c, made = self.config, self._made[split]
        wanted = {"train": c.train, "calibration": c.calibration, "test": c.test}[split]
        failure, latest = "no new one came", time.monotonic()
        while len(made) < wanted:
            if time.monotonic() - latest > _PATIENCE_S:
                raise TaskError(
                    f"{c.family} made only {len(made)} distinct {split} problems, {wanted} were asked for: {failure} "
                    f"(widen task.settings, or ask for fewer: task.{split}=N)"
                )
            for entry in self._more():
                if "failure" in entry:
                    failure = entry["failure"]
                    continue
                new = _problem(entry)
                place = self._made[split_of_hash(int(new.id.removeprefix("gym-"), 16))]
                if new.id not in place:
                    place[new.id], latest = new, time.monotonic()
        found = list(made.values())[:wanted]
        self._try_the_scorer(found[0])
        return found

    def _more(self) -> list[Any]:
        """The next items, or why there is none."""
        c, first = self.config, self.config.seed * _APART + self._count
        done = _POOL.call(c.family, c.settings, first, _BATCH, limit_s=_BATCH_S)
        if done.failure:
            raise TaskError(f"the worker that makes problems of {c.family} failed: {done.failure}")
        self._count += len(done.result)
        items: list[Any] = done.result
        return items

    def _try_the_scorer(self, problem: Problem) -> None:
        """A scorer that could not be made would call every answer wrong."""
        verdict = self.verify(problem.reference["answer"], problem)
        if not verdict.correct:
            raise TaskError(
                f"the scorer of {self.config.family} does not take the family's own answer ({verdict.reason}): "
                "install the tested reasoning-gym: pip install 'selfroute[gym]'"
            )

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, without end."""
        problems = self.load("train")
        while True:
            yield rng.choice(problems)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """Whether an answer scores 1. Total, and bounded in time: what a scorer fails at is wrong, and it says how.

        Raises:
            TaskError: the sandbox could not be started, which says nothing of the answer.
        """
        case = self._case(answer, problem)
        return case if isinstance(case, Verdict) else _verdict(self.sandbox.run(_job([case]))[0], answer)

    async def verify_many(self, answers: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """`verify` for many answers, as many at a time as there are cores; the verdicts in their order."""
        cases = [self._case(answer, problem) for answer, problem in answers]
        # The responses to a problem often agree.
        distinct = list(dict.fromkeys(case for case in cases if isinstance(case, str)))
        shares = [distinct[n :: cores()] for n in range(min(cores(), len(distinct)))]
        runs = await self.sandbox.run_many([_job(share) for share in shares])
        found = {
            case: ran
            for share, results in zip(shares, runs, strict=True)
            for case, ran in zip(share, results, strict=True)
        }
        return [
            case if isinstance(case, Verdict) else _verdict(found[case], answer)
            for case, (answer, _) in zip(cases, answers, strict=True)
        ]

    def solution(self, problem: Problem) -> str | None:
        """The family's own answer; None for a problem in a user's words."""
        answer: str | None = problem.reference.get("answer")
        return answer

    def read(self, text: str) -> Problem:
        """A problem in a user's own words, which has no reference: no answer to it is judged correct.

        Raises:
            TaskError: the text is empty.
        """
        if not text.strip():
            raise TaskError("need a problem in words")
        return Problem(f"gym-{problem_hash(text):016x}", text, {})

    def variants(self, problem: Problem, count: int) -> list[str]:
        """None: a problem's text is not ours to reword."""
        return []

    def canonical(self, answer: str) -> str:
        """The answer without differences in white space."""
        return " ".join(answer.split())

    @cached_property
    def _texts(self) -> dict[str, str]:
        """The texts that the scorer is made from, by the names of their modules."""
        family, root = self.config.family, Path(_library().__file__).parent
        names = ("dataset", "utils", f"{FAMILIES[family]}.{family}")
        return {
            f"reasoning_gym.{name}": (root / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
            for name in names
        }

    def _case(self, answer: str, problem: Problem) -> str | Verdict:
        """What the scorer is given; a verdict where it is not asked."""
        reference, family = problem.reference, self.config.family
        text = "\n".join(line.rstrip() for line in answer.strip().split("\n"))
        if not reference:
            return Verdict(False, "no reference answer is known", extracted=text, judged=False)
        if not text:
            return Verdict(False, "no answer")
        if len(text) > _LONGEST:
            return Verdict(False, f"longer than {_LONGEST:,} characters")
        entry = reference["entry"]
        if family == "number_sorting" and not _the_same_numbers(text, entry["metadata"]["sorted_numbers"]):
            return Verdict(False, "not the problem's numbers in that order", extracted=text)
        return json.dumps(pack([family, self._texts, text, entry]))


def _library() -> Any:
    """reasoning-gym, whose import takes most of a second.

    Raises:
        TaskError: it is not installed.
    """
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise TaskError(
            f"task gym needs reasoning-gym ({error}): pip install 'selfroute[gym]' (in a checkout: '.[gym]')"
        ) from error
    return reasoning_gym


def _settings(family: Family, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """All of a family's settings.

    Raises:
        ValueError: one that it has not, or a value that it refuses.
    """
    _, kind = _library().factory.DATASETS[family]
    usual: dict[str, Any] = {field.name: field.default for field in fields(kind) if field.name not in ("seed", "size")}
    unknown = [name for name in given if name not in usual]
    if unknown:
        raise ValueError(f"{family} has no setting {', '.join(unknown)} (it has: {', '.join(usual)})")
    for name, value in given.items():
        wanted = type(usual[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{name} is of type {wanted.__name__}, such as {usual[name]}; got {value!r}")
    settings = {**usual, **given}
    try:
        kind(**settings).validate()
    except AssertionError as error:
        raise ValueError(f"{family} refuses these settings: {error}") from error
    return settings


def _problem(entry: Mapping[str, Any]) -> Problem:
    question = entry["question"].strip()
    return Problem(f"gym-{problem_hash(question):016x}", question, {"answer": entry["answer"], "entry": entry})


def _job(cases: Sequence[str]) -> Job:
    """Every case runs, however long the others take: each has a limit of its own."""
    return Job(_scorer(), cases, "call", "score", _IMPORTS, limits=_LIMITS, total_s=math.inf)


@cache
def _scorer() -> str:
    return (resources.files("selfroute.tasks.inside") / "scorer.py").read_text(encoding="utf-8")


def _verdict(ran: Ran, answer: str) -> Verdict:
    extracted = answer.strip()
    if ran.limit is not None:
        return Verdict(False, f"undecided: the scorer came to its limit ({ran.limit})", extracted=extracted)
    try:
        score = returned(ran.answers if ran.status == 0 else "")
        return Verdict(score >= 1, f"reasoning-gym scores it {score:.3g}", extracted=extracted)
    except (ValueError, TypeError, KeyError, RecursionError):
        last = ran.stderr.strip().rpartition("\n")[2][:200]
        return Verdict(False, f"undecided: the scorer failed ({last or 'without a word'})", extracted=extracted)


def _the_same_numbers(answer: str, wanted: Sequence[str]) -> bool:
    """Whether an answer lists these numbers in this order.

    The family's own scorer takes numbers that are off by 1, and a list of NaN for anything.
    """
    try:
        listed = json.loads(answer.replace("'", '"'), parse_int=str, parse_float=str, parse_constant=str)
        return isinstance(listed, list) and [Decimal(str(n)) for n in listed] == [Decimal(n) for n in wanted]
    except (ValueError, InvalidOperation, RecursionError):
        return False
