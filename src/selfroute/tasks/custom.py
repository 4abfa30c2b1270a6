"""The user's own problems: a file, a folder or a data set on the hub, whose columns and verifier the config names.

    row -> columns.cells -> verifier.problem -> Problem ... answer -> verifier.verify -> Verdict

Left out on purpose: where rows come from and how they are divided (`datasets`), and how answers are judged
(`verifiers`, `borrowed`, `own`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from selfroute.errors import TaskError
from selfroute.tasks.columns import Columns, RowError, cells
from selfroute.tasks.datasets import DataConfig, DataSet, Loader
from selfroute.tasks.sources import SUFFIXES, Hub, part_of
from selfroute.tasks.verifiers import Verifier, made, pattern_fault
from selfroute.types import About, Problem, Split, Verdict

VERIFIERS = {
    "exact": "selfroute.tasks.verifiers:Exact",
    "number": "selfroute.tasks.verifiers:Number",
    "regex": "selfroute.tasks.verifiers:Regex",
    "choice": "selfroute.tasks.borrowed:Option",
    "maths": "selfroute.tasks.borrowed:Formula",
    "code": "selfroute.tasks.borrowed:Program",
}
_OWN = "selfroute.tasks.own:Own"
_NEEDED = {"exact": {"answer"}, "number": {"answer"}, "choice": {"answer", "options"}, "maths": {"answer"}}
"""Columns without which a verifier has nothing to judge by."""
_FILES = {"train": "train", "calibration": "validation", "test": "test"}
"""What the files of a divided folder are called, beside our own names."""


class CustomConfig(DataConfig):
    """Where your own problems are, what their columns hold, and what judges answers."""

    hub: str | None = None
    """A data set on the hub, such as `org/name`; `path`, where it is set, comes first."""
    hub_config: str | None = None
    """Its config (subset); None for its only one."""
    parts: dict[Literal["train", "calibration", "test"], str] = Field({})
    """What its splits are called: `{ train = "train", test = "validation" }`. Only those are read; empty for `train`
    alone, which is cut by hash."""
    columns: Columns
    """Which columns hold what."""
    verifier: str
    """`exact`, `number`, `choice`, `regex`, `maths`, `code`, or `package.module:function`, a function of your own."""
    ignore: tuple[Literal["case", "space"], ...] = ("case", "space")
    """`exact`: what makes no difference: capitals; the number of spaces and line breaks, and any at the ends."""
    answer_is: Literal["text", "letter", "place"] | None = None
    """`choice`: what the column `answer` has of the right option (its place counts from 0); None for any of them, where
    only one fits."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """`number`, and decimal fractions in `code`: how far an answer may be off, absolutely or relatively."""
    pattern: str | None = None
    """`regex`: what must match the whole answer, in Python's syntax, where rows have no pattern of their own."""
    pass_score: float = Field(1.0, gt=0, le=1)
    """A function of your own: the grade from which on an answer counts as correct."""
    time_limit_s: float = Field(5.0, gt=0, le=600)
    """Seconds of one verdict of `regex` and of a function of your own; `code`: processor seconds of a case."""
    memory_mb: int = Field(512, ge=64)
    """`code`: memory of a case, in MiB."""
    unsafe_sandbox: bool = False
    """`code`: where programs cannot be isolated, run them all the same, with resource limits only."""

    @model_validator(mode="after")
    def _complete(self) -> CustomConfig:
        if not self.path and not self.hub:
            raise ValueError("say where the problems are: path = FILE, or hub = 'org/name'")
        name, columns = self.verifier, self.columns
        module, colon, function = name.partition(":")
        if name not in VERIFIERS and not (
            colon and function.isidentifier() and module.replace(".", "_").isidentifier()
        ):
            raise ValueError(f"verifier is one of {', '.join(VERIFIERS)}, or package.module:function, not {name!r}")
        missing = [key for key in sorted(_NEEDED.get(name, ())) if getattr(columns, key) is None]
        if missing:
            raise ValueError(f"verifier {name} needs columns.{' and columns.'.join(missing)}")
        if name == "code" and (columns.cases is None) == (columns.tests is None):
            raise ValueError("verifier code needs one of columns.cases and columns.tests")
        if name == "regex" and (self.pattern is None) == (columns.pattern is None):
            raise ValueError("verifier regex needs a pattern for all rows, or columns.pattern")
        if self.pattern is not None and (fault := pattern_fault(self.pattern)):
            raise ValueError(f"pattern {fault}")
        return self


class Custom:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = CustomConfig
    ABOUT: tuple[About, ...] = (
        About(
            "custom path=FILE",
            "your own rows, from files or the hub; columns and verifier as the config says",
            "as they are",
            "see their source",
        ),
    )

    def __init__(self, config: CustomConfig) -> None:
        self.config = config
        self.pass_score = config.pass_score
        module, _, name = VERIFIERS.get(config.verifier, _OWN).partition(":")
        self.verifier: Verifier = getattr(import_module(module), name)(config)
        self.data = Loader(_name(config), _data_set(config), config, self._problem_of)

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as `Loader.load` says.

        Raises:
            TaskError: as there, or what the verifier needs is missing.
        """
        problems = self.data.load(split)
        ready = getattr(self.verifier, "ready", None)
        if ready is not None:
            ready()
        return problems

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        return self.data.training_problems(rng)

    def verify(self, answer: str, problem: Problem) -> Verdict:
        """What the verifier says of `answer`.

        Raises:
            TaskError: a function of the user's own failed; it names the row. Or the verifier cannot be started.
        """
        if not problem.reference:
            return Verdict(False, "no reference answer is known", extracted=answer.strip(), judged=False)
        try:
            return self.verifier.verify(answer, problem)
        except TaskError as error:
            raise TaskError(f"{self.data.places.get(problem.id, problem.id)}: {error}") from error

    async def verify_many(self, answers: Sequence[tuple[str, Problem]]) -> list[Verdict]:
        """`verify` for many answers; programs run as many at a time as there are cores."""
        many = getattr(self.verifier, "verify_many", None)
        if many is None:
            return [self.verify(answer, problem) for answer, problem in answers]
        found: list[Verdict] = await many(answers)
        return found

    def solution(self, problem: Problem) -> str | None:
        """The reference answer, or an example; None where there is none."""
        return self.verifier.solution(problem)

    def read(self, text: str) -> Problem:
        """A problem in a user's own words. No reference is known, so no answer to it is judged correct.

        Raises:
            TaskError: there is no text, or for `choice` no options.
        """
        read = getattr(self.verifier, "read", None)
        if read is not None:
            problem: Problem = read(text)
            return problem
        if not text.strip():
            raise TaskError("need a problem in words")
        return made(text.strip(), {})

    def variants(self, problem: Problem, count: int) -> list[str]:
        """None: a problem's text is not ours to reword."""
        return []

    def canonical(self, answer: str) -> str:
        """An answer in a form that equal answers share."""
        return self.verifier.canonical(answer)

    def _problem_of(self, row: Mapping[str, Any]) -> Problem | str:
        try:
            return self.verifier.problem(cells(self.config.columns, row), row)
        except RowError as error:
            return str(error)


def _name(config: CustomConfig) -> str:
    return (config.hub or "").rpartition("/")[2] or Path(config.path or "").stem


def _data_set(config: CustomConfig) -> DataSet:
    parts: dict[str, str] = {str(part): name for part, name in config.parts.items()} or {"train": "train"}
    if config.path and not config.parts and _is_divided(Path(config.path)):
        parts = _FILES
    return DataSet("your own", (Hub(config.hub or "", parts, (config.hub_config,)),), dict.fromkeys(parts, 0), "yours")


def _is_divided(place: Path) -> bool:
    """Whether a folder has files, or folders of them, that are called as the parts of a data set."""
    files = [file.relative_to(place) for file in place.rglob("*") if file.suffix in SUFFIXES]
    return any(part_of(file, {part: {part, name} for part, name in _FILES.items()}) for file in files)
