"""The in-process engine: any Hugging Face causal LM, sampled with one prefill a problem.

How rows are decoded together is in `decode`. Left out on purpose: beams, top-k and top-p (training needs the model's
own distribution).

Axes: P prompts, G responses.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from selfroute.device.base import DeviceConfig, LoRA, Sampling
from selfroute.device.decode import Decoder, steps_for
from selfroute.errors import DeviceError
from selfroute.protocol import DecisionPoint, decision_points
from selfroute.types import Message, Response


class HFEngine:
    """A model and its tokenizer; `generate` samples, `model` is what training updates."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool = False,
        graphs: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.thinking = model, tokenizer, thinking
        self.steps = steps_for(model, graphs=graphs)
        if tokenizer.chat_template is None:
            raise DeviceError("the model's tokenizer has no chat template: use an instruction-tuned checkpoint")
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if ends is not None else tokenizer.eos_token_id
        self.end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        if not self.end_tokens:
            raise DeviceError("the model names no end token: set eos_token_id in its generation_config.json")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.end_tokens)
        self.points: tuple[DecisionPoint, ...] = decision_points(tokenizer)

    @classmethod
    def load(cls, config: DeviceConfig) -> HFEngine:
        """Load a shipped model, a local folder or a hub id; a folder may hold an adapter, which names its base.

        Raises:
            DeviceError: nothing by that name can be loaded, the adapter does not fit, or the device is not there.
        """
        where = model_path(config.model)
        if where.startswith((".", "/", "~")) and not Path(where).is_dir():
            raise DeviceError(f"cannot load the device model {config.model!r}: no such folder")
        device = place(config)
        hf_logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
            base = base_of(where)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, config.dtype))
        except (OSError, ValueError, SafetensorError) as error:
            raise DeviceError(
                f"cannot load the device model {config.model!r}: {str(error).splitlines()[0]} "
                f"(give a folder, a hub id, or one of the shipped models: {', '.join(shipped_models())})"
            ) from error
        model = _with_adapter(model, where, config.lora).eval().to(device)
        return cls(model, tokenizer, thinking=config.thinking, graphs=config.graphs)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, up to where the response begins.

        Raises:
            DeviceError: the chat template refuses the messages.
        """
        text = self.tokenizer.apply_chat_template(
            accepted(self.tokenizer, messages),
            tokenize=False,
            add_generation_prompt=True,
            # Templates of models that do not think leave it unread.
            enable_thinking=self.thinking,
        )
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """A response's text, without its end token."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[Sequence[str]],
        sampling: Sampling,
        *,
        starts: Sequence[Sequence[int]] | None = None,
        limits: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """Sample `len(streams[p])` responses for each prompt; a stream's name fixes that response's randomness.

        Args:
            prompts: token ids of P prompts.
            streams: for each prompt, a name for each response.
            sampling: temperature, limits, and what may be decided.
            starts: for each prompt, tokens that its responses begin with (they count towards `max_tokens`).
            limits: for each prompt, a token limit of each response, up to `max_tokens`.
            progress: called with the number of responses that finished since the last call.

        Returns:
            P lists of responses, in order.

        Raises:
            DivergenceError: the model's logits are not finite.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            flat: list[Response] = []
            counts = [len(s) for s in streams]
            names = [name for group in streams for name in group]
            owners = [p for p, count in enumerate(counts) for _ in range(count)]
            most = [n for group in limits for n in group] if limits else [sampling.max_tokens] * len(names)
            for begin in range(0, len(names), sampling.batch_size):
                part = slice(begin, begin + sampling.batch_size)
                first = owners[part][0]
                used = prompts[first : owners[part][-1] + 1]
                begins = [list(starts[p]) if starts else [] for p in owners[part]]
                local = [p - first for p in owners[part]]
                flat += Decoder(self, used, local, begins, names[part], most[part], sampling).run(progress)
        finally:
            self.model.train(was_training)
        groups, position = [], 0
        for count in counts:
            groups.append(flat[position : position + count])
            position += count
        return groups


def accepted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as a chat template takes them: where it refuses a system message, that heads the user's.

    Raises:
        DeviceError: the chat template refuses them all the same.
    """
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        tokenizer.apply_chat_template(plain, tokenize=False)
    except TemplateError as error:
        if [m["role"] for m in plain[:2]] != ["system", "user"]:
            raise DeviceError(f"the model's chat template refuses the prompt: {error}") from error
        merged = {"role": "user", "content": f"{plain[0]['content']}\n\n{plain[1]['content']}"}
        return accepted(tokenizer, [merged, *plain[2:]])
    return plain


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
