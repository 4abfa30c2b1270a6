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
from selfroute.errors import ConfigError, DataWarning, TaskError
from selfroute.records import read_json, write_json
from selfroute.tasks import make_task
from selfroute.train.config import TrainConfig, whole

SHARED = ("checkpoints", "calibration.json", "best/calibration.json", "cloud.sqlite", "judge.sqlite")


def benchmark(run: Path, config: TrainConfig, changes: Sequence[str]) -> Path:
    """The folder of a run's model on the problems that `changes` to its task give, such as `task.dataset=aime24`.

    Warns where test problems are among those that the run trained on.

    Raises:
        ConfigError: a change is not one of the task, or cannot be used.
    """
    others = [change for change in changes if not change.startswith("task.")]
    if others:
        raise ConfigError(f"an evaluation can have other problems, task.KEY=VALUE, and nothing else; got {others[0]!r}")
    changed = whole(validate(TrainConfig, override(config.model_dump(mode="json"), changes), f"{run} with {changes}"))
    _warn_of_overlap(config, changed)
    return within(run, re.sub(r"[^A-Za-z0-9_.,=+-]", "-", ",".join(changes)), changed)


def within(run: Path, name: str, config: TrainConfig) -> Path:
    """The folder RUN/benchmarks/NAME of a run's model under another config, made if it is not there."""
    folder = run / "benchmarks" / name
    for shared in SHARED:
        link = folder / shared
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(run / shared, link.parent))
    write_json(folder / "run.json", {**read_json(run / "run.json"), "config": config.model_dump(mode="json")})
    return folder


def _warn_of_overlap(config: TrainConfig, changed: TrainConfig) -> None:
    try:
        trained_on = {p.id for p in make_task(config.task).load("train")}
    except TaskError as error:
        message = f"cannot tell whether the run trained on these problems: {error}"
    else:
        both = len(trained_on & {p.id for p in make_task(changed.task).load("test")})
        message = f"the run trained on {both} of these test problems" if both else ""
    if message:
        warnings.warn(message, DataWarning, stacklevel=3)
