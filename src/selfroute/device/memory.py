"""What training a device model will take of memory, worked out before its weights are loaded.

Weights, gradients and the optimizer's state are exact; activations and the caches are estimates from the model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import psutil
import torch
from transformers import AutoModelForCausalLM

from selfroute.device.base import DeviceConfig, LoRA
from selfroute.device.head import MAX_LOGITS
from selfroute.device.load import adapter_of, cannot_load, check_layers, model_config, model_path, place

PROMPT_TOKENS = 256
"""A prompt's length for the estimate, in tokens."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of training a device model."""

    weights: int
    gradients: int
    optimizer: int
    kv_cache: int
    activations: int
    logits: int

    @property
    def held(self) -> int:
        """What stays from the first update on; exact."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The larger of sampling's and the update's."""
        return self.held + self.logits + max(self.kv_cache, self.activations)

    def __str__(self) -> str:
        parts = ", ".join(f"{f.name.replace('_', ' ')} {gigabytes(getattr(self, f.name))}" for f in fields(self))
        return f"about {gigabytes(self.peak)} at most ({parts})"


def gigabytes(count: int) -> str:
    """
    >>> gigabytes(3_400_000_000)
    '3.4 GB'
    """
    return f"{count / 1e9:.1f} GB"


def estimate(
    device: DeviceConfig, *, responses: int, prompts: int, max_tokens: int, micro_batch_tokens: int, recompute: bool
) -> Memory:
    """The memory of training.

    Args:
        device: the model, its precision and adapters.
        responses: how many are sampled at a time.
        prompts: those of a batch, which the update runs at once.
        max_tokens: token limit of a response.
        micro_batch_tokens: response tokens in one forward pass of the update.
        recompute: whether activations are computed again (`gradient_checkpointing`).

    Raises:
        DeviceError: the model's config cannot be read.
    """
    try:
        config = model_config(device.model)
        check_layers(config)
        # Shapes alone, no weights.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise cannot_load(device.model, error) from error
    shape = config.get_text_config()
    width = torch.finfo(getattr(torch, device.dtype)).bits // 8
    weights = sum(p.numel() for p in model.parameters())
    saved = _saved_in_4_bits(model, width) if device.quantize else 0
    lora, adapters = adapter_of(model_path(device.model)) or device.lora, 0
    trained, trained_width = weights, width
    if lora is not None:
        # peft keeps adapters in float32 where the weights are in half precision.
        trained, trained_width = _adapter_size(model, lora), max(4, width)
        adapters = trained * trained_width
    # Adam's two moments, and a float32 copy where the weights have half precision; gradients gather in it.
    exact = max(4, trained_width)
    optimizer = trained * exact * (2 if trained_width >= 4 else 3)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    keys_values = 2 * heads * head_dim
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    kept = 6 * shape.hidden_size + keys_values + 4 * inner
    layers = shape.num_hidden_layers
    token = layers * shape.hidden_size + kept if recompute else layers * kept
    # Tokens are drawn in double precision.
    drawn = responses * shape.vocab_size * (4 + 8)
    updated = 3 * 4 * min(MAX_LOGITS, micro_batch_tokens * shape.vocab_size)
    return Memory(
        weights=weights * width - saved + adapters,
        gradients=trained * exact,
        optimizer=optimizer,
        kv_cache=layers * keys_values * width * responses * (PROMPT_TOKENS + max_tokens),
        activations=token * width * (micro_batch_tokens + prompts * PROMPT_TOKENS),
        logits=max(drawn, updated),
    )


IN_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: an 8-bit scale serves 64 of them, and a float32 one 256 scales."""


def _saved_in_4_bits(model: torch.nn.Module, width: int) -> int:
    """Bytes that 4-bit linear layers do without; the output layer, embeddings, norms and biases stay as they are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return int(sum(layer.weight.numel() for layer in layers) * (width - IN_4_BITS))


def _adapter_size(model: torch.nn.Module, lora: LoRA) -> int:
    """Weights of the adapters that peft makes."""
    targets = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    head = model.get_output_embeddings()  # type: ignore[operator]
    adapted = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and (layer is not head if targets == ("all-linear",) else any(f".{name}".endswith(f".{t}") for t in targets))
    ]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in adapted)


def free_memory(device: DeviceConfig) -> int:
    """Bytes that are free where the model will run."""
    if place(device) == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)
