"""Problems of public data sets, and of a user's own in their columns: found, read, checked, divided.

    DataConfig (where) + DataSet (what) + row -> Problem  =  Loader: load(split), training_problems(rng)

The official test problems are `test`, and official validation problems `calibration`; what is not divided is cut by a
hash of each problem. Left out on purpose: what columns mean (the task's), how files and the hub are read (`sources`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from selfroute.config import Config
from selfroute.errors import DataWarning, TaskError
from selfroute.tasks.near import Pair, near
from selfroute.tasks.sources import (
    PARTS,
    Files,
    Hub,
    Row,
    export_command,
    find_files,
    find_named,
    listed,
    read_files,
    read_hub,
    refuse,
)
from selfroute.tasks.splits import split_of_hash
from selfroute.types import About, Problem, Split

ProblemOf = Callable[[Mapping[str, Any]], Problem | str | None]
"""A row's problem; what is wrong with the row, beginning with the column; or None where it is not wanted.

The problem's id ends with a dash and the 16 hexadecimal digits of its `problem_hash`.
"""


class DataConfig(Config):
    """Where a data set's problems are, and how many of them are wanted."""

    path: str | None = None
    """A .jsonl, .json, .csv or .parquet file in the data set's columns, or a folder of such files."""
    data_dir: str | None = None
    """A folder with a file or folder named after each data set, looked at before the hub."""
    revision: str | None = None
    """The hub's commit, branch or tag, such as `main`; None for the commit that is known here, or else the newest."""
    train: int | None = Field(None, ge=1)
    """Training problems, at most."""
    calibration: int | None = Field(None, ge=1)
    """Calibration problems, at most."""
    test: int | None = Field(None, ge=1)
    """Test problems, at most."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set for people and for the loader.

    `sizes`: rows of each part that it is divided into (`train`, `calibration`, `test`), 0 where that is not known. With
    `train` it can be trained on; with `train` alone its problems are cut by hash into all three splits.
    """

    title: str
    hubs: tuple[Hub, ...]
    sizes: Mapping[str, int]
    licence: str

    def about(self, name: str) -> About:
        """What `selfroute tasks` says of it."""
        return About(
            name,
            f"{self.title}: {', '.join(hub.id for hub in self.hubs)}",
            " / ".join(f"{size:,} {part}" if size else part for part, size in self.sizes.items()),
            self.licence,
        )


class Loader:
    """The problems of one data set by split, read once.

    Args:
        name: the data set's name, which is also that of its file in `data_dir`.
        about: what it is.
        config: where to look.
        problem_of: a row's problem.
        instead: of a data set of test problems, another one of the same task that can be trained on.
        only: which of its problems `problem_of` wants, in words, such as `difficulty EASY`.
    """

    def __init__(
        self,
        name: str,
        about: DataSet,
        config: DataConfig,
        problem_of: ProblemOf,
        *,
        instead: str = "",
        only: str = "",
    ) -> None:
        self.name, self.about, self.config, self.problem_of = name, about, config, problem_of
        self.instead, self.only = instead, only
        self.sources: list[dict[str, Any]] = []
        self.places: dict[str, str] = {}

    def load(self, split: Split) -> list[Problem]:
        """The problems of a split, as many as the config asks for, in an order that a hash of each decides.

        A data set's own test problems are `test`. Of its training problems 8 %, by hash, are `calibration`, unless it
        has some of its own. One undivided file of a data set that can be trained on is cut by hash, 80 % train, 8 %
        calibration, 12 % test.

        Raises:
            TaskError: the data cannot be found or read, holds bad rows, or none of the split.
        """
        c = self.config
        wanted = {"train": c.train, "calibration": c.calibration, "test": c.test}[split]
        found = self.splits[split]
        if not found:
            raise TaskError(self._nothing(split))
        if split == "train" and self.near:
            _warn(
                f"{len(self.near)} training problems all but repeat a test problem, such as {self.near[0][0].id}: "
                "selfroute tasks check lists them"
            )
        return found[:wanted]

    def training_problems(self, rng: random.Random) -> Iterator[Problem]:
        """Problems of the training split, in a new order each time round, without end."""
        problems = self.load("train")
        while True:
            yield from rng.sample(problems, len(problems))

    @cached_property
    def near(self) -> list[Pair]:
        """The training problems that all but repeat one of the test problems."""
        return near(self.splits["train"][: self.config.train], self.splits["test"][: self.config.test])

    @cached_property
    def splits(self) -> dict[Split, list[Problem]]:
        """All problems of each split, in the order of their ids; one of two splits belongs to the later one."""
        parts = self._parts()
        if "all" in parts and "train" not in self.about.sizes:
            parts["test"] = parts.pop("all")
        test = parts.get("test", {})
        calibration = _without(parts.get("calibration", {}), "calibration", test, "test")
        whole = _without(parts.get("all") or parts.get("train") or {}, "training", test, "test")
        whole = _without(whole, "training", calibration, "calibration")
        splits: dict[Split, list[Problem]] = {
            "train": [],
            "calibration": list(calibration.values()),
            "test": list(test.values()),
        }
        own = {split for split, found in splits.items() if found}
        for problem in whole.values():
            split = split_of_hash(int(problem.id.rpartition("-")[2], 16))
            # With problems of its own for it, a split's share by hash is for training.
            splits["train" if split in own else split].append(problem)
        return {split: sorted(found, key=lambda p: p.id) for split, found in splits.items()}

    def _parts(self) -> dict[str, dict[str, Problem]]:
        """The problems of each part by id; of the same problem twice, the first. `sources` gets what was read,
        and `places` where each problem stands, such as `test.jsonl:7`.

        Raises:
            TaskError: rows are bad; all are named.
        """
        files, sizes = self._files, self.about.sizes
        parts: dict[str, dict[str, Problem]] = {}
        faults: list[str] = []
        for part in files.parts if files else sizes:
            problems: dict[str, Problem] = parts.setdefault(part, {})
            count = 0
            for row in self._files_rows(files.parts[part]) if files else self._hub(part):
                count += 1
                found = row.fault or self.problem_of(row.values)
                if isinstance(found, str):
                    faults.append(f"{row.place}: {found}")
                elif found:
                    problems.setdefault(found.id, found)
                    self.places.setdefault(found.id, row.place)
            if not files and sizes[part] and count != sizes[part]:
                _warn(f"the hub's {self.name} has {count} {part} rows, not {sizes[part]}")
        refuse(faults)
        return parts

    @property
    def _files(self) -> Files | None:
        config = self.config
        if config.path:
            return find_files(Path(config.path), self._names)
        named = find_named(Path(config.data_dir), self.name) if config.data_dir else None
        return find_files(named, self._names) if named else None

    @property
    def _names(self) -> dict[str, set[str]]:
        """What the files of each part may be called: as we call it, or as the hub does. Empty where it has one part."""
        if len(self.about.sizes) == 1:
            return {}
        return {part: {part, *(hub.parts[part] for hub in self.about.hubs)} for part in self.about.sizes}

    def _hub(self, part: str) -> Iterator[Row]:
        name, revision, hub = self.name, self.config.revision, self.about.hubs[0]
        divided = len(self.about.sizes) > 1
        parts = [p for p in PARTS if p in self.about.sizes]
        lines = ["  " + export_command(hub, p, revision, f"{p}.jsonl" if divided else f"{name}.jsonl") for p in parts]
        where = f"DIR/{name}/{listed([f'{p}.jsonl' for p in parts])}" if divided else f"DIR/{name}.jsonl"
        advice = (
            "On a machine with a network (pip install datasets):\n"
            + "\n".join(lines)
            + f"\nthen copy to {where} and set task.data_dir=DIR, or set task.path to the "
            + ("folder" if divided else "file")
            + ". What the hub's cache holds is found with HF_HUB_OFFLINE=1; another commit with task.revision."
        )
        read = read_hub(self.about.hubs, part, revision=revision, advice=advice)
        self._note({"hub": read.hub, "asked": revision, "commit": read.commit})
        return read.rows

    def _files_rows(self, files: Sequence[Path]) -> Iterator[Row]:
        for file in files:
            self._note({"file": str(file.resolve())})
        return read_files(files)

    def _note(self, source: dict[str, Any]) -> None:
        if source not in self.sources:
            self.sources.append(source)

    def _nothing(self, split: Split) -> str:
        if "train" not in self.about.sizes and split not in self.about.sizes:
            other = f": train on task.dataset={self.instead}, then selfroute evaluate RUN task.dataset={self.name}"
            return f"{self.name} holds test problems only{other if self.instead else ''}"
        place = self.config.path or self.config.data_dir or self.name
        what = f"{self.name}, {self.only}" if self.only else self.name
        return (
            f"{place} holds no {split} problem of {what}: give more, or train and test in files of their own (what is "
            "not divided is cut by a hash of each question, 80 % train, 8 % calibration, 12 % test)"
        )


def _without(
    problems: dict[str, Problem], name: str, others: dict[str, Problem], their_name: str
) -> dict[str, Problem]:
    """The problems that are not among others, with a warning of those that are."""
    both = problems.keys() & others.keys()
    if both:
        _warn(f"{len(both)} {name} problems are {their_name} problems too: they are left out of {name}")
    return {key: problem for key, problem in problems.items() if key not in both}


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=2)
