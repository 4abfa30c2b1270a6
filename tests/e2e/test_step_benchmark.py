"""The step benchmark on a small model: all sides run, and the file has what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/step.py"


@pytest.mark.slow
def test_all_sides_run_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--repeats", "2", "--out", str(out)],
        capture_output=True, text=True, timeout=500, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    sides, work = result.pop("sides"), result.pop("work")
    assert set(result) == {
        "time_ratio_vs_trl_rloo", "time_ratio_vs_trl_grpo", "time_ratio_all_kept", "memory_ratio_vs_trl_rloo",
        "memory_ratio_vs_trl_grpo", "rollout_time_ratio",
    }  # fmt: skip
    for ratio in result.values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert sides["half_kept"]["seconds"]["median"] < sides["all_kept"]["seconds"]["max"]
    assert work["problems"] * work["responses"] == 64
    # A warm-up round, and two that count.
    assert done.stdout.count("/2 trl_grpo ") == 3
