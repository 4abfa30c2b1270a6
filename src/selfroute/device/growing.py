"""Decoding steps over a cache that grows by a token a step: for any model, on any device, with rows that come and go.

Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selfroute.device.prefix import SharedPrompts


class GrowingSteps:
    """The model over rows that continue their prompts; see `decode.Steps`."""

    def __init__(self, model: PreTrainedModel, shared: SharedPrompts, index_B: Tensor, room: int) -> None:
        self.model = model
        self.cache = shared.expand(index_B)
        for n, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[n] = GrowingLayer(layer, room)
        self.mask_BT = shared.mask.index_select(0, index_B)

    def logits(self, last_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=1)
        logits_BTV: Tensor = self.model(
            input_ids=last_B[:, None],
            attention_mask=self.mask_BT,
            position_ids=self.mask_BT.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits_BTV[:, -1]

    def fit(self, live: int) -> int:
        return most_live(len(self.mask_BT), live)

    def take_back(self, row: int, count: int) -> None:
        """Forget a row's last tokens: the cache keeps their places, which nothing sees any more."""
        self.mask_BT[row, self.mask_BT.shape[1] - count :] = 0

    def keep(self, rows_B: Tensor) -> None:
        self.mask_BT = self.mask_BT[rows_B]
        for layer in self.cache.layers:
            layer.reorder_cache(rows_B)

    def join(self, other: GrowingSteps) -> None:
        """Go on with another's rows behind these, all aligned at their ends."""
        width = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask_BT, other.mask_BT)]
        self.mask_BT = torch.cat(masks)
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            _hold(layer, _joined(layer.keys, joining.keys), _joined(layer.values, joining.values), width)

    def trim(self) -> None:
        """Forget places before the first token of any row."""
        unused = int(self.mask_BT.any(0).byte().argmax())
        if unused:
            self.mask_BT = self.mask_BT[:, unused:]
            width = self.mask_BT.shape[1]
            for layer in self.cache.layers:
                _hold(layer, layer.keys[..., -width:, :], layer.values[..., -width:, :], width)


def most_live(rows: int, live: int) -> int:
    """How many of some rows to go on with: leaving out those that are over copies the cache, so it waits until they are
    an eighth, which bounds the work on them."""
    return live if (rows - live) * 8 >= rows else rows


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Keys or values of both, aligned at their ends.

    Zeros before them, since a mask does not hide what is not a number.
    """
    length = max(a.shape[-2], b.shape[-2])
    return torch.cat([pad(x, (0, 0, length - x.shape[-2], 0)) for x in (a, b)])


def _hold(layer: DynamicLayer, keys: Tensor, values: Tensor, width: int) -> None:
    """Put other keys and values into a layer; rows have `width` places, of which a window may hold only the last."""
    if isinstance(layer, GrowingLayer):
        layer.hold(keys, values)
        return
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy with room for more positions, which are not cleared: nothing reads them before they are written."""
    *outer, length, width = x.shape
    roomy = x.new_empty((*outer, length + room, width))
    roomy[..., :length, :] = x
    return roomy


class GrowingLayer(DynamicLayer):
    """A cache layer with room for the whole response, written in place: no copy of the cache a token."""

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[-2]
        self._keys, self._values = (_with_room(x, room) for x in (layer.keys, layer.values))
        self._view()

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Go on from these, without room, which `update` makes."""
        self.length, self._keys, self._values = keys.shape[-2], keys, values
        self._view()

    def _view(self) -> None:
        self.keys, self.values = self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            # A row that took tokens back, or that joined others, goes on past the room that was made.
            self._keys, self._values = (_with_room(x, end) for x in (self._keys, self._values))
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        self.length = end
        self._view()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._keys, self._values = self._keys.index_select(0, beam_idx), self._values.index_select(0, beam_idx)
        self._view()
