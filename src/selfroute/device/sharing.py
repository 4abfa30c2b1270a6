"""Decoding steps whose rows share the keys and values of what all their prompts begin with, under a growing cache of
their own for the rest.

The shared part is attended to in one matrix product for all rows, and is not copied to them. In place of many small
products, that takes a CPU less time. Source: Hydragen, arXiv:2402.05099, section 3, with one softmax over both parts.

Axes: B rows, C tokens that all prompts begin with, R positions of the rest of a prompt, T of these and a row's own
tokens, K key-value heads, Q query heads for each of them, D width of a head, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from selfroute.device.growing import GrowingLayer, GrowingSteps, most_live
from selfroute.device.prefix import SharedPrompts

ATTENTION = "selfroute_sharing"
"""The name under which transformers finds `_attend`."""


class SharingSteps:
    """The model over rows that share a beginning, a token a step; see `decode.Steps`.

    Args:
        model: one that `can_share`.
        shared: the prompts, without their last tokens.
        index_B: which prompt each row continues.
        room: most steps.
    """

    def __init__(self, model: PreTrainedModel, shared: SharedPrompts, index_B: Tensor, room: int) -> None:
        self.model = model
        begin = shared.common
        beginnings = [[x[0, :, :begin] for x in (layer.keys, layer.values)] for layer in shared.cache.layers]
        # Copies, since a view would hold on to every prompt's.
        self._beginnings = [(keys_KCD.mT.contiguous(), values_KCD.clone()) for keys_KCD, values_KCD in beginnings]
        self._position_B = shared.mask.sum(-1)[index_B]
        filled_BR = shared.mask[index_B, begin:]
        self._bias_BR = torch.zeros_like(filled_BR, dtype=torch.float32).masked_fill(filled_BR == 0, -torch.inf)
        self.cache = copy.copy(shared.cache)
        self.cache.layers = []
        for layer in shared.cache.layers:
            rest = copy.copy(layer)
            rest.keys, rest.values = (x[:, :, begin:].index_select(0, index_B) for x in (layer.keys, layer.values))
            self.cache.layers.append(GrowingLayer(rest, room))

    def logits(self, last_B: Tensor) -> Tensor:
        with _attention_of(self.model):
            logits_BTV: Tensor = self.model(
                input_ids=last_B[:, None],
                position_ids=self._position_B[:, None],
                past_key_values=self.cache,
                use_cache=True,
                steps=self,
            ).logits
        self._position_B = self._position_B + 1
        return logits_BTV[:, -1]

    def fit(self, live: int) -> int:
        return most_live(len(self._position_B), live)

    def keep(self, rows_B: Tensor) -> None:
        self._position_B, self._bias_BR = self._position_B[rows_B], self._bias_BR[rows_B]
        for layer in self.cache.layers:
            layer.reorder_cache(rows_B)

    def attend(self, layer: int, query_BHD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
        """What each row's scaled query finds in the beginning and in what is its own, (B, heads, D)."""
        keys_KDC, values_KCD = self._beginnings[layer]
        query_BKQD = query_BHD.unflatten(1, (len(keys_KDC), -1))
        own_BKQT = query_BKQD @ key_BKTD.mT
        own_BKQT[..., : self._bias_BR.shape[1]] += self._bias_BR[:, None, None]
        asked_BKQN = torch.cat([_of_all(query_BKQD, keys_KDC), own_BKQT], dim=-1)
        weight_BKQC, weight_BKQT = asked_BKQN.softmax(-1).split([keys_KDC.shape[-1], own_BKQT.shape[-1]], dim=-1)
        found_BKQD: Tensor = _of_all(weight_BKQC, values_KCD) + weight_BKQT @ value_BKTD
        return found_BKQD.flatten(1, 2)


@torch.no_grad()
def can_share(model: PreTrainedModel) -> bool:
    """Whether rows that share a beginning have the logits that they have by themselves.

    Not so where attention is more than queries, keys and values, with sinks, caps or biases of its own. What a model's
    configuration does not tell, a few tokens do; in half precision they cannot, so that the answer would change with
    the weights, and a resumed run might decode in another way.
    """
    config = model.config.get_text_config()
    exact = model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)
    if not exact or config._attn_implementation != "sdpa" or config.vocab_size < 5:
        return False
    shared = SharedPrompts(model, [[0, 1, 2, 3, 4], [0, 1, 3, 2]], pad=0, least=1)
    if not shared.common:
        return False
    index_B = torch.tensor([0, 1, 0])
    try:
        alone, together = (steps(model, shared, index_B, 2) for steps in (GrowingSteps, SharingSteps))
        return all(
            torch.allclose(together.logits(last_B), alone.logits(last_B), rtol=1e-3, atol=1e-3)
            for last_B in (index_B, index_B + 1)
        )
    except (TypeError, RuntimeError):
        # Models that do not tell their layers of the steps, or that cache something else than keys and values.
        return False


def _of_all(rows_BKQX: Tensor, shared_KXY: Tensor) -> Tensor:
    """The products of all rows with what they share, as one for each head, (B, K, Q, Y)."""
    rows, queries = rows_BKQX.shape[0], rows_BKQX.shape[2]
    product_KNY = rows_BKQX.transpose(0, 1).flatten(1, 2) @ shared_KXY
    product_KBQY: Tensor = product_KNY.unflatten(1, (rows, queries))
    return product_KBQY.transpose(0, 1)


def _attend(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    *,
    steps: SharingSteps,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, of one token a row: (B, 1, heads, D)."""
    query_BHD = query_BHTD[:, :, 0] * (query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling)
    assert isinstance(module.layer_idx, int)
    return steps.attend(module.layer_idx, query_BHD, key_BKTD, value_BKTD)[:, None], None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def _attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's layers call `_attend`; transformers makes no mask for it, and none is needed.

    Another thread must not use the model meanwhile.
    """
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
