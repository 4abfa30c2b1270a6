"""Problems of reasoning-gym through training and evaluation; the device model cannot solve them, the cloud does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfroute import api
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN
from tests.clouds import AnyQuestion
from tests.commands import selfroute

pytest.importorskip("reasoning_gym", reason="needs the extra: pip install '.[gym]'")
SMALL = ["task.name=gym", "task.family=chain_sum", "task.train=30", "task.calibration=8", "task.test=10"]


class Adder(AnyQuestion):
    """Solves chains of sums."""

    def _text(self, question: str) -> str:
        terms = re.findall(r"([-+]?) ?([0-9]+)", question.rpartition(": ")[2])
        return f"{ANSWER_OPEN}{sum(int(sign + number) for sign, number in terms)}{ANSWER_CLOSE}"


@pytest.mark.slow
def test_two_steps_and_an_evaluation(tmp_path: Path) -> None:
    config = api.load_train_config(
        "countdown-tiny",
        [
            *SMALL, "cloud.name=tests.e2e.test_gym:Adder", "steps=2", "problems_per_step=4", "num_responses=2",
            "sampling.max_tokens=24", "evaluation.max_tokens=24",
        ],
    )  # fmt: skip
    assert config.task.settings["settings"]["max_terms"] == 6
    api.train(config, tmp_path / "run")
    outcomes = api.evaluate(tmp_path / "run")
    assert len(outcomes) == 10
    assert all(o.cloud_correct and o.cloud_reason == "reasoning-gym scores it 1" for o in outcomes)


def test_the_command_line_knows_its_problems() -> None:
    shown = selfroute("tasks", "show", "gym", "family=mini_sudoku", "settings.max_empty=9", "test=3", "-n", "1")
    assert "Solve this 4x4 Mini Sudoku puzzle" in shown
    assert "problems pass" in selfroute("tasks", "check", "gym", "family=path_star", "test=3")
    planned = selfroute("train", "gym-mini-sudoku-qwen2.5-1.5b", "task.settings.min_empty=5", "--dry-run")
    assert '"min_empty": 5' in planned
    assert '"max_empty": 10' in planned
