"""Checkpoints: a model folder that any tool can load, the optimizer, and the step, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfroute.errors import ReproducibilityWarning, TrainingError
from selfroute.records import best_checkpoint, checkpoints, read_json, write_json


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Save under `run/checkpoints/step-NNNNNN` and drop all but the newest `keep` and the best.

    The folder is built under another name, flushed, and renamed: a kill at any point leaves the last good one. What
    kills left half built or half removed goes first; of several processes one alone saves.

    Raises:
        TrainingError: the disk refused (full, read-only); nothing that was saved before is lost.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    building = final.with_name(f".building-{final.name}")
    try:
        for half in [*final.parent.glob(".building-*"), *final.parent.glob(".removing-*")]:
            shutil.rmtree(half, ignore_errors=True)
        building.mkdir(parents=True)
        tokenizer.save_pretrained(building)
        model.save_pretrained(building)
        tensors, values = {}, {}
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}.{name}"] = value.contiguous()
                else:
                    values[f"{index}.{name}"] = value
        save_file(tensors, building / "optimizer.safetensors")
        write_json(building / "state.json", {"step": step, "made_with": _made_with(), "optimizer": values, **state})
        for file in building.iterdir():
            _flush(file)
        _flush(building)
        _remove(final)
        building.rename(final)
        _flush(final.parent)
        _prune(run, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise _refused(final, error) from error
    return final


def note_scores(run: Path, scores: Mapping[str, float], *, keep: int) -> None:
    """Write the scores of checkpoints, by their names, into the newest one, and drop what is neither new nor best now.

    Raises:
        TrainingError: the disk refused; the checkpoint stands as it was.
    """
    newest = checkpoints(run)[-1]
    try:
        write_json(newest / "state.json", {**read_json(newest / "state.json"), "scores": dict(scores)})
        _prune(run, keep)
    except OSError as error:
        raise _refused(newest, error) from error


def _prune(run: Path, keep: int) -> None:
    best = best_checkpoint(run)
    for old in checkpoints(run)[:-keep]:
        if old != best:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, under another name: a kill in the middle leaves none that looks whole."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removing-{checkpoint.name}")))


def _refused(checkpoint: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"cannot save a checkpoint in {checkpoint.parent}: {getattr(error, 'strerror', None) or error} "
        "(free some space, then continue with --resume)"
    )


def load_checkpoint(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the optimizer back as it was and return the state that was saved with it.

    Raises:
        TrainingError: the checkpoint is of another optimizer or is damaged.
    """
    state: dict[str, Any] = read_json(path / "state.json")
    entries: dict[int, dict[str, Any]] = {}
    try:
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"{path} is damaged: {error} (remove it to resume from the one before)") from error
    for key, value in {**tensors, **state["optimizer"]}.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    now = optimizer.state_dict()
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": now["param_groups"]})
    except (ValueError, KeyError) as error:
        raise TrainingError(f"{path} does not fit this model: {error}") from error
    return state


def warn_of_changes(path: Path, state: dict[str, Any]) -> None:
    """Warn where what made a checkpoint has changed: going on from it, numbers will differ by rounding."""
    # Checkpoints of an earlier version were made in one process.
    made = {"processes": 1, **state["made_with"]}
    changed = [
        f"{name} {made.get(name)} is now {value}" for name, value in _made_with().items() if made.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"{path.name} will not be continued bit for bit: {', '.join(changed)}", ReproducibilityWarning, stacklevel=2
        )


def _made_with() -> dict[str, str | int]:
    """What decides how sums are rounded."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "processor": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
    }


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
