"""Each architecture through the real commands: train, resume, calibrate, evaluate; every weight, and adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfroute.config import Choice
from selfroute.records import read_json, read_records
from selfroute.tasks import make_task
from tests.checkpoints import FAMILIES, engine_of, teach
from tests.commands import selfroute
from tests.unit.train.test_loop import metrics

pytestmark = pytest.mark.slow

TASK = {"digits_max": 2, "train": 4, "calibration": 30, "test": 10}
SETTINGS = [
    "task.name=addition", *(f"task.{key}={value}" for key, value in TASK.items()), "steps=2", "problems_per_step=4",
    "num_responses=8", "checkpoint_every=1", "lr=1e-3", "sampling.max_tokens=40", "evaluation.max_tokens=40",
]  # fmt: skip
WAYS = {
    "every weight": [],
    "adapters": ["device.lora={rank=4}", "device.dtype=bfloat16", "gradient_checkpointing=true"],
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as from the hub, whose model answers or asks."""
    engine = engine_of(request.param)
    problems = make_task(Choice(name="addition", **TASK)).load("train")
    teach(engine, problems, [str(p.reference["sum"]) for p in problems])
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_resumes_calibrates_and_evaluates(checkpoint: Path, tmp_path: Path, way: str) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    command = ["train", "countdown-tiny", *SETTINGS, f"device.model={checkpoint}", *WAYS[way]]
    assert "trained: " in selfroute(*command, "--out", run)
    assert any(step["rows"] for step in metrics(run))
    assert any(0 < step["asking"] < 1 for step in metrics(run))
    weights = "adapter_model.safetensors" if way == "adapters" else "model.safetensors"
    first, last = (load_file(run / f"checkpoints/step-{n:06d}" / weights) for n in (1, 2))
    assert any(not torch.equal(first[name], last[name]) for name in first)

    # As after a kill in the second step.
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-000002")
    assert "resumed after step 1" in selfroute(*command, "--out", again, "--resume")
    resumed = load_file(again / "checkpoints/step-000002" / weights)
    assert set(resumed) == set(last)
    assert all(torch.equal(resumed[name], last[name]) for name in last)
    assert metrics(again) == metrics(run)

    assert "95 % interval" in selfroute("calibrate", run, "--budget", "0.5")
    assert "selfroute, own decision" in selfroute("evaluate", run)
    assert "selfroute, budget 50 %" in selfroute("evaluate", run, "--budget", "0.5")
    assert read_json(run / "calibration.json")["checkpoint"] == "step-000002"
    records = read_records(run / "evaluations/budget-0.5/records.jsonl")
    assert len(records) == TASK["test"]
    assert any(r["score"] is not None for r in records)
