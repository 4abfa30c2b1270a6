"""Two tasks one after the other, killed and moved on the way, from the command line."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfroute import api
from selfroute.errors import RunError
from selfroute.records import read_json, read_records
from tests.commands import selfroute

CONFIG = """
[[stages]]
max_tokens = 60
task = { name = "countdown", train = 40, calibration = 8, test = 12 }

[[stages]]
name = "small"
steps = 3
max_tokens = 60
task = { name = "countdown", number_max = 9, target_max = 30, train = 40, calibration = 8, test = 10 }

[train]
steps = 2
problems_per_step = 4
num_responses = 3
checkpoint_every = 1
decision_cloud = "call"
"""
LAST = "2-small/checkpoints/step-000003/model.safetensors"


def killed_in_the_second_stage(config: Path, out: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "selfroute", "train", str(config), "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    metrics = out / "2-small/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.002)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -9, said


def written(run: Path) -> list[tuple[str, int]]:
    """When each file of a run's checkpoints and tests was written."""
    files = [*run.glob("checkpoints/*/*"), *run.glob("**/records.jsonl")]
    return sorted((str(file.relative_to(run)), file.stat().st_mtime_ns) for file in files)


def state(out: Path) -> dict[str, Any]:
    steps = {
        stage: [{k: v for k, v in s.items() if k != "seconds"} for s in read_records(out / stage / "metrics.jsonl")]
        for stage in ("1-countdown", "2-small")
    }
    return {"steps": steps, "sequence": read_json(out / "sequence.json")}


@pytest.mark.slow
def test_two_tasks_one_after_the_other_killed_moved_and_resumed(tmp_path: Path) -> None:
    config, whole, cut = tmp_path / "two.toml", tmp_path / "whole", tmp_path / "cut"
    config.write_text(CONFIG)
    planned = json.loads(selfroute("train", config, "--out", whole, "--dry-run").split("\nmemory: ")[0])
    assert [(name, run["task"]["number_max"], run["steps"]) for name, run in planned.items()] == [
        ("1-countdown", 20, 2), ("2-small", 9, 3),
    ]  # fmt: skip
    assert planned["2-small"]["device"]["model"] == str(whole / "1-countdown/checkpoints/step-000002")
    assert not whole.exists()

    said = selfroute("train", config, "--out", whole)
    assert "stage 1-countdown: 2 steps, from countdown-1m" in said
    for part in ("accuracy during", "accuracy after all", "forgotten", "1-countdown", "2-small"):
        assert part in said
    assert selfroute("report", whole).splitlines()[:3] == said[said.index("test problems, percent") :].splitlines()[:3]
    # A stage is a run like any other.
    assert api.run_config(whole / "1-countdown").task.name == "countdown"
    assert api.checkpoint_name(whole / "2-small") == "step-000003"
    found = read_json(whole / "sequence.json")
    assert [(c["stage"], c["task"], c["problems"]) for c in found["cells"]] == [
        ("1-countdown", "1-countdown", 12), ("2-small", "1-countdown", 12), ("2-small", "2-small", 10),
    ]  # fmt: skip
    # The second stage began with the weights that the first one ended with.
    began = read_json(whole / "2-small/run.json")["config"]["device"]["model"]
    assert began == str(whole / "1-countdown/checkpoints/step-000002")
    # Each step learns, so that what is compared below was made by learning.
    assert all(step["rows"] and step["grad_norm"] for steps in state(whole)["steps"].values() for step in steps)

    killed_in_the_second_stage(config, cut)
    first = written(cut / "1-countdown")
    with pytest.raises(RunError, match="1-countdown already holds a run: continue it with --resume"):
        selfroute("train", config, "--out", cut)
    # Wherever it lies by then.
    cut = cut.rename(tmp_path / "moved")
    resumed = selfroute("train", config, "--out", cut, "--resume")
    assert "  1/2 " not in resumed
    assert written(cut / "1-countdown") == first
    assert state(whole) == state(cut)
    one, other = load_file(whole / LAST), load_file(cut / LAST)
    assert all(torch.equal(one[name], other[name]) for name in one)

    # Nothing is paid twice, and each stage counts its own calls.
    with sqlite3.connect(cut / "cloud.sqlite") as ledger:
        calls, keys = ledger.execute("SELECT COUNT(*), COUNT(DISTINCT key) FROM calls").fetchone()
        phases = dict(ledger.execute("SELECT phase, COUNT(*) FROM calls GROUP BY phase"))
    ledger.close()
    assert calls == keys
    for stage in ("1-countdown", "2-small"):
        assert (cut / stage / "cloud.sqlite").resolve() == cut / "cloud.sqlite"
        assert read_records(cut / stage / "metrics.jsonl")[-1]["cloud_calls"] == phases[f"{stage}/train"]

    # Once more there is nothing to do.
    before = state(cut), written(cut / "1-countdown"), written(cut / "2-small")
    selfroute("train", config, "--out", cut, "--resume")
    assert before == (state(cut), written(cut / "1-countdown"), written(cut / "2-small"))
