"""The main job in one command: evaluate before, train, calibrate, evaluate after, report.

It continues where it stopped: every part that is already in the run directory is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfroute import api
from selfroute.cloud import free_settings
from selfroute.records import lock_run, open_run, read_json
from selfroute.train.config import as_now
from selfroute.types import Progress

if TYPE_CHECKING:
    from selfroute.train.progress import StepRecord

QUICK = ("steps=6", "problems_per_step=32", "task.train=1000", "task.calibration=150", "task.test=200")
"""Overrides of `--quick`: every part of the job, in a minute or two, learning little."""


def demo(
    out: Path,
    *,
    config: str = "countdown-tiny",
    overrides: tuple[str, ...] = (),
    progress: Progress | None = None,
    report: Callable[[StepRecord], None] = lambda record: None,
) -> dict[str, Any]:
    """Run the main job into `out` and return its summary; parts that are already there are not done again."""
    api.require_training()
    resolved = api.load_train_config(config, overrides)
    with lock_run(out):
        open_run(
            out,
            "train",
            resolved.model_dump(mode="json"),
            resume=True,
            free=free_settings(resolved.cloud, resolved.task),
            as_now=as_now,
        )

    def missing(name: str, checkpoint: str | None) -> bool:
        file = out / "evaluations" / name / "evaluation.json"
        return not file.is_file() or read_json(file)["checkpoint"] != checkpoint

    if missing(api.evaluation_name(None, untrained=True), None):
        api.evaluate(out, untrained=True, progress=progress)
    trained = api.train(resolved, out, resume=True, report=report, progress=progress).name
    if missing(api.evaluation_name(None, untrained=False), trained):
        api.evaluate(out, progress=progress)
    budget = resolved.budget
    api.calibrate(out, budget, progress=progress)
    if missing(api.evaluation_name(budget, untrained=False), trained):
        api.evaluate(out, budget=budget, progress=progress)
    return api.report(out)
