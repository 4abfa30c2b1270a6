"""The in-process engine: any Hugging Face causal LM, sampled with one prefill a problem.

A problem's prompt runs once for all its responses; finished rows leave the batch. Each response draws its uniforms
from a stream of its own, named by the caller, so that what it samples does not depend on its batch mates. Left out on
purpose: beams, top-k and top-p (training needs the model's own distribution).

Axes: P prompts, G responses, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as hf_logging

from selfroute.device.base import DeviceConfig, LoRA, Sampling
from selfroute.device.draws import Redraws, uniforms
from selfroute.device.prefix import SharedPrompts
from selfroute.errors import DeviceError, DivergenceError
from selfroute.protocol import DecisionPoint, decision_points, find_decision
from selfroute.types import Message, Response


class HFEngine:
    """A model and its tokenizer; `generate` samples, `model` is what training updates."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        self.model, self.tokenizer, self.thinking = model, tokenizer, thinking
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
        return cls(model, tokenizer, thinking=config.thinking)

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
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """Sample `len(streams[p])` responses for each prompt; a stream's name fixes that response's randomness.

        Args:
            prompts: token ids of P prompts.
            streams: for each prompt, a name for each response.
            sampling: temperature, limits, and what may be decided.
            starts: for each prompt, tokens that its responses begin with (they count towards `max_tokens`).
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
            for begin in range(0, len(names), sampling.batch_size):
                part = slice(begin, begin + sampling.batch_size)
                first = owners[part][0]
                used = prompts[first : owners[part][-1] + 1]
                begins = [list(starts[p]) if starts else [] for p in owners[part]]
                local = [p - first for p in owners[part]]
                flat += _Decoder(self, used, local, begins, names[part], sampling).run(progress)
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


class _Decoder:
    """One batch of rows, decoded together: the state of `HFEngine.generate`."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        starts: Sequence[list[int]],
        names: Sequence[str],
        sampling: Sampling,
    ) -> None:
        self.engine, self.sampling = engine, sampling
        device = engine.model.device
        rows = len(names)
        if any(starts):
            # Rows that begin with tokens of their own share nothing beyond them.
            prompts = [[*prompts[owner], *start] for owner, start in zip(owners, starts, strict=True)]
            owners = range(rows)
        shared = SharedPrompts(engine.model, prompts, engine.pad)
        index = torch.tensor(list(owners), device=device)
        self.cache = shared.expand(index)
        for n, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[n] = _GrowingLayer(layer, sampling.max_tokens)
        self.mask = shared.mask.index_select(0, index)
        self.last = torch.tensor([prompts[owner][-1] for owner in owners], device=device)
        self.alive = torch.arange(rows, device=device)
        self.tokens: list[list[int]] = [list(start) for start in starts]
        self.scores: list[dict[int, float]] = [{} for _ in names]
        # An mps device has no double precision, in which tokens are drawn.
        exact = "cpu" if device.type == "mps" else device
        self.redraws = Redraws(engine.points, names, sampling) if sampling.early_exit else None
        draws = self.redraws.draws if self.redraws else sampling.max_tokens
        self.uniforms = torch.from_numpy(np.stack([uniforms(n, draws) for n in names])).to(exact)

    def run(self, progress: Callable[[int], None] | None) -> list[Response]:
        model, sampling = self.engine.model, self.sampling
        ends = torch.tensor(sorted(self.engine.end_tokens), device=model.device)
        done = torch.zeros(len(self.tokens), dtype=torch.bool, device=model.device)
        finished = [False] * len(self.tokens)
        while len(self.alive):
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            logits_BV = model(
                input_ids=self.last[:, None],
                attention_mask=self.mask,
                position_ids=self.mask.sum(-1, keepdim=True) - 1,
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
            self.last = self._choose(logits_BV.float(), ~done)
            rows, chosen, over = self.alive.tolist(), self.last.tolist(), done.tolist()
            newly = 0
            for row, token, was_over in zip(rows, chosen, over, strict=True):
                if not was_over:
                    self.tokens[row].append(token)
                    finished[row] = token in self.engine.end_tokens
                    newly += finished[row] or len(self.tokens[row]) >= sampling.max_tokens
            lengths = torch.tensor([len(self.tokens[row]) for row in rows], device=model.device)
            done = done | torch.isin(self.last, ends) | (lengths >= sampling.max_tokens)
            if progress and newly:
                progress(newly)
            # Compacting copies the cache, so it waits until an eighth of the batch is over: the bound on wasted rows.
            if int(done.sum()) * 8 >= len(self.alive):
                keep = (~done).nonzero()[:, 0]
                self.alive, self.last, self.mask = self.alive[keep], self.last[keep], self.mask[keep]
                done = done[keep]
                if len(keep):
                    for layer in self.cache.layers:
                        layer.reorder_cache(keep)
        return [self._response(row, finished[row]) for row in range(len(self.tokens))]

    def _choose(self, logits_BV: Tensor, live_B: Tensor) -> Tensor:
        """The next token of each row, (B,). Decisions follow `sampling.decide` and the dial."""
        sampling = self.sampling
        rows = self.alive.tolist()
        # Rows that stand at a decision point, under each form of it.
        deciding: list[tuple[DecisionPoint, list[int]]] = []
        for point in self.engine.points:
            if point.prefix:
                here = [b for b, row in enumerate(rows) if point.ends(self.tokens[row])]
                if here:
                    deciding.append((point, here))
            else:
                deciding.append((point, list(range(len(rows)))))
        pairs = [(point, here, (logits_BV[here, point.help] - logits_BV[here, point.answer]).tolist())
                 for point, here in deciding]  # fmt: skip
        redraws = self.redraws
        if sampling.forbid_help and redraws is None:
            for point, here, _ in pairs:
                logits_BV[here, point.help] = -torch.inf
        if not torch.isfinite(logits_BV.logsumexp(-1)).all():
            raise DivergenceError("the model's logits are not finite")
        if sampling.temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            exact = self.uniforms.device
            probability_BV = torch.softmax(logits_BV.to(exact).double() / sampling.temperature, dim=-1)
            taken_back = redraws.taken_back if redraws else [0] * len(self.tokens)
            step = torch.tensor([len(self.tokens[row]) + taken_back[row] for row in rows], device=exact)
            draw_B = self.uniforms[self.alive.to(exact), step.clamp_max(self.uniforms.shape[1] - 1)]
            cumulative_BV = probability_BV.cumsum(-1)
            draw_B = draw_B * cumulative_BV[:, -1]
            token_B = torch.searchsorted(cumulative_BV, draw_B[:, None], right=True)[:, 0]
            token_B = token_B.clamp_max(logits_BV.shape[-1] - 1).to(logits_BV.device)
        declined = set()
        for point, here, scores in pairs:
            for b, score in zip(here, scores, strict=True):
                row, token = rows[b], int(token_B[b])
                if token not in (point.help, point.answer) or not live_B[b] or b in declined:
                    continue
                if redraws:
                    score = redraws.odds(row, self.tokens[row], point, logits_BV[b])
                self.scores[row][len(self.tokens[row])] = score
                by_dial = sampling.decide == "threshold"
                asks = not sampling.forbid_help and (score + sampling.bias > 0 if by_dial else token == point.help)
                if redraws and token == point.help and not asks:
                    declined.add(b)
                    token_B[b], back = redraws.go_on(row, self.tokens[row], point, logits_BV[b])
                    # The cache keeps the places of what was taken back, which nothing sees any more.
                    self.mask[b, self.mask.shape[1] - back :] = 0
                else:
                    token_B[b] = point.help if asks else point.answer
        if redraws:
            for b, (row, token) in enumerate(zip(rows, token_B.tolist(), strict=True)):
                redraws.note(row, len(self.tokens[row]), token, logits_BV[b])
        return token_B

    def _response(self, row: int, finished: bool) -> Response:
        ids = self.tokens[row]
        found = find_decision(ids, self.engine.points, self.engine.tokenizer) if finished else None
        index = found[0] if found else None
        score = self.scores[row].get(index) if index is not None else None
        if self.redraws:
            # The dial asks at the first that it does not decline, so the highest says whether it asks.
            score = max(self.scores[row].values(), default=None)
        return Response(self.engine.decode(ids), tuple(ids), finished, score, index)


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy with room for more positions, which are not cleared: nothing reads them before they are written."""
    *outer, length, width = x.shape
    roomy = x.new_empty((*outer, length + room, width))
    roomy[..., :length, :] = x
    return roomy


class _GrowingLayer(DynamicLayer):
    """A cache layer with room for the whole response, written in place: no copy of the cache a token."""

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[-2]
        self._keys, self._values = (_with_room(x, room) for x in (layer.keys, layer.values))
        self._view()

    def _view(self) -> None:
        self.keys, self.values = self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            # A row that took tokens back goes on past the room that was made.
            self._keys, self._values = (_with_room(x, end) for x in (self._keys, self._values))
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        self.length = end
        self._view()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._keys, self._values = self._keys.index_select(0, beam_idx), self._values.index_select(0, beam_idx)
        self._view()


def shipped_models() -> list[str]:
    """Names of the models in the package."""
    folder = resources.files("selfroute") / "models"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("_"))


def model_path(name: str) -> str:
    """Where a model named in a config lives: in the package, or where the name says (a local folder or a hub id)."""
    return str(resources.files("selfroute") / "models" / name) if name in shipped_models() else name
