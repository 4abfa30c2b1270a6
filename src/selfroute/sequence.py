"""A sequence of tasks: one model is trained on one after the other, and after each is tested on all that it has seen.

OUT/1-addition/     the first stage: a run like any other, which every command takes
OUT/2-countdown/    the second, which begins with the weights that the first ended with, and a new optimizer
OUT/cloud.sqlite    their cache and ledger, so that nothing is paid twice and a spend limit holds for all of them
OUT/sequence.json   accuracy and call rate of each task after each stage, and what was forgotten

A task of an earlier stage is tested in its own folder inside a later one, OUT/2-countdown/benchmarks/1-addition. Left
out on purpose: replay and other remedies against forgetting.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from selfroute import api
from selfroute.cloud import check_questions
from selfroute.config import Choice, Config, override, read, validate
from selfroute.errors import ConfigError, DataWarning, RunError
from selfroute.evaluate.benchmark import within
from selfroute.evaluate.run import columns, read_outcomes
from selfroute.measures import Columns, difference, proportion
from selfroute.records import lock_run, read_json, write_json
from selfroute.tasks import make_task
from selfroute.train.config import TrainConfig, whole
from selfroute.types import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from selfroute.train.progress import StepRecord

Stages = Mapping[str, TrainConfig]
"""The run of each stage, by its folder's name, in order."""


class Stage(Config):
    """One task of a sequence; what is left out is as in `train`."""

    task: Choice
    """Where problems come from and how answers are judged."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the stage's folder, after its number; by default the task's name."""
    steps: int | None = Field(None, ge=1)
    """Updates."""
    max_tokens: int | None = Field(None, ge=1)
    """Token limit of a response, in training and when the task is tested."""


class SequenceConfig(Config):
    """A training on several tasks, one after the other."""

    stages: tuple[Stage, ...] = Field(min_length=2)
    """The tasks, in their order."""
    train: TrainConfig = TrainConfig()
    """What all stages share; its `device.model` is where the first one starts."""

    @field_validator("train")
    @classmethod
    def _without_a_task(cls, train: TrainConfig) -> TrainConfig:
        if "task" in train.model_fields_set:
            raise ValueError("the stages say which tasks there are: leave train.task out")
        return train


def is_sequence(name: str) -> bool:
    """Whether a config, by package name or path, is of a sequence: it has `stages`."""
    return "stages" in read(name)


def load_config(name: str, overrides: Sequence[str] = ()) -> SequenceConfig:
    """A sequence's config by package name or path, changed by `key=value` overrides, such as `train.steps=50`."""
    return validate(SequenceConfig, override(read(name), overrides), name)


def stages(config: SequenceConfig, out: Path) -> dict[str, TrainConfig]:
    """The run of each stage under `out`, with every default written out.

    Raises:
        ConfigError: settings of a stage that its task, the cloud or the training does not take.
    """
    made: dict[str, TrainConfig] = {}
    model = config.train.device.model
    for number, stage in enumerate(config.stages, 1):
        changes: dict[str, Any] = {"task": stage.task.model_dump(mode="json")}
        if stage.steps is not None:
            changes["steps"] = stage.steps
        values = {**config.train.model_dump(mode="json"), **changes}
        values["device"]["model"] = model
        if stage.max_tokens is not None:
            values["sampling"]["max_tokens"] = values["evaluation"]["max_tokens"] = stage.max_tokens
        name = f"{number}-{stage.name or re.sub(r'[^A-Za-z0-9._-]', '-', stage.task.name)}"
        made[name] = whole(validate(TrainConfig, values, f"stage {name}"))
        model = str(out.resolve() / name / "checkpoints" / f"step-{made[name].steps:06d}")
    return made


def train(
    config: SequenceConfig,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[str, TrainConfig], Callable[[StepRecord], None]] = lambda name, run: lambda record: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train and test stage after stage under `out`; returns what stands in sequence.json.

    Every stage is a run that can be stopped or killed at any point: `resume` goes on from its last checkpoint, trains
    no finished stage again and tests nothing twice.

    Args:
        config: the stages, and what they share.
        out: the folder.
        resume: go on with what is there.
        report: called with each stage's name and settings; what it returns is told of its steps.
        progress: told of the tests.

    Raises:
        ConfigError: several processes.
        TaskError, CloudError: the problems of some stage cannot be had, or the cloud has no answers to them, which is
            found out before the first one begins.
        RunError: `out` holds stages of other settings, or some at all and `resume` is off.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "a sequence is trained in one process: start its stages one by one, each from the last's model"
        )
    runs = stages(config, out)
    _check_problems(runs)
    with lock_run(out):
        for number, (name, run) in enumerate(runs.items(), 1):
            folder = out / name
            _share_the_cloud(folder)
            if resume and number > 1:
                _follow(folder, run.device.model)
            api.train(run, folder, resume=resume, report=report(name, run), progress=progress, stage=name)
            for task in list(runs)[:number]:
                _test(folder, task, run, runs[task], progress)
            result = summarise(out, list(runs)[:number])
            write_json(out / "sequence.json", result)
    return result


def _check_problems(runs: Stages) -> None:
    """Load every stage's problems: the cloud must know them, and test problems that another stage trains on are told.

    Raises:
        TaskError: some cannot be had.
        CloudError: the cloud is one that has no answers to some.
    """
    trained, tested = {}, {}
    for name, run in runs.items():
        task = make_task(run.task)
        train, test = task.load("train"), task.load("test")
        check_questions(run.cloud, [*train, *test])
        trained[name], tested[name] = {p.id for p in train}, {p.id for p in test}
    for one, other in permutations(runs, 2):
        both = len(trained[one] & tested[other])
        if both:
            message = f"{one} trains on {both} of the {len(tested[other])} test problems of {other}"
            warnings.warn(message, DataWarning, stacklevel=3)


def _share_the_cloud(folder: Path) -> None:
    link = folder / "cloud.sqlite"
    folder.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / link.name)


def _follow(folder: Path, model: str) -> None:
    """Where a sequence was moved, the runs of a later stage learn where the checkpoint that it began with is now: the
    same step of the same stage, in the folder beside theirs."""
    for file in (folder / "run.json", *folder.glob("benchmarks/*/run.json")):
        known = read_json(file) if file.is_file() else {}
        device = known.get("config", {}).get("device", {})
        before = device.get("model", model)
        if before != model and Path(before).parts[-3:] == Path(model).parts[-3:]:
            device["model"] = model
            write_json(file, known)


def _place(folder: Path, task: str) -> Path:
    """Where a stage's model is tested on a task: its own in its run, another one's inside it."""
    return folder if folder.name == task else folder / "benchmarks" / task


def _test(folder: Path, task: str, run: TrainConfig, its: TrainConfig, progress: Progress | None) -> None:
    """Test a stage's model on the task of `its` run, if that was not done."""
    done = _place(folder, task) / "evaluations" / "after" / "evaluation.json"
    if done.is_file() and read_json(done)["checkpoint"] == api.checkpoint_name(folder):
        return
    if folder.name != task:
        within(folder, task, run.model_copy(update={"task": its.task, "evaluation": its.evaluation}))
    tell = (lambda what, number, total: progress(f"{task}: {what}", number, total)) if progress else None
    api.evaluate(_place(folder, task), progress=tell)


def summarise(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the stages came to, from their records.

    `cells` holds accuracy, call rate and the accuracy of the device alone of each task after each stage; `tasks` the
    accuracy and call rate of each right after its own stage (`during`) and after the last one (`after_all`), and
    `forgotten`, how much accuracy it lost between them, over the same problems.

    Raises:
        RunError: a stage was not tested.
    """
    found: dict[tuple[str, str], Columns] = {}
    for number, stage in enumerate(names, 1):
        for task in names[:number]:
            records = _place(out / stage, task) / "evaluations" / "after" / "records.jsonl"
            found[stage, task] = columns(read_outcomes(records))
    cells = {key: _cell(c) for key, c in found.items()}
    last = names[-1]
    return {
        "stages": list(names),
        "cells": [{"stage": stage, "task": task, **cell} for (stage, task), cell in cells.items()],
        "tasks": [
            {
                "task": task,
                "during": cells[task, task],
                "after_all": cells[last, task],
                "forgotten": difference(found[task, task].final, found[last, task].final).json(),
            }
            for task in names
        ],
    }


def _cell(c: Columns) -> dict[str, Any]:
    return {
        "problems": len(c.asked),
        "accuracy": proportion(c.final).json(),
        "call_rate": proportion(c.asked).json(),
        "local_accuracy": proportion(c.device).json(),
    }


def report(out: Path) -> dict[str, Any]:
    """Write OUT/sequence.json anew from the records of the stages that are done; returns it.

    Raises:
        RunError: no stage is done.
    """
    if not (out / "sequence.json").is_file():
        raise RunError(f"{out} has no sequence.json yet: continue the sequence with --resume")
    result = summarise(out, read_json(out / "sequence.json")["stages"])
    write_json(out / "sequence.json", result)
    return result


def terminal_tables(result: Mapping[str, Any]) -> list[Table]:
    """For a terminal: each task during and after all, and each task after each stage."""
    from rich.table import Table

    names: list[str] = result["stages"]
    tasks = Table(title=f"test problems, percent; after all: after {names[-1]}", title_justify="left")
    for heading in ("task", "accuracy during", "call rate", "accuracy after all", "call rate", "forgotten"):
        tasks.add_column(heading, justify="left" if heading == "task" else "right", overflow="fold")
    for one in result["tasks"]:
        during, after = one["during"], one["after_all"]
        values = (during["accuracy"], during["call_rate"], after["accuracy"], after["call_rate"], one["forgotten"])
        tasks.add_row(one["task"], *map(_percent, values))
    every = Table(title="accuracy at call rate (device alone), percent", title_justify="left")
    every.add_column("after stage", overflow="fold")
    for name in names:
        every.add_column(name, justify="right", overflow="fold")
    cells = {(c["stage"], c["task"]): c for c in result["cells"]}
    for stage in names:
        shown = [cells.get((stage, task)) for task in names]
        every.add_row(stage, *("" if cell is None else _brief(cell) for cell in shown))
    return [tasks, every]


def _percent(measure: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * measure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _brief(cell: Mapping[str, Any]) -> str:
    accuracy, rate, alone = (f"{100 * cell[key]['value']:.1f}" for key in ("accuracy", "call_rate", "local_accuracy"))
    return f"{accuracy} at {rate} ({alone})"
