"""The memory that training takes, against what a model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from selfroute.device.base import DeviceConfig, LoRA
from selfroute.device.hf import HFEngine
from selfroute.device.memory import Memory, estimate, free_memory
from selfroute.errors import DeviceError
from selfroute.train.optimizer import MasterAdamW

SHAPE = {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 500}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model's config, without weights."""
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path)
    return str(tmp_path)


def of(folder: str, recompute: bool = False, **device: object) -> Memory:
    found = DeviceConfig.model_validate({"model": folder, **device})
    return estimate(found, responses=8, prompts=1, max_tokens=100, micro_batch_tokens=256, recompute=recompute)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_exact(folder: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(getattr(torch, dtype))
    optimizer = MasterAdamW(model.parameters(), lr=1e-4)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    optimizer.step()
    held = [t for entry in optimizer.state_dict()["state"].values() for t in entry.values() if t.dim()]
    found = of(folder, dtype=dtype)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.gradients == sum(m.grad.numel() * 4 for m in optimizer.masters if m.grad is not None)
    assert found.optimizer == sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_about_those_that_are_kept(folder: str, recompute: bool) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
    if recompute:
        model.gradient_checkpointing_enable()
        model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        # 512 tokens: those of a micro-batch and of a prompt.
        output = model.model(input_ids=torch.randint(500, (16, 32)), use_cache=False)
    found, kept = of(folder, recompute).activations, sum(sizes.values())
    assert output.last_hidden_state.requires_grad
    # Computed again, one layer's activations come on top of what is kept between layers.
    assert kept / 2 < found < kept * (5 if recompute else 2)


def test_adapters_need_little_for_the_optimizer(folder: str) -> None:
    whole, adapters = of(folder, dtype="bfloat16"), of(folder, dtype="bfloat16", lora={"rank": 4})
    assert adapters.weights == whole.weights + adapters.gradients
    assert adapters.optimizer < whole.optimizer / 10


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_the_size_of_adapters_is_pefts(targets: str | tuple[str, ...], tmp_path: Path) -> None:
    lora = LoRA(rank=4, targets=targets)
    engine = HFEngine.load(DeviceConfig(lora=lora))
    trained = sum(p.numel() for p in engine.model.parameters() if p.requires_grad)
    found = of("countdown-1m", lora=lora.model_dump())
    assert found.gradients == trained * 4
    assert found.weights == 4 * sum(p.numel() for p in engine.model.parameters())
    # A folder that holds an adapter says so itself.
    engine.model.save_pretrained(tmp_path)
    assert of(str(tmp_path)).held == found.held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_weights_take_what_bitsandbytes_holds(dtype: str) -> None:
    lora = LoRA(rank=4)
    model = HFEngine.load(DeviceConfig(lora=lora, dtype=dtype, quantize="4bit")).model  # type: ignore[arg-type]
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            scales = parameter.quant_state  # type: ignore[attr-defined]
            held += scales.absmax.nbytes + scales.state2.absmax.nbytes
    found = of("countdown-1m", lora=lora.model_dump(), dtype=dtype, quantize="4bit")
    assert found.weights == pytest.approx(held, rel=2e-3)
    assert found.optimizer == of("countdown-1m", lora=lora.model_dump(), dtype=dtype).optimizer


def test_gradient_checkpointing_and_a_smaller_batch_take_less(folder: str) -> None:
    assert of(folder, recompute=True).peak < of(folder).peak
    assert "kv cache" in str(of(folder))


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot load the device model"):
        of(str(tmp_path / "none"))


def test_what_is_free_is_known() -> None:
    assert free_memory(DeviceConfig(device="cpu")) > 10**8
