"""The benchmark of asking early, in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["problems_per_step=6", "num_responses=4", "task.train=60", "task.calibration=30", "task.test=20"]


@pytest.mark.slow
def test_the_benchmark_of_asking_early(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/early_exit.py", "--out", str(tmp_path / "out.json"), "--runs", str(tmp_path),
         "--base-steps", "1", "--steps", "1", "--seeds", "2", *SMALL],
        capture_output=True, text=True, timeout=500, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out.json").read_text())
    assert len(made["rows"]) == 18
    assert [row["seeds"] for row in made["table"]] == [2] * 9
    for row in made["table"][:3]:
        assert row["accuracy_ahead"]["mean"] == row["device_tokens_ahead"]["high"] == 0
    for row in made["rows"]:
        alone, handed = row["handoff"]["problem"], row["handoff"]["reasoning"]
        # The oracle is as right either way.
        assert alone["calls"] == handed["calls"] == round(20 * row["measures"]["call_rate"]["value"])
        if alone["calls"]:
            assert alone["accuracy"] == handed["accuracy"]
            assert alone["prompt_tokens"] < handed["prompt_tokens"]
    assert done.stdout.count("| early, 0.003 | budget 30 % |") == 2
