"""Parts of a comparison in processes of their own: real workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.clouds import FlakyOracle
from tests.unit.compare.test_run import config, stamps

from selfroute.compare.config import CompareConfig
from selfroute.compare.jobs import run_parts
from selfroute.compare.methods import BOUNDS, METHODS, OURS, TASK_TUNED
from selfroute.compare.rows import methods_of, read_row, row_info
from selfroute.compare.run import compare
from selfroute.config import validate
from selfroute.errors import CloudError, ConfigError


def names(parts: list[CompareConfig]) -> list[list[str]]:
    return [[*part.methods, *part.ablations] for part in parts]


def test_parts_share_no_row_and_leave_none_out() -> None:
    parts = config(list(METHODS)).parts()
    assert sorted(m for part in names(parts) for m in part) == sorted(METHODS)
    assert names(parts)[0][0] == TASK_TUNED
    assert [OURS, "decision_votes"] in names(parts)
    assert names(parts)[-1] == list(BOUNDS)
    # A router's part trains the model that it stands on.
    [probe] = config(["probe"]).parts()
    assert probe.trained == [TASK_TUNED]


def test_ablations_that_train_the_same_are_one_part() -> None:
    ablations = {"decision=1": {"decision_weight": 1.0}, "G=8": {"num_responses": 8}, "same": {"decision_weight": 1.0}}
    parts = config([], ablations=ablations).parts()
    assert names(parts) == [["decision=1", "same"], ["G=8"]]


def test_a_part_goes_through_json_and_back() -> None:
    whole = config(["gapg", "probe"], ablations={"G=8": {"num_responses": 8}}, lrs=[1e-4, 2e-4])
    assert validate(CompareConfig, whole.stored(), "test") == whole


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    settings = config(["device_only", OURS, "gapg"])
    seen: list[str] = []
    compare(settings, tmp_path / "one")
    compare(settings, tmp_path / "two", jobs=2, progress=lambda what, done, total: seen.append(what))
    for method in ("device_only", OURS, "gapg"):
        one, two = (read_row(tmp_path / out / "bed", method, 0) for out in ("one", "two"))
        assert one.records == two.records
        assert one.info["config"] == two.info["config"]
    assert any(what.startswith("row 1 of 3 | ") and "training" in what for what in seen)
    before = stamps(tmp_path / "two")
    compare(settings, tmp_path / "two", jobs=2)
    assert stamps(tmp_path / "two") == before


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_what_is_finished_stays(tmp_path: Path) -> None:
    down = tmp_path / "down"
    flaky = {"name": f"{FlakyOracle.__module__}:FlakyOracle", "broken": str(down)}
    # The bounds ask the cloud about everything first.
    settings = config(["device_only"], train={"cloud": flaky})
    compare(settings, tmp_path)
    down.touch()
    with pytest.raises(CloudError, match="connection refused"):
        compare(config(["device_only", OURS, "gapg"], train={"cloud": flaky}), tmp_path, jobs=2)
    assert methods_of(tmp_path / "bed") == ["device_only"]
    down.unlink()
    compare(config([OURS], train={"cloud": flaky}), tmp_path)
    assert row_info(tmp_path / "bed", OURS, 0) is not None


@pytest.mark.slow
def test_a_stop_reaches_every_worker_and_nothing_new_begins(tmp_path: Path) -> None:
    settings = config([OURS, "gapg", "grpo", "dr_grpo"], train={"steps": 5000, "checkpoint_every": 10000})
    begun: set[str] = set()

    def stop_when_two_train(what: str, done: int, total: int) -> None:
        if "training" in what and len(begun) < 2:
            begun.add(what.split("| ")[1])
            if len(begun) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        compare(settings, tmp_path, jobs=2, progress=stop_when_two_train)
    assert not methods_of(tmp_path / "bed")
    runs = sorted((tmp_path / "bed/runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        # Each saved after the step that it was at.
        [checkpoint] = run.glob("*/checkpoints/step-*")
        assert 1 <= int(checkpoint.name.removeprefix("step-")) < 5000


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path) -> None:
    part: dict[str, Any] = {"config": {"testbed": "bed", "method": []}, "testbed": str(tmp_path)}
    with pytest.raises(ConfigError, match="did you mean methods"):
        run_parts([part], jobs=1, threads=1, progress=lambda what, done, total: None)
