"""Steps that share what prompts begin with, against a growing cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.checkpoints import engine_of
from tests.unit.device.test_architectures import prompts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from selfroute.device import decode, prefix, sharing
from selfroute.device.base import Sampling
from selfroute.device.decode import Decoder
from selfroute.device.growing import GrowingSteps
from selfroute.device.hf import HFEngine
from selfroute.device.sharing import SharingSteps, can_share
from selfroute.types import Response

WINDOWS = "gemma3_text"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few tokens would not be worth it."""
    monkeypatch.setattr(prefix, "SAVED_TOKENS", 1)


def decoded(engine: HFEngine, steps: decode.NewSteps, temperature: float = 1.0) -> list[Response]:
    """42 rows of three prompts, which end at any of 20 tokens, so that rows leave the batch."""
    owners = [p for p in range(3) for _ in range(14)]
    limits = [1 + n % 20 for n in range(42)]
    engine.steps = steps
    with torch.no_grad():
        asked, names = prompts(engine), [str(n) for n in range(42)]
        rows = Decoder(
            engine, asked, owners, [[]] * 42, names, limits, Sampling(temperature=temperature, max_tokens=20)
        )
        return rows.run(None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_architecture_decodes_as_with_a_growing_cache(tiny: HFEngine, kind: str, temperature: float) -> None:
    assert can_share(tiny.model) == (kind != WINDOWS)
    if kind == WINDOWS:
        return
    expected, found = (decoded(tiny, steps, temperature) for steps in (GrowingSteps, SharingSteps))
    assert len({r.token_ids for r in expected}) > 20 or not temperature
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.text, a.finished, a.score) == (b.text, b.finished, b.score and pytest.approx(b.score, abs=1e-5))


def test_prompts_of_unequal_length_have_the_logits_of_a_growing_cache(tiny: HFEngine, kind: str) -> None:
    asked = [p[: len(p) - n] for n, p in enumerate(prompts(tiny))]
    shared = prefix.SharedPrompts(tiny.model, asked, tiny.pad)
    assert len({len(p) for p in asked}) == 3
    index_B, kept_B = torch.tensor([2, 0, 1, 0]), torch.tensor([3, 2])
    with torch.no_grad():
        alone, together = (new(tiny.model, shared, index_B, 3) for new in (GrowingSteps, tiny.steps))
        assert type(together) is (GrowingSteps if kind == WINDOWS else SharingSteps)
        for last_B in (torch.tensor([5, 9, 30, 31]), torch.tensor([7, 7, 8, 2])):
            assert torch.allclose(together.logits(last_B), alone.logits(last_B), rtol=0, atol=1e-6)
        for steps in (alone, together):
            steps.keep(kept_B)
        last_B = torch.tensor([4, 5])
        assert torch.allclose(together.logits(last_B), alone.logits(last_B), rtol=0, atol=1e-6)


def test_shared_keys_and_values_are_in_no_row(tiny: HFEngine, kind: str) -> None:
    if kind == WINDOWS:
        return
    shared = prefix.SharedPrompts(tiny.model, prompts(tiny), tiny.pad)
    sizes = [new(tiny.model, shared, torch.tensor([0, 1, 2] * 4), 3).cache.get_seq_length()
             for new in (GrowingSteps, SharingSteps)]  # fmt: skip
    assert sizes[0] - sizes[1] == shared.common > 0
    steps = SharingSteps(tiny.model, shared, torch.tensor([0, 1, 2]), 3)
    for layer, kept in zip(shared.cache.layers, steps._beginnings, strict=True):
        whole = layer.keys.nbytes / layer.keys.shape[0] / layer.keys.shape[2] * shared.common
        assert [x.untyped_storage().nbytes() for x in kept] == [whole, whole]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_keys_that_depend_on_the_length_are_not_made_before_it_is_known(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        max_position_embeddings=16, rope_parameters=rope,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    # Longer than 8 with what comes behind the beginning, and shorter without.
    asked = [[1, 2, 3, 4, 5, 6, 7, *rest, 8] for rest in ([10, 11, 12, 13], [20, 21, 22, 23])]
    with torch.no_grad():
        together_BTV, _, _ = prefix.SharedPrompts(model, asked, 0).logits([0, 1], [[5], [5]])
        for b, prompt in enumerate(asked):
            assert torch.allclose(together_BTV[b, 0], _logits(model, prompt), atol=1e-6)


def _logits(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """After a prompt, whose last token opens its row."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt[:-1]]), past_key_values=cache)
    logits_BTV: Tensor = model(torch.tensor([prompt[-1:]]), past_key_values=cache).logits
    return logits_BTV[0, -1]


def small(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A random model whose attention matters."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 99}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | settings)), dtype=dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    found: PreTrainedModel = model
    return found


def test_scores_are_scaled_as_the_model_says() -> None:
    assert can_share(small("granite", attention_multiplier=0.9))


LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "v_head_dim": 8, "first_k_dense_replace": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        # Layers that are not told of the steps; that cache something else than keys and values.
        ("nemotron", {}),
        ("deepseek_v3", LATENT),
        # Places in the cache count: ALiBi, and windows in a cache of all tokens.
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}),
    ],
)
def test_other_models_decode_without_sharing(kind: str, settings: dict[str, Any]) -> None:
    model = small(kind, **settings)
    assert not can_share(model)
    asked = [[1, 2, 3, 4, 5, 6, 7, *rest, 8] for rest in ([10], [20, 21, 22, 23, 24, 25])]
    with torch.no_grad():
        together_BTV, _, _ = prefix.SharedPrompts(model, asked, 0).logits([0, 1], [[5], [5]])
        for b, prompt in enumerate(asked):
            alone_V = model(torch.tensor([prompt])).logits[0, -1]
            assert torch.allclose(together_BTV[b, 0], alone_V, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_share(dtype: torch.dtype) -> None:
    """Its rounding would hide what the check looks for, or look like it."""
    assert can_share(small("llama"))
    assert not can_share(small("llama", dtype))


def test_without_a_beginning_worth_it_rows_have_a_cache_of_their_own(
    tiny: HFEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "SAVED_TOKENS", 1000)
    shared = prefix.SharedPrompts(tiny.model, prompts(tiny), tiny.pad)
    assert type(tiny.steps(tiny.model, shared, torch.tensor([0, 1, 2]), 3)) is GrowingSteps


def test_a_model_whose_attention_is_another_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("llama", torch.float64)
    assert can_share(engine.model)
    # Such as a cap, a sink or a bias, which a model's layers hand over and the shared attention does not know.
    found = SharingSteps.attend
    monkeypatch.setattr(SharingSteps, "attend", lambda *args: found(*args) * 1.1)
    assert not can_share(engine.model)
    monkeypatch.undo()
    eager = AutoModelForCausalLM.from_config(engine.model.config, attn_implementation="eager")
    assert not can_share(eager)
    lost = copy.deepcopy(engine.model)
    with torch.no_grad():
        lost.get_input_embeddings().weight.fill_(torch.nan)
    assert not can_share(lost)


def test_the_models_own_attention_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("llama", torch.float64)
    shared = prefix.SharedPrompts(engine.model, prompts(engine), engine.pad)
    steps = SharingSteps(engine.model, shared, torch.tensor([0, 1]), 3)

    def fails(*args: object) -> Tensor:
        assert engine.model.config._attn_implementation == sharing.ATTENTION
        raise MemoryError

    monkeypatch.setattr(SharingSteps, "attend", fails)
    with pytest.raises(MemoryError):
        steps.logits(torch.tensor([1, 2]))
    assert engine.model.config._attn_implementation == "sdpa"
