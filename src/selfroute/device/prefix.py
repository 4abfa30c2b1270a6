"""Prompts run once and shared: rows of the same problem continue from one key-value cache.

Both the sampler (no gradient) and the update (gradient, in two stages) build on it, so the model that is sampled and
the model that is trained go through the same forward pass.

Axes: P prompts, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from selfroute.errors import DeviceError


def pad_left(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask of sequences aligned at their ends, both (B, T) int64."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def pad_right(sequences: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask of sequences aligned at their starts, both (B, T) int64."""
    width = max(map(len, sequences))
    ids = torch.tensor([list(s) + [pad] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


def pack(rows: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, each at most `max_tokens` with padding (or a single row).

    >>> list(pack([[1] * 5, [1], [1] * 4, [1]], max_tokens=10))
    [[1, 3], [2, 0]]
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[index]) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


SAVED_TOKENS = 1024
"""The tokens that must be spared by running by itself what all prompts begin with: a pass of few takes its time too."""


class SharedPrompts:
    """The key-value caches of P prompts, each without its last token, which opens each row instead, so that every logit
    comes from the row's own pass.

    The tokens that all prompts begin with (`common` of them: the template, the instruction) run once, in front of the
    rest, where that spares `least` tokens (None: `SAVED_TOKENS`). With `recompute`, a layer's activations are not kept
    for the backward pass, but computed again in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        pad: int,
        *,
        recompute: bool = False,
        least: int | None = None,
    ) -> None:
        self.model, self.prompts, self.pad, self.recompute = model, prompts, pad, recompute
        rests = [list(p[:-1]) for p in prompts]
        self.common = _common(model, rests, SAVED_TOKENS if least is None else least)
        self.cache = DynamicCache(config=model.config)
        before = torch.ones((1, 0), dtype=torch.long, device=model.device)
        if self.common:
            beginning = torch.tensor([rests[0][: self.common]], device=model.device)
            self.cache, before = self._extend(self.cache, before, beginning, torch.ones_like(beginning))
            rests = [rest[self.common :] for rest in rests]
            self.cache = self.expand(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
        ids, mask = pad_left(rests, pad, model.device)
        self.cache, self.mask = self._extend(self.cache, before.expand(len(prompts), -1), ids, mask)
        self._leaves: list[tuple[Tensor, Tensor]] = []
        if torch.is_grad_enabled():
            for layer in self.cache.layers:
                self._leaves.append((layer.keys, layer.values))
                layer.keys = layer.keys.detach().requires_grad_()
                layer.values = layer.values.detach().requires_grad_()

    def _extend(self, cache: DynamicCache, before: Tensor, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """A cache with more tokens, and the mask of all of it; `before` is that of what it holds."""
        whole = torch.cat([before, mask], dim=1)
        with self._run(cache) as extended:
            self.model(
                input_ids=ids,
                attention_mask=whole,
                position_ids=(whole.cumsum(-1) - 1).clamp_min(0)[:, before.shape[1] :],
                past_key_values=extended,
                use_cache=True,
                logits_to_keep=1,
            )
        return extended, whole

    def expand(self, index: Tensor) -> DynamicCache:
        """The caches of prompts `index` (B,), one a row; the shared ones stay as they are."""
        rows = copy.copy(self.cache)
        rows.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in rows.layers:
            layer.keys = layer.keys.index_select(0, index)
            layer.values = layer.values.index_select(0, index)
        return rows

    def logits(self, index: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits that predict each token of `rows` (B, T, V), the tokens (B, T) and their mask (B, T), bool.

        `index[b]` is the prompt that row b continues.
        """
        output, mask = self._forward(index, rows)
        targets, _ = pad_right(rows, self.pad, self.model.device)
        return output.logits, targets, mask.bool()

    def states(self, index: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """The last hidden states, which predict each token of `rows`, (B, T, hidden size); see `logits`."""
        output, _ = self._forward(index, rows, output_hidden_states=True, logits_to_keep=1)
        states: Tensor = output.hidden_states[-1]
        return states

    def _forward(self, index: Sequence[int], rows: Sequence[Sequence[int]], **kwargs: int) -> tuple[Any, Tensor]:
        device = self.model.device
        which = torch.tensor(list(index), device=device)
        inputs = [[self.prompts[i][-1], *row[:-1]] for i, row in zip(index, rows, strict=True)]
        ids, mask = pad_right(inputs, self.pad, device)
        prompt_mask = self.mask.index_select(0, which)
        positions = prompt_mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=device)
        with self._run(self.expand(which)) as cache:
            output = self.model(
                input_ids=ids,
                attention_mask=torch.cat([prompt_mask, mask], dim=1),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **kwargs,
            )
        return output, mask

    @contextmanager
    def _run(self, cache: DynamicCache) -> Iterator[DynamicCache]:
        """The cache to run the model on; within, layers forget their activations if they are to."""
        if not (self.recompute and torch.is_grad_enabled()):
            yield cache
            return
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise DeviceError(f"{type(self.model).__name__} has no layers that can be computed again")
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield _ReplayedCache(cache)
        finally:
            for layer in layers:
                del layer.forward

    def backward(self) -> None:
        """The second stage: push the gradients that rows left on the shared caches through the prompts' pass."""
        outputs, gradients = [], []
        for (keys, values), layer in zip(self._leaves, self.cache.layers, strict=True):
            for output, leaf in ((keys, layer.keys), (values, layer.values)):
                # With adapters on some modules, the first layers' keys may depend on nothing that is trained.
                if leaf.grad is not None and output.requires_grad:
                    outputs.append(output)
                    gradients.append(leaf.grad)
        if outputs:
            torch.autograd.backward(outputs, gradients)


def keeps_all(model: PreTrainedModel) -> bool:
    """Whether every layer's cache holds a key and a value of every token, and no less."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def scales_positions(model: PreTrainedModel) -> bool:
    """Whether a model's keys depend on how long the whole text is."""
    kinds = [str(getattr(module, "rope_type", "")) for module in model.modules()]
    return any(scaled in kind for kind in kinds for scaled in ("dynamic", "longrope"))


def _common(model: PreTrainedModel, prompts: Sequence[list[int]], least: int) -> int:
    """How many tokens to run once for all prompts; each keeps one at least.

    None where keys depend on the length, which is not known then, and where attention counts places in the cache, as
    windows and ALiBi do: padding comes to stand behind the beginning.
    """
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    count = min(sum(1 for _ in same), min(map(len, prompts)) - 1)
    if count * (len(prompts) - 1) < least:
        return 0
    return count if model._supports_attention_backend and keeps_all(model) and not scales_positions(model) else 0


class _ReplayedCache(DynamicCache):
    """A cache that a recomputing layer may fill twice: each time it begins from what it held at first."""

    def __init__(self, cache: DynamicCache) -> None:
        self.__dict__.update(vars(cache))
        self.before, self.layers = cache.layers, list(cache.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.layers[layer_idx] = copy.copy(self.before[layer_idx])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values
