r"""Maths: the problems of MATH, GSM8K and the usual benchmarks, answered by a number, a formula, or a few of them.

    row -> Problem(question, answers) -> ... <answer>\boxed{...}</answer> -> equivalence.judge -> Verdict

Left out on purpose: how two answers are compared (`equivalence`), and where rows come from (`sources`).
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import Field

from selfroute.config import Config
from selfroute.errors import DataWarning, TaskError
from selfroute.tasks.equivalence import canonical, judge
from selfroute.tasks.mathsets import MATH_SETS, Layout, answers_of, question_of
from selfroute.tasks.sources import (
    PARTS,
    Files,
    Row,
    export_command,
    find_files,
    find_named,
    read_files,
    read_hub,
    refuse,
)
from selfroute.tasks.splits import problem_hash, split_of_hash
from selfroute.types import About, Problem, Split, Verdict

ASK = r"Give the final answer as \boxed{...}."
_WORDINGS = (
    "Solve this problem.\n\nPROBLEM\n\n" + ASK,
    "PROBLEM\n\nWhat is the answer? Write it as \\boxed{...}.",
    "Here is a maths problem:\n\nPROBLEM\n\nWork it out, and put the result into \\boxed{...}.",
    "PROBLEM\n\nThink it through with care. The final answer belongs into \\boxed{...}.",
)


class MathsConfig(Config):
    """Which maths problems, and where they are."""

    dataset: Literal[
        "math-lighteval", "math-500", "agieval-math", "amc23", "aime24", "aime25", "minervamath", "gsm8k"
    ] = "math-lighteval"
    """The data set; `math-lighteval` and `gsm8k` can be trained on, the others are tests."""
    path: str | None = None
    """A .jsonl, .json, .csv or .parquet file in the data set's columns, or a folder of such files."""
    data_dir: str | None = None
    """A folder with a file or folder named after each data set, looked at before the hub."""
    revision: str | None = None
    """The hub's commit, branch or tag; None for the newest."""
    train: int | None = Field(None, ge=1)
    """Training problems, at most."""
    calibration: int | None = Field(None, ge=1)
    """Calibration problems, at most."""
    test: int | None = Field(None, ge=1)
    """Test problems, at most."""


class Maths:
    """The task: `load` gives the problems of a split, `verify` judges an answer, `read` takes a user's own words."""

    Config = MathsConfig
    ABOUT = tuple(
        About(
            f"maths dataset={name}",
            f"{one.title}: {', '.join(hub.id for hub in one.hubs)}",
            " / ".join(f"{size:,} {part}" for part, size in one.sizes.items()),
            one.licence,
        )
        for name, one in MATH_SETS.items()
    )

    def __init__(self, config: MathsConfig) -> None:
        if find_spec("math_verify") is None:
            raise TaskError("maths needs math-verify: pip install 'selfroute[tasks]'")
        self.config = config
        self.about = MATH_SETS[config.dataset]

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, in an order that a hash of each decides.

        A data set's own test problems are `test`, and 8 % of its training problems, by hash, are `calibration`. One
        undivided file of a data set that can be trained on is cut by hash, 80 % train, 8 % calibration, 12 % test.

        Raises:
            TaskError: the data cannot be found or read, holds bad rows, or none of the split.
        """
        wanted = {"train": self.config.train, "calibration": self.config.calibration, "test": self.config.test}[split]
        found = self._splits[split]
        if not found:
            raise TaskError(self._nothing(split))
        return found[:wanted]

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        files, parts = self._files, {}
        for part in files.parts if files else self.about.sizes:
            rows = list(read_files(files.parts[part]) if files else self._hub(part))
            if not files and len(rows) != self.about.sizes[part]:
                _warn(f"the hub's {self.config.dataset} has {len(rows)} {part} rows, not {self.about.sizes[part]}")
            parts[part] = _problems(rows, self.about.layouts)
        if "all" in parts and "train" not in self.about.sizes:
            parts["test"] = parts.pop("all")
        whole, test = parts.get("all") or parts.get("train") or {}, parts.get("test")
        if test:
            both = whole.keys() & test.keys()
            if both:
                _warn(f"{len(both)} training problems are test problems too: they are left out of training")
            whole = {key: p for key, p in whole.items() if key not in both}
        splits: dict[Split, list[Problem]] = {"train": [], "calibration": [], "test": list((test or {}).values())}
        for key, p in whole.items():
            split = split_of_hash(key)
            # With test problems of its own, the hash's share of them is for training.
            splits["train" if test and split == "test" else split].append(p)
        return {split: sorted(found, key=lambda p: p.id) for split, found in splits.items()}

    @property
    def _files(self) -> Files | None:
        config, divided = self.config, "train" in self.about.sizes
        if config.path:
            return find_files(Path(config.path), divided=divided)
        named = find_named(Path(config.data_dir), config.dataset) if config.data_dir else None
        return find_files(named, divided=divided) if named else None

    def _hub(self, part: str) -> Iterator[Row]:
        dataset, revision, hub = self.config.dataset, self.config.revision, self.about.hubs[0]
        divided = len(self.about.sizes) > 1
        lines = [
            "  " + export_command(hub, p, revision, f"{p}.jsonl" if divided else f"{dataset}.jsonl")
            for p in PARTS
            if p in self.about.sizes
        ]
        where = f"DIR/{dataset}/train.jsonl and test.jsonl" if divided else f"DIR/{dataset}.jsonl"
        advice = (
            "On a machine with a network (pip install datasets):\n"
            + "\n".join(lines)
            + f"\nthen copy to {where} and set task.data_dir=DIR, or set task.path to the "
            + ("folder" if divided else "file")
            + ". What the hub's cache holds is found with HF_HUB_OFFLINE=1."
        )
        return read_hub(self.about.hubs, part, revision=revision, advice=advice)

    def _nothing(self, split: Split) -> str:
        dataset = self.config.dataset
        if "train" not in self.about.sizes and split != "test":
            return (
                f"{dataset} holds test problems only: train on task.dataset=math-lighteval, then "
                f"selfroute evaluate RUN task.dataset={dataset}"
            )
        place = self.config.path or self.config.data_dir or dataset
        return f"{place} holds no {split} problem of {dataset}: give more, or train and test in files of their own"

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        problems = self.load("train")
        while True:
            yield from rng.sample(problems, len(problems))

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


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=2)


def _problems(rows: Sequence[Row], layouts: tuple[Layout, ...]) -> dict[int, Problem]:
    """Problems by hash; of the same question twice, the first.

    Raises:
        TaskError: columns are missing, or rows are bad: all are named.
    """
    problems: dict[int, Problem] = {}
    faults: list[str] = []
    for row in rows:
        if row.fault:
            faults.append(f"{row.place}: {row.fault}")
            continue
        layout = next((one for one in layouts if one.question in row.values and one.answer in row.values), None)
        if layout is None:
            wanted = ", or ".join(f"{one.question!r} and {one.answer!r}" for one in layouts)
            has = ", ".join(map(str, row.values)) or "none"
            faults.append(f"{row.place}: needs the columns {wanted}; it has {has}")
            continue
        question = row.values[layout.question]
        if not isinstance(question, str) or not question_of(question):
            faults.append(f"{row.place}: {layout.question} must be text, not {str(question)[:60]!r}")
            continue
        answers, fault = answers_of(row.values[layout.answer], layout.how)
        if fault:
            faults.append(f"{row.place}: {layout.answer} {fault}")
            continue
        text = question_of(question)
        problems.setdefault(_hash(text), _problem(text, answers))
    refuse(faults)
    return problems


def _problem(text: str, answers: tuple[str, ...]) -> Problem:
    return Problem(
        id=f"maths-{_hash(text):016x}",
        question=f"{text}\n\n{ASK}",
        reference={"answers": answers},
    )


def _hash(text: str) -> int:
    # Copies of one problem differ in spaces and in dollar signs.
    return problem_hash(re.sub(r"[\s$]+", "", text).lower())
