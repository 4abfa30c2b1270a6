"""One step through TRL on recorded rollouts; saves the gradient that the optimizer is handed.

python -m tests.trl_replay CONFIG.json ROLLOUTS.json OUT GRADIENT.safetensors
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback

from selfroute.config import validate
from selfroute.train.trl import GAPGTrainer, TRLConfig


class Gradient(TrainerCallback):
    """Keeps the gradient of the first update."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.file.exists() and state.is_world_process_zero:
            grads = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}
            save_file(grads, self.file)


def replay(recorded: dict[str, list[list[int]]], rank: int, size: int) -> Any:
    """A rollout function that gives each question the responses that were recorded for it, in order.

    A rank whose share begins inside a group counts on from there.
    """

    def rollout(prompts: Sequence[Any], trainer: GAPGTrainer) -> dict[str, Any]:
        G = trainer.config.num_responses
        tokenizer = trainer.processing_class
        seen: Counter[str] = Counter()
        first = rank * len(prompts) % G
        output: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for messages in prompts:
            question = messages[-1]["content"]
            if not seen:
                seen[question] = first
            ids = recorded[question][seen[question] % G]
            seen[question] += 1
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            output["prompt_ids"].append(tokenizer.encode(text, add_special_tokens=False))
            output["completion_ids"].append(ids)
            output["logprobs"].append([0.0] * len(ids))
        return output

    return rollout


def main(config_file: str, rollouts_file: str, out: str, gradient: str) -> None:
    from selfroute.train.ranks import Ranks

    config = validate(TRLConfig, json.loads(Path(config_file).read_text()), config_file)
    ranks = Ranks()
    recorded = json.loads(Path(rollouts_file).read_text())
    trainer = GAPGTrainer(config, Path(out), rollout_func=replay(recorded, ranks.rank, ranks.size))
    trainer.add_callback(Gradient(Path(gradient)))
    with trainer.clouds:
        trainer.train()
    trainer.ranks.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
