"""A run's model on other problems: which settings carry over, and what is noted of the problems."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.exported import run_of_the_shipped_model

from selfroute import api
from selfroute.errors import ConfigError, DataWarning
from selfroute.records import read_json, write_json

FIXTURES = Path(__file__).parents[2] / "fixtures"


def a_run(folder: Path, *settings: str) -> Path:
    """A run directory of which nothing but the settings is there."""
    config = api.load_train_config("countdown-tiny", settings)
    write_json(
        folder / "run.json",
        {"config": config.model_dump(mode="json"), "data": {"train": {"problems": 9, "sha256": "old"}}},
    )
    return folder


def test_a_file_and_a_revision_of_one_data_set_are_none_of_anothers(tmp_path: Path) -> None:
    file, places = FIXTURES / "choice/arc-easy.json", f"task.data_dir={FIXTURES / 'choice'}"
    cloud = "cloud.name=tests.clouds:LetterCloud"
    run = a_run(tmp_path, "task.name=choice", f"task.path={file}", places, "task.revision=v1", "task.test=2", cloud)
    with pytest.warns(DataWarning, match="cannot tell whether the run trained on these problems"):
        folder = api.benchmark(run, ["task.dataset=mmlu-pro"])
    written = read_json(folder / "run.json")
    task = written["config"]["task"]
    assert (task["dataset"], task["path"], task["revision"], task["test"]) == ("mmlu-pro", None, None, 2)
    assert written["data"]["sources"] == [{"file": str(FIXTURES / f"choice/mmlu-pro/{p}.jsonl")} for p in PARTS]
    assert written["data"]["test"]["problems"] == 2
    assert "train" not in written["data"]
    with pytest.warns(DataWarning):
        folder = api.benchmark(run, ["task.shuffle_seed=1"])
    task = read_json(folder / "run.json")["config"]["task"]
    assert (task["path"], task["revision"]) == (str(file), "v1")
    with pytest.raises(ConfigError, match="and nothing else; got 'steps=3'"):
        api.benchmark(run, ["steps=3"])


def test_a_calibration_on_other_problems_stays(tmp_path: Path) -> None:
    run = run_of_the_shipped_model(tmp_path / "run", task={"name": "countdown", "test": 4, "calibration": 40})
    folder = api.benchmark(run, ["task.seed=5"])
    own = api.calibrate(folder, 0.3)
    assert api.benchmark(run, ["task.seed=5"]) == folder
    assert read_json(folder / "calibration.json")["budgets"] == {"0.3": own}
    assert not (run / "calibration.json").exists()


PARTS = ("validation", "test")
