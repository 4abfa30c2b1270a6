"""The best checkpoint, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfroute.errors import RunError
from selfroute.records import best_checkpoint, read_json, write_json
from tests.commands import selfroute

SMALL = [
    "task.train=60", "task.calibration=60", "task.test=20", "problems_per_step=4", "num_responses=3", "steps=2",
    "keep_checkpoints=2", "evaluation.every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is not its newest."""
    run = tmp_path_factory.mktemp("best") / "run"
    said = selfroute("train", "countdown-tiny", *SMALL, "--out", run)
    assert f"best:    {best_checkpoint(run)}   (with --best)" in said
    # However the two were rated on a few problems.
    file = run / "checkpoints/step-000002/state.json"
    write_json(file, {**read_json(file), "scores": {"step-000001": 0.9, "step-000002": 0.8}})
    return run


def test_each_command_takes_the_best(run: Path) -> None:
    selfroute("evaluate", run, "--before")
    selfroute("evaluate", run)
    newest = (run / "evaluations/after/records.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"not calibrated .* --budget 0.3 --best"):
        selfroute("ask", run, "1 2 3 6", "--budget", "0.3", "--best")
    assert "budget 30%: bias" in selfroute("calibrate", run, "--budget", "0.3", "--best")
    assert "selfroute, own decision" in selfroute("evaluate", run, "--best")
    assert "selfroute, budget 30 %" in selfroute("evaluate", run, "--budget", "0.3", "--best")
    assert read_json(run / "best/evaluations/budget-0.3/evaluation.json")["checkpoint"] == "step-000001"
    assert read_json(run / "best/calibration.json")["checkpoint"] == "step-000001"
    assert "the device " in selfroute("ask", run, "1 2 3 6", "--budget", "0.3", "--best")
    said = selfroute("report", run, "--best")
    # The untrained model is the same for both.
    assert "untrained device model" in said
    assert f"page: {run / 'best/report.html'}" in said
    # What is known of the newest stays.
    assert (run / "evaluations/after/records.jsonl").read_bytes() == newest
    assert not (run / "calibration.json").exists()
    assert set(read_json(run / "summary.json")) & {"after", "at_budget_30"} == {"after"}
    assert {"after", "at_budget_30", "calibration"} <= set(read_json(run / "best/summary.json"))
