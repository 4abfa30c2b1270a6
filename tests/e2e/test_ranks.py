"""Training in several processes, started by torchrun, against one process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfroute.records import read_json
from tests.unit.train.test_loop import metrics

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "countdown-tiny", "steps=4", "problems_per_step=6", "num_responses=4", "checkpoint_every=2", "task.train=60",
    "device.dtype=float64", "sampling.max_tokens=120", "evaluation.every=2", "evaluation.max_tokens=120",
    "task.calibration=10",
]  # fmt: skip


def start(run: Path, *settings: str, processes: int) -> subprocess.Popen[str]:
    command = ["-m", "selfroute"]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    return subprocess.Popen(
        [sys.executable, *command, "train", *SETTINGS, *settings, "--out", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-000004/model.safetensors")


def scores(run: Path) -> dict[str, float]:
    found: dict[str, float] = read_json(run / "checkpoints/step-000004/state.json")["scores"]
    return found


def calls(run: Path) -> int:
    with sqlite3.connect(run / "cloud.sqlite") as db:
        return int(db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(start(run, processes=1))
    return run


def test_two_processes_give_the_weights_of_one(alone: Path, tmp_path: Path) -> None:
    said = finish(start(tmp_path / "run", processes=2))
    # One of them speaks.
    assert said.count("   4/4 ") == said.count("memory: ") == said.count("trained: ") == 1
    found, expected = weights(tmp_path / "run"), weights(alone)
    assert all(torch.allclose(found[k], expected[k], rtol=0, atol=1e-5) for k in expected)
    ours, theirs = metrics(tmp_path / "run"), metrics(alone)
    assert [
        {k: v if isinstance(v, int) else pytest.approx(v, rel=1e-4) for k, v in step.items()} for step in theirs
    ] == ours
    assert calls(tmp_path / "run") == calls(alone)
    # One of them rates the checkpoints, which both know.
    assert scores(tmp_path / "run") == scores(alone)
    assert set(scores(alone)) == {"step-000002", "step-000004"}


@pytest.mark.slow
def test_two_processes_stopped_and_resumed(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "checkpoint_every=100", processes=2)
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and metrics(run)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    # The signal made it, since none was due.
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved
    assert saved[-1].name < "step-000004"
    finish(start(run, "checkpoint_every=100", "--resume", processes=2))
    assert all(torch.allclose(weights(run)[k], v, rtol=0, atol=1e-5) for k, v in weights(alone).items())
    assert calls(run) == calls(alone)
    assert scores(run) == scores(alone)


@pytest.mark.slow
def test_a_process_without_rows_holds_nobody_up(tmp_path: Path) -> None:
    """With two problems of two responses a step, some steps keep one row, or none."""
    settings = ["problems_per_step=2", "num_responses=2", "decision_weight=0", "steps=8"]
    finish(start(tmp_path / "run", *settings, processes=2))
    rows = [step["rows"] for step in metrics(tmp_path / "run")]
    assert min(rows) < 2 < max(rows)


def test_a_failure_of_one_ends_all(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    cloud = ["cloud.name=tests.clouds:FlakyOracle", f"cloud.broken={tmp_path / 'broken'}", "cloud.answers_first=3"]
    said = finish(start(tmp_path / "run", *cloud, processes=2), code=1)
    assert "connection refused" in said
    # The other one was told, and did not wait to be killed.
    assert "process 0 failed: " in said
    (tmp_path / "broken").unlink()
    finish(start(tmp_path / "run", *cloud, "--resume", processes=2))
    assert metrics(tmp_path / "run")[-1]["step"] == 4
