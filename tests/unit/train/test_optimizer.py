"""Master weights: what half precision would lose is kept, added up, and saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.train.test_loop import config, metrics

from selfroute.train.loop import train
from selfroute.train.optimizer import MasterAdamW


def layer(dtype: torch.dtype) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4).to(dtype)


def learn(model: torch.nn.Linear, optimizer: MasterAdamW, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        for part in range(3):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + part)).to(model.weight.dtype)
            model(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.masters, 1.0)
        optimizer.step()


def test_small_updates_add_up_in_half_precision() -> None:
    half, plain = layer(torch.bfloat16), layer(torch.bfloat16)
    before = half.weight.detach().clone()
    learn(half, MasterAdamW(half.parameters(), lr=2e-5), range(100))
    lost = torch.optim.AdamW(plain.parameters(), lr=2e-5, weight_decay=0.0)
    for step in range(100):
        lost.zero_grad(set_to_none=True)
        plain(torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).bfloat16()).square().sum().backward()
        lost.step()
    moved = (half.weight - before).float().abs()
    assert moved.mean() > 5e-4
    assert (plain.weight - before).float().abs().mean() < moved.mean() / 4


def test_gradients_of_half_precision_weights_are_added_in_single_precision() -> None:
    half = layer(torch.bfloat16)
    optimizer = MasterAdamW(half.parameters(), lr=1e-3)
    for gradient in (1.0, 2**-9, 2**-9):
        half.weight.backward(torch.full_like(half.weight, gradient))
    assert optimizer.masters[0].grad is not None
    assert torch.all(optimizer.masters[0].grad == 1 + 2**-8)
    assert half.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_optimizer_goes_on_exactly(dtype: torch.dtype) -> None:
    whole = layer(dtype)
    learn(whole, MasterAdamW(whole.parameters(), lr=1e-4), range(6))
    cut = layer(dtype)
    optimizer = MasterAdamW(cut.parameters(), lr=1e-4)
    learn(cut, optimizer, range(3))
    resumed = layer(dtype)
    resumed.load_state_dict(cut.state_dict())
    after = MasterAdamW(resumed.parameters(), lr=1e-4)
    after.load_state_dict(optimizer.state_dict())
    learn(resumed, after, range(3, 6))
    assert torch.equal(resumed.weight, whole.weight)


def test_a_state_of_another_precision_is_refused() -> None:
    half, single = layer(torch.bfloat16), layer(torch.float32)
    optimizers = [MasterAdamW(model.parameters(), lr=1e-4) for model in (half, single)]
    for model, optimizer in zip((half, single), optimizers, strict=True):
        learn(model, optimizer, range(1))
    for one, other in (optimizers, optimizers[::-1]):
        with pytest.raises(KeyError):
            one.load_state_dict(other.state_dict())


def test_single_precision_is_adamw_itself() -> None:
    ours, theirs = layer(torch.float32), layer(torch.float32)
    learn(ours, MasterAdamW(ours.parameters(), lr=1e-3, weight_decay=0.0), range(3))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        for part in range(3):
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + part))
            theirs(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_a_half_precision_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"device": {"model": "countdown-1m", "dtype": "bfloat16"}, "steps": 4, "lr": 1e-5}
    whole = train(config(**settings), tmp_path / "whole")
    cut = train(config(**settings), tmp_path / "cut")
    shutil.rmtree(cut)
    again = train(config(**settings), tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(whole / name), load_file(again / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert {t.dtype for t in load_file(whole / "model.safetensors").values()} == {torch.bfloat16}
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    kept, again = (train(config(gradient_checkpointing=on), tmp_path / str(on)) for on in (False, True))
    first, second = load_file(kept / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
