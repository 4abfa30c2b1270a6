"""Training adapters in place of the model's weights."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from tests.gradients import assert_the_gradient_of_whole_sequences
from tests.unit.train.test_loop import config, metrics

from selfroute.device.base import DeviceConfig, LoRA, Sampling
from selfroute.device.hf import HFEngine
from selfroute.errors import ConfigError, DeviceError
from selfroute.protocol import chat
from selfroute.train.loop import train

DEVICE = {"model": "countdown-1m", "lora": {"rank": 4, "alpha": 8}}


def test_only_adapters_are_trained_and_saved(engine: HFEngine, run_dir: Path) -> None:
    saved = train(config(device=DEVICE), run_dir)
    assert sorted(f.name for f in saved.glob("*.safetensors")) == ["adapter_model.safetensors", "optimizer.safetensors"]
    tuned = HFEngine.load(DeviceConfig(model=str(saved)))
    trainable = [p for p in tuned.model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 0.1 * sum(p.numel() for p in tuned.model.parameters())
    assert all(p.abs().max() > 0 for p in trainable)
    # Merged by peft, it is a model like any other, with the base's weights below.
    prompt = torch.tensor([tuned.encode(chat("1 + 1"))])
    with torch.no_grad():
        adapted = tuned.model(prompt).logits
        merged = copy.deepcopy(tuned.model).merge_and_unload()(prompt).logits  # type: ignore[operator]
        with tuned.model.disable_adapter():  # type: ignore[operator]
            below = tuned.model(prompt).logits
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert torch.equal(below, engine.model(prompt).logits)
    assert not torch.allclose(adapted, below, atol=1e-4)


def test_a_new_adapter_changes_nothing_and_is_the_same_each_time(engine: HFEngine) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one, two = (HFEngine.load(DeviceConfig(model="countdown-1m", lora=LoRA(rank=4))) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [dict(e.model.named_parameters()) for e in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    prompt = torch.tensor([engine.encode(chat("1 + 1"))])
    assert torch.equal(one.model(prompt).logits, engine.model(prompt).logits)


def test_adapters_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = train(config(device=DEVICE, steps=4), tmp_path / "whole")

    def stop(record: Any) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(device=DEVICE, steps=4, checkpoint_every=1), tmp_path / "cut", report=stop)
    again = train(config(device=DEVICE, steps=4, checkpoint_every=1), tmp_path / "cut", resume=True)
    first, second = (load_file(p / "adapter_model.safetensors") for p in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["down_proj"]])
def test_adapters_have_the_gradient_of_whole_sequences(engine: HFEngine, targets: Any) -> None:
    """Where the first layer's keys depend on no adapter too."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(engine.model).double(), settings)
    prompts, rows = [engine.encode(chat(text)) for text in ("1 + 1", "2 + 2 + 2")], [[5, 6, 7], [8, 9]]
    assert_the_gradient_of_whole_sequences(model, prompts, rows, engine.pad, close=1e-10)


def test_targets_that_are_not_there_are_named() -> None:
    with pytest.raises(DeviceError, match=r"adapter does not fit the model: Target modules .*nothing_proj"):
        HFEngine.load(DeviceConfig(model="countdown-1m", lora=LoRA(targets=("nothing_proj",))))


QUANTIZED = {**DEVICE, "dtype": "bfloat16", "quantize": "4bit"}


def test_adapters_on_4_bit_weights_train_and_resume(tmp_path: Path) -> None:
    settings = {"device": QUANTIZED, "steps": 2, "checkpoint_every": 1, "gradient_checkpointing": True}
    whole = train(config(**settings), tmp_path / "whole")
    base = HFEngine.load(config(**settings).device).model
    tuned = HFEngine.load(config(**settings).device.model_copy(update={"model": str(whole)})).model
    moved = 0
    for (name, before), after in zip(base.named_parameters(), tuned.parameters(), strict=True):
        if "lora_" in name:
            assert before.dtype == torch.float32
            moved += not torch.equal(before, after)
        else:
            # The output layer, which is tied to the embeddings, the norms and what computes keep their precision.
            assert before.dtype == (torch.uint8 if name.endswith("base_layer.weight") else torch.bfloat16), name
            assert not before.requires_grad
            assert torch.equal(before, after)
    assert moved
    assert all(step["rows"] for step in metrics(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000002")
    again = train(config(**settings), tmp_path / "cut", resume=True)
    first, second = (load_file(p / "adapter_model.safetensors") for p in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_on_4_bit_weights_have_the_gradient_of_the_same_weights_in_full(recompute: bool) -> None:
    quantized, full = (
        HFEngine.load(DeviceConfig(model="countdown-1m", lora=LoRA(rank=2), **more))
        for more in ({"quantize": "4bit"}, {})
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for rough, exact in zip(quantized.model.parameters(), full.model.parameters(), strict=True):
            if rough.dtype == torch.uint8:
                exact.copy_(dequantize_4bit(rough.data, rough.quant_state))  # type: ignore[attr-defined]
            elif rough.requires_grad:
                exact.copy_(rough.normal_(std=0.1))
    prompts, rows = [full.encode(chat(text)) for text in ("1 + 1", "2 + 2 + 2")], [[5, 6, 7], [8, 9]]
    # As in training; bitsandbytes must not make the weights into what has no gradient.
    quantized.generate(prompts, [["a"], ["b"]], Sampling(max_tokens=3))
    assert_the_gradient_of_whole_sequences(quantized.model, prompts, rows, full.pad, close=1e-3, recompute=recompute)
    assert_the_gradient_of_whole_sequences(full.model, prompts, rows, full.pad, close=1e-3)
    for (name, rough), exact in zip(quantized.model.named_parameters(), full.model.parameters(), strict=True):
        if rough.requires_grad:
            assert rough.grad is not None
            assert exact.grad is not None
            assert torch.allclose(rough.grad, exact.grad, atol=1e-3 * float(exact.grad.abs().max())), name


def test_4_bits_are_for_the_weights_below_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"quantized weights are not trained: set lora"):
        config(device={"model": "countdown-1m", "quantize": "4bit"})
    with pytest.raises(ConfigError, match="do not compute in float64"):
        config(device={**QUANTIZED, "dtype": "float64"})
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeviceError, match=r"pip install 'selfroute\[qlora\]'"):
        HFEngine.load(config(device=QUANTIZED).device)
