"""The GPU benchmark on a small model: every function of the script runs, and the file has what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_all_sides_run_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "results" / "gpu.json"
    done = run("--tiny", "--repeats", "2", "--bandwidth", "0.02", "--peak", "0.1", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    # A round that warms up, and two that count.
    assert done.stdout.count("/2 graphs") == done.stdout.count("/2 update") == 3
    assert "| sampling, captured graphs |" in done.stdout
    result = json.loads(out.read_text())
    assert set(result) == {
        "device", "torch", "transformers", "work", "limits", "sampling", "speedup_by_graphs", "update",
    }  # fmt: skip
    work = result["work"]
    tokens = work["problems"] * work["responses"] * work["max_tokens"]
    measured = [*result["sampling"].values(), result["update"]]
    for side in measured:
        assert side["tokens_per_s"]["median"] > 0
        assert side["tokens_per_s"]["max"] == tokens / side["seconds"]["min"]
        assert (side["peak_gb"] is None) == (not torch.cuda.is_available())
    for spread in (result["speedup_by_graphs"], *(s for side in measured for s in side.values() if s)):
        if isinstance(spread, dict):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert result["update"]["model_flops_utilisation"]["median"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    for arguments, said in (((), "no CUDA GPU here"), (("--tiny",), "give --bandwidth")):
        done = run(*arguments, "--out", str(tmp_path / "gpu.json"))
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
