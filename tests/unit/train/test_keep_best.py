"""The best checkpoint stays beside the newest, and rating checkpoints changes nothing else."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.train.test_loop import config, ledger, metrics

from selfroute import api
from selfroute.cloud.memory import Cloud
from selfroute.device.hf import HFEngine
from selfroute.errors import CloudError, ConfigError, RunError, TrainingError
from selfroute.records import best_checkpoint, checkpoints, read_json
from selfroute.tasks import Task
from selfroute.train.loop import train
from selfroute.train.progress import StepRecord

SETTINGS: dict[str, Any] = {
    "steps": 5, "problems_per_step": 4, "num_responses": 3, "checkpoint_every": 3, "keep_checkpoints": 1,
    "sampling": {"max_tokens": 60}, "evaluation": {"max_tokens": 60, "every": 2},
}  # fmt: skip


def scripted(*scores: float) -> Callable[[HFEngine, Task, Cloud], float]:
    """Rates the checkpoints as they come."""
    left = list(scores)
    return lambda engine, task, cloud: left.pop(0)


def by_weights(engine: HFEngine, task: Task, cloud: Cloud) -> float:
    """A score that is the same for the same weights, and goes up and down as they change."""
    total = sum(p.double().abs().sum().item() for p in engine.model.parameters())
    return (total * 1e4) % 1


def names(run: Path) -> list[str]:
    return [p.name for p in checkpoints(run)]


def state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(checkpoints(run)[-1] / "state.json")
    return found


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        # After steps 2 and 4, and at the end.
        ((0.5, 0.4, 0.3), ["step-000002", "step-000005"]),
        ((0.3, 0.5, 0.4), ["step-000004", "step-000005"]),
        ((0.3, 0.4, 0.5), ["step-000005"]),
        # Of equals the first.
        ((0.3, 0.5, 0.5), ["step-000004", "step-000005"]),
    ],
)
def test_the_best_and_the_newest_stay(run_dir: Path, scores: tuple[float, ...], kept: list[str]) -> None:
    last = train(config(**SETTINGS), run_dir, rate=scripted(*scores))
    assert last.name == "step-000005"
    assert names(run_dir) == kept
    assert best_checkpoint(run_dir) == run_dir / "checkpoints" / kept[0]
    assert state(run_dir)["scores"] == dict(zip(("step-000002", "step-000004", "step-000005"), scores, strict=True))


def test_without_rating_the_newest_stay(run_dir: Path) -> None:
    unrated = {**SETTINGS, "evaluation": {"max_tokens": 60}, "checkpoint_every": 1, "keep_checkpoints": 2}
    train(config(**unrated), run_dir)
    assert names(run_dir) == ["step-000004", "step-000005"]


@contextmanager
def small_disk() -> Iterator[None]:
    """No file over 1 MB can be written, which is refused as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_neither_the_newest_nor_the_best(whole: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    killed_in_rating(cut, 2)
    assert names(cut) == ["step-000002", "step-000004"]
    with small_disk(), pytest.raises(TrainingError, match=r"cannot save a checkpoint .*free some space"):
        train(config(**SETTINGS), cut, resume=True, rate=by_weights)
    # Step 4 is rated now; step 5 could not be saved.
    assert names(cut) == sorted({"step-000004", best_checkpoint(cut).name})  # type: ignore[union-attr]
    assert not list((cut / "checkpoints").glob(".building-*"))
    train(config(**SETTINGS), cut, resume=True, rate=by_weights)
    assert state(cut) == state(whole)
    assert metrics(cut) == metrics(whole)


def test_rating_changes_neither_weights_nor_metrics_nor_what_training_paid(tmp_path: Path) -> None:
    rated = config(**{**SETTINGS, "steps": 3, "evaluation": {"max_tokens": 60, "every": 1}})
    unrated = rated.model_copy(update={"evaluation": rated.evaluation.model_copy(update={"every": 0})})
    a, b = (api.train(c, tmp_path / name) for c, name in ((rated, "rated"), (unrated, "unrated")))
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert metrics(tmp_path / "rated") == metrics(tmp_path / "unrated")
    paid = ledger(tmp_path / "rated")
    assert [line for line in paid if line[1] == "train"] == ledger(tmp_path / "unrated")
    # Each calibration problem once.
    assert sum(line[1] == "evaluate" for line in paid) == 5
    scores = state(tmp_path / "rated")["scores"]
    assert list(scores) == ["step-000001", "step-000002", "step-000003"]
    assert all(0 <= score <= 1 for score in scores.values())
    assert best_checkpoint(tmp_path / "unrated") is None


def test_where_the_cloud_earns_nothing_rating_asks_it_nothing(run_dir: Path) -> None:
    alone = {"answer": 1.0, "cloud": 0.0, "format": 0.0}
    api.train(
        config(**{**SETTINGS, "steps": 1, "evaluation": {"max_tokens": 60, "every": 1}, "reward": alone}), run_dir
    )
    [score] = state(run_dir)["scores"].values()
    assert 0 <= score <= 1
    assert ledger(run_dir) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing broke off."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config(**SETTINGS), run, rate=by_weights)
    return run


class Killed(BaseException):
    """A kill, as near as one process comes to it."""


def killed_in_rating(run: Path, number: int) -> None:
    """The run breaks off while it rates for the `number`th time."""
    seen = 0

    def rate(engine: HFEngine, task: Task, cloud: Cloud) -> float:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed
        return by_weights(engine, task, cloud)

    with pytest.raises(Killed):
        train(config(**SETTINGS), run, rate=rate)


def test_what_a_kill_left_half_built_or_half_removed_goes(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    settings = config(**{**SETTINGS, "evaluation": {"max_tokens": 60}, "checkpoint_every": 1})
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        train(settings, run_dir)
    monkeypatch.undo()
    # The first was to make room for the second, and is none of the run's any more.
    folders = run_dir / "checkpoints"
    assert names(run_dir) == ["step-000002"]
    assert sorted(p.name for p in folders.iterdir()) == [".removing-step-000001", "step-000002"]
    shutil.copytree(folders / "step-000002", folders / ".building-step-000001")
    train(settings, run_dir, resume=True)
    assert [p.name for p in folders.iterdir()] == ["step-000005"]


def stopped_at(run: Path, step: int) -> None:
    """A SIGTERM comes in that step."""

    def stop(record: StepRecord) -> None:
        if record.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(config(**SETTINGS), run, report=stop, rate=by_weights)
    assert names(run)[-1] == f"step-{step:06d}"


@pytest.mark.parametrize(
    "broken_off",
    [
        lambda run: killed_in_rating(run, 1),
        lambda run: killed_in_rating(run, 2),
        lambda run: killed_in_rating(run, 3),
        # Saved at once, and rated when it goes on.
        lambda run: stopped_at(run, 2),
        lambda run: stopped_at(run, 3),
        lambda run: stopped_at(run, 5),
    ],
    ids=[
        "in the first",
        "in the second",
        "in the last",
        "stopped where due",
        "stopped elsewhere",
        "stopped at the end",
    ],
)
def test_a_run_that_broke_off_keeps_the_best_of_one_that_did_not(
    whole: Path, tmp_path: Path, broken_off: Callable[[Path], None]
) -> None:
    cut = tmp_path / "cut"
    broken_off(cut)
    train(config(**SETTINGS), cut, resume=True, rate=by_weights)
    assert state(cut) == state(whole)
    assert names(cut) == names(whole)
    assert metrics(cut) == metrics(whole)
    for a, b in zip(checkpoints(cut), checkpoints(whole), strict=True):
        first, second = (load_file(p / "model.safetensors") for p in (a, b))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_stop_in_the_rating_that_a_resume_begins_with_is_no_further_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_in_rating(run, 1)
    before = names(run)

    def rate(engine: HFEngine, task: Task, cloud: Cloud) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return by_weights(engine, task, cloud)

    with pytest.raises(KeyboardInterrupt):
        train(config(**SETTINGS), run, resume=True, rate=rate)
    assert names(run) == before
    assert len(state(run)["scores"]) == 1


def test_a_rating_that_fails_loses_nothing(run_dir: Path) -> None:
    def rate(engine: HFEngine, task: Task, cloud: Cloud) -> float:
        raise CloudError("connection refused")

    with pytest.raises(CloudError, match="connection refused"):
        train(config(**SETTINGS), run_dir, rate=rate)
    assert names(run_dir) == ["step-000002"]
    train(config(**SETTINGS), run_dir, resume=True, rate=by_weights)
    assert len(state(run_dir)["scores"]) == 3


def test_a_score_that_cannot_be_written_is_a_clear_error(run_dir: Path) -> None:
    def rate(engine: HFEngine, task: Task, cloud: Cloud) -> float:
        # Where the new state would be built, there is a folder.
        (checkpoints(run_dir)[-1] / f".state.json.{os.getpid()}.tmp").mkdir()
        return 1.0

    with pytest.raises(TrainingError, match=r"cannot save a checkpoint .*free some space, then continue with --resume"):
        train(config(**SETTINGS), run_dir, rate=rate)
    assert state(run_dir)["scores"] == {}
    shutil.rmtree(checkpoints(run_dir)[-1] / f".state.json.{os.getpid()}.tmp")
    train(config(**SETTINGS), run_dir, resume=True, rate=by_weights)
    assert len(state(run_dir)["scores"]) == 3


def test_what_rates_must_be_given(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.every needs what rates a checkpoint"):
        train(config(**SETTINGS), run_dir)


def test_without_a_best_checkpoint_it_is_said_how_to_keep_one(run_dir: Path) -> None:
    api.train(config(**{**SETTINGS, "steps": 1, "evaluation": {"max_tokens": 60}}), run_dir)
    with pytest.raises(RunError, match=r"keeps no best checkpoint: train with evaluation.every=25"):
        api.evaluate(run_dir, best=True)
    with pytest.raises(RunError, match="keeps no best checkpoint"):
        api.report(run_dir, best=True)
    with pytest.raises(ConfigError, match="the untrained model is no checkpoint"):
        api.evaluate(run_dir, best=True, untrained=True)
