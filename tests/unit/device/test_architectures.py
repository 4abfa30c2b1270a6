"""Tiny random models of the architectures that people post-train: the engine against transformers itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.gradients import assert_the_gradient_of_whole_sequences
from transformers import AutoConfig, AutoModelForCausalLM

from selfroute.device.base import Sampling
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA_3_2 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA_3_2},
    # Prompts are longer than the window.
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "smollm3": {},
    "phi": {},
    "phi3": {},
}
# Gemma's norms compute in single precision whatever the weights are.
TOLERANCE = {"gemma3_text": 1e-5}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, engine: HFEngine) -> HFEngine:
    """A random model of an architecture, in double precision, with the shipped tokenizer."""
    settings = {**SHAPE, "vocab_size": len(engine.tokenizer) + 3, **ARCHITECTURES[request.param]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return HFEngine(model, engine.tokenizer)


def prompts(engine: HFEngine) -> list[list[int]]:
    return [engine.encode([{"role": "user", "content": "x" * n}]) for n in (3, 25, 60)]


def test_groups_decode_as_transformers_does(tiny: HFEngine) -> None:
    asked = prompts(tiny)
    groups = tiny.generate(asked, [["a", "b"]] * 3, Sampling(temperature=0, max_tokens=40))
    for prompt, (one, two) in zip(asked, groups, strict=True):
        alone = tiny.model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
        expected = alone[0, len(prompt) :].tolist()
        assert list(one.token_ids) == expected[: len(one.token_ids)]
        assert one.finished or len(one.token_ids) == len(expected) == 40
        assert one == two


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prompts_have_the_gradient_of_whole_sequences(
    tiny: HFEngine, request: pytest.FixtureRequest, recompute: bool
) -> None:
    close = TOLERANCE.get(request.node.callspec.params["tiny"], 1e-10)
    rows = [[5, 9, 30, 31, 2], [7] * 20, [40, 41]]
    assert_the_gradient_of_whole_sequences(tiny.model, prompts(tiny), rows, tiny.pad, close=close, recompute=recompute)


def test_gradient_checkpointing_keeps_less(tiny: HFEngine) -> None:
    kept = {}
    for recompute in (False, True):
        sizes: list[int] = []

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            shared = SharedPrompts(tiny.model, prompts(tiny), tiny.pad, recompute=recompute)
            shared.logits(range(3), [[7] * 60] * 3)
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False] / 2
