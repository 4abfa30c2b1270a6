"""A run's model on other problems: a folder inside the run that is a run directory of its own, for every command.

RUN/benchmarks/task.dataset=aime24/    run.json, evaluations/, the report; the rest (checkpoints, cloud, ...) is RUN's
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from selfroute.config import override, validate
from selfroute.errors import ConfigError, DataWarning, RunError, TaskError
from selfroute.records import check_problems, known_data, read_json, write_json
from selfroute.tasks import Task, make_task
from selfroute.tasks.near import near
from selfroute.tasks.provenance import pinned, provenance, task_of
from selfroute.train.config import TrainConfig, whole
from selfroute.types import Problem

SHARED = ("checkpoints", "calibration.json", "best/calibration.json", "cloud.sqlite", "judge.sqlite")


def benchmark(run: Path, config: TrainConfig, changes: Sequence[str]) -> Path:
    """The folder of a run's model on the problems that `changes` to its task give, such as `task.dataset=aime24`.

    Warns where test problems are among those that the run trained on, or near one of them.

    Raises:
        RunError: the folder holds an evaluation on problems that have changed since.
        ConfigError: a change is not one of the task, or cannot be used.
    """
    others = [change for change in changes if not change.startswith("task.")]
    if others:
        raise ConfigError(f"an evaluation can have other problems, task.KEY=VALUE, and nothing else; got {others[0]!r}")
    values = config.model_dump(mode="json")
    if any(change.startswith("task.dataset=") for change in changes):
        # A file or a commit of one data set is none of another's.
        values["task"] = {key: value for key, value in values["task"].items() if key not in ("path", "revision")}
    changed = whole(validate(TrainConfig, override(values, changes), f"{run} with {changes}"))
    folder, task = within(run, re.sub(r"[^A-Za-z0-9_.,=+-]", "-", ",".join(changes)), changed)
    _warn_of_overlap(run, config, task.load("test"))
    return folder


def within(run: Path, name: str, config: TrainConfig) -> tuple[Path, Task]:
    """The folder RUN/benchmarks/NAME of a run's model under another config, made if it is not there, and its task.

    Raises:
        TaskError: the problems cannot be had.
        RunError: they have changed since the folder was made.
    """
    folder = run / "benchmarks" / name
    known = known_data(folder)
    task = make_task(pinned(config.task, known))
    data = provenance(task, "test")
    check_problems(folder, known, data, f"delete {folder}")
    for shared in SHARED:
        link = folder / shared
        link.parent.mkdir(parents=True, exist_ok=True)
        # A calibration of these problems' own stays.
        if not (link.is_symlink() or link.exists()):
            link.symlink_to(os.path.relpath(run / shared, link.parent))
    config_now = config.model_dump(mode="json")
    write_json(folder / "run.json", {**read_json(run / "run.json"), "config": config_now, "data": data})
    return folder, task


def _warn_of_overlap(run: Path, config: TrainConfig, test: Sequence[Problem]) -> None:
    try:
        training = task_of(run, config.task, "train").load("train")
    except (TaskError, RunError) as error:
        _warn(f"cannot tell whether the run trained on these problems: {error}")
        return
    both = {p.id for p in training} & {p.id for p in test}
    if both:
        _warn(f"the run trained on {len(both)} of these test problems")
    pairs = near([p for p in training if p.id not in both], [p for p in test if p.id not in both])
    if pairs:
        count = len({p.id for _, p in pairs})
        _warn(
            f"the run trained on problems that {count} of these test problems all but repeat, such as {pairs[0][1].id}"
        )


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=4)
