"""Multiple choice through training, evaluation and other data sets' questions, on fixture files in their columns."""

from __future__ import annotations

from pathlib import Path

from selfroute import api
from selfroute.records import read_json

FIXTURES = Path(__file__).parents[1] / "fixtures/choice"


def test_two_steps_an_evaluation_and_another_data_set(tmp_path: Path) -> None:
    config = api.load_train_config(
        "countdown-tiny",
        [
            "task.name=choice", f"task.data_dir={FIXTURES}", "task.shuffle_seed=3", "steps=2",
            "cloud.name=tests.clouds:LetterCloud", "problems_per_step=4", "num_responses=2", "sampling.max_tokens=24",
            "evaluation.max_tokens=24",
        ],
    )  # fmt: skip
    api.train(config, tmp_path / "run")
    outcomes = api.evaluate(tmp_path / "run")
    assert len(outcomes) == 4
    assert all(outcome.cloud_reason.startswith("option B") for outcome in outcomes)
    assert {outcome.cloud_correct for outcome in outcomes} == {True, False}
    for dataset, count in (("arc-challenge", 3), ("mmlu-pro", 3)):
        folder = api.benchmark(tmp_path / "run", [f"task.dataset={dataset}"])
        assert read_json(folder / "run.json")["config"]["task"]["shuffle_seed"] == 3
        assert len(api.evaluate(folder)) == count
