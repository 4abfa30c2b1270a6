"""What a device engine is asked for: which model, and how to sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from selfroute.config import Config


class LoRA(Config):
    """Train low-rank adapters in place of the model's weights."""

    rank: int = Field(16, ge=1)
    """Rank of each adapter."""
    alpha: int = Field(32, ge=1)
    """The adapter's output is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get one, by the ends of their names, such as `["q_proj", "v_proj"]`; all but the output layer."""


class DeviceConfig(Config):
    """The on-device model."""

    model: str = "countdown-1m"
    """A shipped model, a local folder, or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the weights in memory. A half-precision model is trained through a copy in float32."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where it runs; `auto` takes the first of these that is there."""
    lora: LoRA | None = None
    """Adapters to train; None trains every weight."""
    graphs: bool = True
    """On a CUDA GPU, decode by replaying captured graphs where the model allows it; false where capturing fails."""
    quantize: Literal["4bit"] | None = None
    """QLoRA: the linear layers below the adapters are loaded in 4 bits; needs bitsandbytes."""
    thinking: bool = False
    """Whether a model whose chat template can think before it answers (Qwen3, SmolLM3) does."""

    @model_validator(mode="after")
    def _quantized_below_adapters(self) -> DeviceConfig:
        if self.quantize and self.lora is None:
            raise ValueError("quantized weights are not trained: set lora, such as device.lora={rank=16}")
        if self.quantize and self.dtype == "float64":
            raise ValueError("quantized weights do not compute in float64")
        return self


class Sampling(Config):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0)
    """Softmax temperature; 0 is greedy. Training needs 1."""
    max_tokens: int = Field(256, ge=1)
    """Token limit of a response, the end token included."""
    batch_size: int = Field(512, ge=1)
    """Responses decoded together; changes speed, memory and rounding only."""
    decide: Literal["sample", "threshold"] = "sample"
    """At the decision point: draw from the model's odds, or ask exactly when l + bias > 0."""
    bias: float = 0.0
    """The budget dial, in nats, added to l under `threshold`."""
    forbid_help: bool = False
    """Never emit the help call (the help tag has probability 0 at the decision point)."""
    early_exit: bool = False
    """Help calls may come before there is an answer: one that is forbidden, or that the dial declines, goes on from
    before the tag as if it could not have come there, in place of answering. In training this is what teaches them."""
