"""What a run will take of memory, checked before anything is loaded."""

from __future__ import annotations

import os

from selfroute.device.load import place
from selfroute.device.memory import Memory, estimate, free_memory, gigabytes
from selfroute.errors import DeviceError
from selfroute.train.config import TrainConfig


def memory(config: TrainConfig) -> tuple[Memory, int]:
    """What a run will take, and what is free where it will run, in bytes.

    Raises:
        DeviceError: the model's config cannot be read.
    """
    # Each process samples its share.
    share = -(-config.problems_per_step * config.num_responses // int(os.environ.get("WORLD_SIZE", 1)))
    drawn = [(min(config.sampling.batch_size, share), config.sampling)]
    if config.evaluation.every:
        drawn.append((config.evaluation.batch_size, config.evaluation))
    needed = max(
        (
            estimate(
                config.device,
                responses=responses,
                prompts=config.problems_per_step,
                max_tokens=sampling.max_tokens,
                micro_batch_tokens=config.micro_batch_tokens,
                recompute=config.gradient_checkpointing,
            )
            for responses, sampling in drawn
        ),
        key=lambda found: found.peak,
    )
    free = free_memory(config.device)
    # Processes on one machine's processor share its memory.
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if place(config.device) == "cpu" else 1
    return needed, free // shared_by


def check_memory(config: TrainConfig) -> None:
    """Refuse what cannot fit: weights, gradients and the optimizer's state alone.

    Raises:
        DeviceError: it cannot, or the model's config cannot be read.
    """
    needed, free = memory(config)
    if needed.held > free:
        raise DeviceError(
            f"not enough memory: weights, gradients and the optimizer take {gigabytes(needed.held)} of "
            f"{gigabytes(free)} that are free" + _SMALLER[bool(config.device.lora) + bool(config.device.quantize)]
        )


_SMALLER = (
    " (device.lora={} trains adapters alone)",
    " (device.quantize=4bit loads the weights below the adapters in 4 bits)",
    "",
)
"""The way out for every weight, for adapters, and for adapters on 4-bit weights."""
