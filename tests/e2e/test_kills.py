"""A run killed at twenty random moments ends with the weights of one that was not."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfroute.records import best_checkpoint, checkpoints, read_json, read_records
from tests.unit.train.test_loop import metrics

STEPS = 100
SETTINGS = [
    "countdown-tiny", f"steps={STEPS}", "problems_per_step=2", "num_responses=2", "checkpoint_every=1", "task.train=60",
    "sampling.max_tokens=60", "evaluation.every=4", "evaluation.max_tokens=60", "task.calibration=4",
]  # fmt: skip


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "selfroute", "train", *SETTINGS, "--out", str(run), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    said, _ = start(whole).communicate(timeout=300)
    assert steps(whole) == STEPS, said
    a_step = statistics.median(step["seconds"]["total"] for step in read_records(whole / "metrics.jsonl"))
    draw = random.Random(0)
    while_writing = 0
    for kill in range(20):
        process, done = start(cut, "--resume"), steps(cut)
        if kill % 2:
            # While it writes a checkpoint.
            while process.poll() is None and not any((cut / "checkpoints").glob(".building-*")):
                time.sleep(0.001)
        else:
            # As it starts, or somewhere in a step. However fast the machine is, all kills together stay within the run.
            more = draw.randint(0, 3)
            while process.poll() is None and steps(cut) < done + more:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, a_step if more else 3))
        assert process.poll() is None, "the kills must fall into the run"
        process.kill()
        process.communicate()
        while_writing += any((cut / "checkpoints").glob(".building-*"))
    said, _ = start(cut, "--resume").communicate(timeout=300)
    first, second = (load_file(run / f"checkpoints/step-{STEPS:06d}/model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first), said
    assert metrics(whole) == metrics(cut)
    first, second = (read_json(run / f"checkpoints/step-{STEPS:06d}/state.json") for run in (whole, cut))
    assert len(first["scores"]) == STEPS / 4
    assert first == second
    # The best one is there, although it is not among the newest.
    assert best_checkpoint(whole) is not None
    assert [p.name for p in checkpoints(cut)] == [p.name for p in checkpoints(whole)]
    assert while_writing >= 5
