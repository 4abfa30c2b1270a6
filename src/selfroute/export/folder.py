"""A run's device model as a folder for other engines: merged weights, tokenizer, settings, and a model card.

Left out on purpose: putting it anywhere but on this machine's disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import GenerationConfig

from selfroute.config import validate
from selfroute.device.base import DeviceConfig, Sampling
from selfroute.device.hf import SAME_DAY, end_tokens
from selfroute.device.load import load_model
from selfroute.errors import ExportError
from selfroute.export.card import card
from selfroute.protocol import ANSWER_CLOSE, ANSWER_OPEN, HELP_CALL
from selfroute.records import read_json, results, write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from selfroute.export.gguf import Kind

Format = Literal["hf", "gguf"]
"""A Hugging Face folder (transformers, vLLM, MLX), or a GGUF file (llama.cpp, Ollama, LM Studio)."""


def export(
    run: Path,
    checkpoint: str,
    settings: Mapping[str, Any],
    *,
    to: Format,
    kind: Kind = "f16",
    best: bool = False,
    out: Path | None = None,
) -> Path:
    """Write a checkpoint's model into a folder of its own, whole or not at all; returns what an engine loads.

    Args:
        run: the run directory.
        checkpoint: its name there.
        settings: the run's, whole; how it was evaluated becomes the engines' default.
        to: what is written.
        kind: how a GGUF keeps the matrices.
        best: whether the checkpoint is the best one, whose measures are in RUN/best.
        out: the folder; default RUN/exports/CHECKPOINT-hf or the like.

    Raises:
        ExportError: the folder is in use, or the model is not of those that can be written.
        DeviceError: the checkpoint cannot be loaded.
    """
    variant = to if to == "hf" else kind
    out = out or results(run, best=best) / "exports" / f"{checkpoint}-{variant}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is not an empty folder: give another --out")
    name = f"{run.resolve().name}-{checkpoint}"
    device = validate(DeviceConfig, settings["device"], "the run's device")
    sampling = Sampling(**{key: settings["evaluation"][key] for key in Sampling.model_fields})
    model, tokenizer = merged(device.model_copy(update={"model": str(run / "checkpoints" / checkpoint)}))
    check_tags(tokenizer)
    tokenizer.chat_template = as_trained(tokenizer.get_chat_template(), thinking=device.thinking)
    building = out.with_name(f".building-{out.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        if to == "gguf":
            from selfroute.export import gguf

            file = f"{name}-{kind}.gguf"
            gguf.write(building / file, model, tokenizer, kind, name=f"{name} {kind}", sampling=sampling)
        else:
            file = ""
            model.generation_config = sampling_defaults(model, tokenizer, sampling)
            model.save_pretrained(building)
            if not sampling.temperature:
                # vLLM goes by the temperature alone, and transformers does not write one that it would not use.
                defaults = building / "generation_config.json"
                write_json(defaults, {**read_json(defaults), "temperature": 0.0})
            tokenizer.save_pretrained(building)
            # safetensors writes its file for the owner alone; a server may run as somebody else.
            readable = (building / "config.json").stat().st_mode
            for weights in building.glob("*.safetensors"):
                weights.chmod(readable)
        write_atomic(building / "README.md", card(run, checkpoint, settings, name, file=file, best=best))
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out / file


def merged(config: DeviceConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its adapter, if it has one, added to its weights, and its tokenizer.

    An adapter that was trained on a base in 4 bits is added to that base in the run's precision.
    """
    model, tokenizer = load_model(config.model_copy(update={"device": "cpu", "quantize": None, "lora": None}))
    return (model.merge_and_unload() if hasattr(model, "merge_and_unload") else model), tokenizer


def check_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer to which a tag is no ordinary text: engines leave special tokens out of what they answer.

    Raises:
        ExportError: naming the token.
    """
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for tag in (HELP_CALL, ANSWER_OPEN, ANSWER_CLOSE):
        found = [special[token] for token in tokenizer.encode(tag, add_special_tokens=False) if token in special]
        if found:
            raise ExportError(
                f"the tokenizer has {found[0]!r} as a special token, so that engines would leave it out of {tag!r}: "
                "train with a tokenizer in which it is ordinary text, or an added token that is not special"
            )


def as_trained(template: str, *, thinking: bool) -> str:
    """A chat template that by itself makes the prompts that the model was trained on: its day, and whether it thinks.

    >>> as_trained("{{ messages }}", thinking=False)
    '{{ messages }}'
    """
    day = SAME_DAY if "strftime_now" in template else ""
    says = "true" if thinking else "false"
    think = f"{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {says} %}}{{%- endif %}}"
    return day + (think if "enable_thinking" in template else "") + template


def ordered_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens, the tokenizer's own first."""
    return sorted(end_tokens(model, tokenizer), key=lambda token: (token != tokenizer.eos_token_id, token))


def sampling_defaults(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> GenerationConfig:
    """The run's own sampling as a model's default: its whole distribution, at the run's temperature.

    Made from nothing, since what a base model came with cuts it in ever other ways (`min_p`, penalties).
    """
    ends = ordered_ends(model, tokenizer)
    warm = {"temperature": sampling.temperature, "top_p": 1.0, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=bool(warm),
        max_new_tokens=sampling.max_tokens,
        **warm,
    )
