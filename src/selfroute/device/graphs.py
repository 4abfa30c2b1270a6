"""Decoding steps of fixed shapes, which a CUDA GPU replays as one captured graph.

Launched one by one, the kernels of a step take longer than their work: a model of 36 layers has hundreds. In a step of
fixed shapes every address stays, so that its kernels are recorded once and launched together. Without a GPU the same
step runs as it is written; so the tests see it.

The graph and the buffers live as long as one batch of `HFEngine.generate`, and only the graph of the current number of
rows. Capturing takes about as long as two steps launched one by one, little against the hundreds that follow; in
return the update has all the memory, and no graph can outlive what it reads: weights that an optimizer moves in place
as much as weights that loading or an adapter puts elsewhere.

Axes: B rows, T tokens, L positions in the buffers, V vocabulary.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from selfroute.device.prefix import SharedPrompts, keeps_all, scales_positions
from selfroute.errors import DeviceError

SMALLEST = 32
"""Batches of up to so many rows stay as they are: reading the weights takes most of their time."""
ALIGNED = 64
"""Buffers hold a multiple of so many positions, as fast attention kernels want them."""


def has_fixed_shapes(model: PreTrainedModel) -> bool:
    """Whether a decoding step of the model does the same whatever the lengths are.

    Not so with sliding windows and other layers that keep more or less than one key and value a token, positions that
    are scaled by the length, kernels that take lengths in place of a mask, and quantized weights, whose kernels may
    do as they like.
    """
    config = model.config.get_text_config()
    return bool(
        getattr(model, "_can_compile_fullgraph", False)
        and config._attn_implementation in ("sdpa", "eager")
        and keeps_all(model)
        and not scales_positions(model)
        and getattr(model.config, "quantization_config", None) is None
    )


class StaticSteps:
    """The model over buffers of fixed shape, a token a step; see `decode.Steps`.

    Args:
        model: one that `has_fixed_shapes`.
        shared: the prompts, without their last tokens.
        index_B: which prompt each row continues.
        room: most steps.
    """

    def __init__(self, model: PreTrainedModel, shared: SharedPrompts, index_B: Tensor, room: int) -> None:
        self.model, self.rows = model, len(index_B)
        self.captures = index_B.device.type == "cuda"
        width = shared.mask.shape[1]
        positions = -(-(width + room) // ALIGNED) * ALIGNED
        self.slot = torch.tensor([width], device=index_B.device)
        self.cache = copy.copy(shared.cache)
        self.cache.layers = [_FixedLayer(layer, index_B, positions, self.slot) for layer in shared.cache.layers]
        filled_BT = shared.mask.index_select(0, index_B)
        self.ids_B1 = torch.zeros_like(filled_BT[:, :1])
        self.positions_B1 = filled_BT.sum(-1, keepdim=True)
        keys = self.cache.layers[0].keys
        self.mask_B11L = keys.new_full((self.rows, 1, 1, positions), -torch.inf)
        self.mask_B11L[:, 0, 0, :width].masked_fill_(filled_BT.bool(), 0)
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV: Tensor = keys.new_empty(0)

    def logits(self, last_B: Tensor) -> Tensor:
        """The logits after each row's last token, (B, V); on a GPU, the next step overwrites them.

        Raises:
            DeviceError: the step cannot be captured.
        """
        self.ids_B1.copy_(last_B[:, None])
        if not self.captures:
            return self._step()
        if self._graph is None:
            # Libraries set themselves up in the first step of a shape, which must not be captured.
            if not self._warm:
                self._warm = True
                return self._aside()
            self._graph = self._capture()
        self._graph.replay()
        return self._logits_BV

    def fit(self, live: int) -> int:
        """Halves the rows while all that are not over fit in: each number of rows has a graph of its own.

        So at most half of the rows that run are over, or at most `SMALLEST` run.
        """
        size = self.rows
        while size > SMALLEST and -(-size // 2) >= live:
            size = -(-size // 2)
        return size

    def keep(self, rows_B: Tensor) -> None:
        self.rows = len(rows_B)
        self._warm, self._graph = False, None
        for layer in self.cache.layers:
            layer.reorder_cache(rows_B)
        self.ids_B1, self.positions_B1, self.mask_B11L = (
            _moved(x, rows_B) for x in (self.ids_B1, self.positions_B1, self.mask_B11L)
        )

    def _step(self) -> Tensor:
        """What is captured: everything it reads and writes is a buffer."""
        self.mask_B11L.index_fill_(-1, self.slot, 0)
        logits_BTV: Tensor = self.model(
            input_ids=self.ids_B1,
            attention_mask=self.mask_B11L,
            position_ids=self.positions_B1,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.slot += 1
        self.positions_B1 += 1
        return logits_BTV[:, -1]

    def _aside(self) -> Tensor:
        """A step on the stream that will capture the next."""
        device = self.slot.device
        side = _side_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            logits_BV = self._step()
        torch.cuda.current_stream(device).wait_stream(side)
        return logits_BV

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph, device = torch.cuda.CUDAGraph(), self.slot.device
        try:
            # Other threads may use the GPU meanwhile, such as the one that watches over the processes' messages.
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, stream=_side_stream(device), capture_error_mode="thread_local"),
            ):
                self._logits_BV = self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DeviceError(
                f"a decoding step of {type(self.model).__name__} cannot be captured: {str(error).splitlines()[0]} "
                "(device.graphs=false decodes without)"
            ) from error
        return graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all batches: matrix products keep a workspace for each stream that they ever ran on."""
    return torch.cuda.Stream(device)


def _moved(x: Tensor, rows_B: Tensor) -> Tensor:
    """These rows, moved to the first places of the same memory."""
    first = x[: len(rows_B)]
    first.copy_(x.index_select(0, rows_B))
    return first


class _FixedLayer(DynamicLayer):
    """A cache layer of fixed size, all of which is attended to, under the mask."""

    def __init__(self, layer: DynamicLayer, index_B: Tensor, positions: int, slot: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.slot = slot
        self.keys, self.values = (_stretched(x, index_B, positions) for x in (layer.keys, layer.values))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(-2, self.slot, key_states)
        self.values.index_copy_(-2, self.slot, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.keys, self.values = _moved(self.keys, beam_idx), _moved(self.values, beam_idx)


def _stretched(x: Tensor, index_B: Tensor, positions: int) -> Tensor:
    """The rows' keys or values in more positions; zeros, since a mask does not hide what is not a number."""
    _, heads, length, width = x.shape
    wide = x.new_zeros((len(index_B), heads, positions, width))
    wide[..., :length, :] = x.index_select(0, index_B)
    return wide
