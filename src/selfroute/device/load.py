"""Where a device model comes from: in the package, a folder or the hub; with adapters; in 4 bits.

What the hub refuses is told with the way out. Left out on purpose: fetching anything but by transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as hf_logging

from selfroute.device.base import DeviceConfig, LoRA
from selfroute.errors import DeviceError
from selfroute.records import checkpoints

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
"""Files one of which every tokenizer has."""

ALIGNED = 64
"""Bytes that torch aligns its own memory to."""


def load_model(config: DeviceConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped model, a folder or a hub id, and its tokenizer; a folder may hold an adapter, which names its base.

    Raises:
        DeviceError: nothing by that name can be loaded, the adapter does not fit, or the device is not there.
    """
    where = model_path(config.model)
    device = place(config)
    fewer_bits = _quantized(config, device)
    hf_logging.disable_progress_bar()
    shape = model_config(config.model)
    check_layers(shape)
    if Path(where).is_dir() and not any((Path(where) / name).is_file() for name in TOKENIZERS):
        raise DeviceError(
            f"cannot load the device model {config.model!r}: the folder has no tokenizer: "
            f"`tokenizer.save_pretrained({where!r})`"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(
            base_of(where), config=shape, dtype=getattr(torch, config.dtype), **fewer_bits
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise cannot_load(config.model, error) from error
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # It would pack 4-bit weights for a kernel that has no gradient, as soon as a response is sampled.
            layer.support_avx512bf16_for_cpu = False
    model = _with_adapter(model, where, config.lora).eval()
    for weight in model.parameters():
        # Where a file's bytes are used as they lie, sums may be rounded otherwise than in torch's own memory, and a
        # resumed run would not equal one that was not.
        if weight.data_ptr() % ALIGNED:
            weight.data = weight.data.clone()
    return model if config.quantize else model.to(device), tokenizer


def model_config(name: str) -> PretrainedConfig:
    """The shape of the model of that name, or of the one below its adapter.

    Raises:
        DeviceError: there is none, or the hub refuses.
    """
    where = model_path(name)
    # A hub id has one slash at most.
    if (where.startswith((".", "/", "~")) or where.count("/") > 1) and not Path(where).is_dir():
        raise DeviceError(f"cannot load the device model {name!r}: no such folder")
    # Nobody who misspells a shipped model is to wait for the hub.
    if not Path(where).exists() and (near := get_close_matches(name, shipped_models(), n=1, cutoff=0.8)):
        raise DeviceError(f"cannot load the device model {name!r}: did you mean {near[0]}?")
    if saved := checkpoints(Path(where)):
        raise DeviceError(f"cannot load the device model {name!r}: it is a run; its newest checkpoint is {saved[-1]}")
    try:
        return AutoConfig.from_pretrained(base_of(where))
    except (OSError, ValueError) as error:
        raise cannot_load(name, error) from error


def check_layers(config: PretrainedConfig) -> None:
    """Refuse a model whose layers keep more than keys and values of their own: rows of one prompt begin from copies.

    Raises:
        DeviceError: it has recurrent layers, or layers that share a cache.
    """
    try:
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    except (AttributeError, KeyError, TypeError, ValueError):
        kinds = {type(None)}
    if config.model_type in ("rwkv", "xlstm") or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise DeviceError(
            f"a {config.model_type} model has layers that keep a state (linear attention, convolutions, Mamba) or "
            "share one, from which responses to one prompt cannot go on here: take one of plain attention, or serve "
            "and evaluate it by URL (see docs/engines.md)"
        )


def cannot_load(name: str, error: Exception) -> DeviceError:
    """Why a model cannot be loaded, and the way out."""
    causes, base = list(_causes(error)), base_of(model_path(name))
    there = f"give a folder, a hub id, or one of the shipped models: {', '.join(shipped_models())}"
    login = "log in with `hf auth login` or set HF_TOKEN"

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # A gated model counts among those that are not found.
    if caused_by(GatedRepoError):
        why = f"it is gated: accept its licence on {constants.ENDPOINT}/{base}, then {login}"
    elif caused_by(RepositoryNotFoundError):
        why = f"{constants.ENDPOINT} has no model {base}, or it is private: {login} ({there})"
    elif caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled):
        why = (
            f"it is not on this machine, and {constants.ENDPOINT} cannot be reached: where it can, run "
            f"`hf download {base} --local-dir FOLDER`, and give that folder as device.model ({there})"
        )
    else:
        why = f"{str(error).splitlines()[0]} ({there})"
    return DeviceError(f"cannot load the device model {name!r}: {why}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _quantized(config: DeviceConfig, device: str) -> dict[str, object]:
    """What `from_pretrained` takes to load linear layers, all but the output layer, in 4 bits.

    NF4, its scales in 8 bits, as QLoRA has it (arXiv:2305.14314). Nothing else is cast: peft's
    `prepare_model_for_kbit_training` would put all that is left into float32, the cache with it, and switch on a
    checkpointing that keeps no cache.
    """
    if config.quantize is None:
        return {}
    if device == "mps":
        raise DeviceError("device.quantize needs a CUDA GPU (device.device=cpu works too, slowly)")
    if find_spec("bitsandbytes") is None:
        raise DeviceError(
            "device.quantize needs bitsandbytes: pip install 'selfroute[qlora]' (in a checkout: pip install '.[qlora]')"
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    where = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": settings, "device_map": {"": where}}


def place(config: DeviceConfig) -> str:
    """The device to run on."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.device if config.device != "auto" else next(name for name, found in there.items() if found)
    if not there[name]:
        raise DeviceError(f"torch finds no {name} device here (device.device=auto takes what is there)")
    if name == "mps" and config.dtype == "float64":
        raise DeviceError("an mps device has no float64: set device.dtype=float32")
    return name


def base_of(where: str) -> str:
    """The model below an adapter's folder; anything else is its own."""
    file = Path(where) / "adapter_config.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]) if file.is_file() else where


def adapter_of(where: str) -> LoRA | None:
    """The shape of the adapter that a folder holds."""
    file = Path(where) / "adapter_config.json"
    if not file.is_file():
        return None
    saved = json.loads(file.read_text(encoding="utf-8"))
    return LoRA(rank=saved["r"], alpha=saved["lora_alpha"], targets=tuple(saved["target_modules"]))


def _with_adapter(model: PreTrainedModel, where: str, lora: LoRA | None) -> PreTrainedModel:
    """The model with the adapter that its folder holds, or with a new one, which changes nothing yet."""
    saved = (Path(where) / "adapter_config.json").is_file()
    if not saved and lora is None:
        return model
    import peft

    with warnings.catch_warnings():
        # peft asks transformers by a name that is going out of use.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            if saved:
                return peft.PeftModel.from_pretrained(model, where, is_trainable=True)
            assert lora is not None
            targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
            settings = peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
            )
            # Half of an adapter begins at random; the same each time, and nobody else's numbers are drawn.
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return peft.get_peft_model(model, settings)
        except (ValueError, RuntimeError) as error:
            raise DeviceError(f"the adapter does not fit the model: {str(error).splitlines()[0]}") from error


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    folder = resources.files("selfroute") / "models"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("_"))


def model_path(name: str) -> str:
    """Where a model named in a config lives: in the package, or where the name says (a local folder or a hub id)."""
    return str(resources.files("selfroute") / "models" / name) if name in shipped_models() else name
