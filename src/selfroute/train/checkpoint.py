"""Checkpoints: a model folder that any tool can load, the optimizer, and the step, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfroute.errors import TrainingError
from selfroute.records import checkpoints, read_json, write_json


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
    """Save under `run/checkpoints/step-NNNNNN` and drop all but the newest `keep`.

    The folder is built under another name, flushed, and renamed: a kill at any point leaves the last good one.

    Raises:
        TrainingError: the disk refused (full, read-only); nothing that was saved before is lost.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    building = final.with_name(f".building-{final.name}")
    try:
        shutil.rmtree(building, ignore_errors=True)
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
        write_json(building / "state.json", {"step": step, "optimizer": values, **state})
        for file in building.iterdir():
            _flush(file)
        _flush(building)
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        _flush(final.parent)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise TrainingError(
            f"cannot save a checkpoint in {final.parent}: {getattr(error, 'strerror', None) or error} "
            "(free some space, then continue with --resume)"
        ) from error
    return final


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


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
