"""A run directory of the shipped model, as training leaves one, without the training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from selfroute.device.load import model_path
from selfroute.records import open_run, write_json
from selfroute.train.config import TrainConfig, whole

CHECKPOINT = "step-000001"


def run_of_the_shipped_model(path: Path, **changes: Any) -> Path:
    """The run, its checkpoint being `countdown-1m` itself; `changes` are those to the config."""
    config = whole(TrainConfig(**{"steps": 1, **changes}))
    open_run(path, "train", config.model_dump(mode="json"), resume=False)
    folder = path / "checkpoints" / CHECKPOINT
    shutil.copytree(model_path("countdown-1m"), folder)
    write_json(folder / "state.json", {"step": 1})
    return path
