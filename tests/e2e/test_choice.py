"""Multiple choice through training, evaluation and other data sets' questions, on fixture files in their columns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from selfroute import api
from selfroute.errors import DataWarning, RunError
from selfroute.records import read_json

FIXTURES = Path(__file__).parents[1] / "fixtures/choice"


def test_two_steps_an_evaluation_and_another_data_set(tmp_path: Path) -> None:
    data = shutil.copytree(FIXTURES, tmp_path / "data")
    config = api.load_train_config(
        "countdown-tiny",
        [
            "task.name=choice", f"task.data_dir={data}", "task.shuffle_seed=3", "steps=2",
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
    # What the run trained on is known, and stays what it was.
    known = read_json(tmp_path / "run/run.json")["data"]
    assert [known[split]["problems"] for split in ("train", "calibration", "test")] == [12, 3, 4]
    file = data / "mmlu/auxiliary_train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    leaked = {**rows[-1], "question": "What freezes first when the air cools down?"}
    (data / "leaked.json").write_text(json.dumps([leaked, rows[1], {**rows[2], "question": "Which is blue?"}]))
    others = ["task.dataset=mmlu-pro", f"task.path={data / 'leaked.json'}"]
    with pytest.warns(DataWarning) as warned:
        api.benchmark(tmp_path / "run", others)
    said = [str(warning.message) for warning in warned]
    assert said[0] == "the run trained on 1 of these test problems"
    assert said[1].startswith(
        "the run trained on problems that 1 of these test problems all but repeat, such as choice-"
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    changed = r"was made with other train problems \(12, now 11\) from .*auxiliary_train.jsonl"
    with pytest.raises(RunError, match=f"{changed}.*: bring them back, or give another --out"):
        api.train(config, tmp_path / "run", resume=True)
    with pytest.warns(DataWarning, match=f"cannot tell whether the run trained on these problems: .*{changed}"):
        api.benchmark(tmp_path / "run", others)
    file = data / "mmlu-pro/test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        RunError, match=r"made with other test problems \(3, now 2\) .* or delete .*task.dataset=mmlu-pro"
    ):
        api.benchmark(tmp_path / "run", ["task.dataset=mmlu-pro"])
    with pytest.raises(RunError, match=r"made with other test problems"):
        api.evaluate(tmp_path / "run/benchmarks/task.dataset=mmlu-pro")
