"""Tokens drawn from the model's distribution, each response's from a stream of uniforms of its own.

Axes: R responses, B rows (responses still decoded), T tokens, V vocabulary, N blocks of it, K tokens of
a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 1024
"""Most tokens whose probabilities are added up one by one."""


def uniforms(stream: str, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) of the stream called `stream` (float64)."""
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def drawn(weights_V: Tensor, uniform: float) -> int:
    """One token by its weight (float64)."""
    cumulative_V = weights_V.cumsum(-1)
    token = torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True)
    return min(int(token), len(weights_V) - 1)


class Draws:
    """Draws by the inverse of the distribution function, in float64.

    A response's uniforms come from its name and its token's index alone, and float64 keeps the rounding of one batch
    or another from moving a draw.
    """

    def __init__(self, streams: Sequence[str], max_tokens: int, device: torch.device) -> None:
        # An mps device has no double precision.
        self.device = torch.device("cpu") if device.type == "mps" else device
        drawn = np.stack([uniforms(stream, max_tokens) for stream in streams])
        self.uniforms_RT = torch.from_numpy(drawn).to(self.device)
        # Kept from token to token: with a large vocabulary, making it costs more than filling it.
        self._weights = torch.empty(0, dtype=torch.float64, device=self.device)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these responses alone."""
        self.uniforms_RT = self.uniforms_RT[torch.tensor(list(rows), device=self.device)]

    def join(self, other: Draws) -> None:
        """Go on with another's responses behind these."""
        count = max(self.uniforms_RT.shape[1], other.uniforms_RT.shape[1])
        both = self.uniforms_RT, other.uniforms_RT
        # The zeros are never drawn from: they are beyond a response's limit.
        self.uniforms_RT = torch.cat([pad(x_RT, (0, count - x_RT.shape[1])) for x_RT in both])

    def __call__(
        self,
        logits_BV: Tensor,
        top_B: Tensor,
        temperature: float | Tensor,
        rows_B: Tensor,
        index_B: Tensor,
        top_p_B1: Tensor | None = None,
    ) -> Tensor:
        """A token for each row, (B,): the first v with sum_{w<=v} p_w > u.

        The vocabulary is cut into blocks: the sums of blocks tell which one u falls into, and only there the
        probabilities are added up one by one. With 150,000 tokens that takes a fifth of the time.

        Args:
            logits_BV: finite, or minus infinity for what cannot be drawn.
            top_B: the largest of each row.
            temperature: above 0, for all rows or for each, (B, 1) float64.
            rows_B: which response each row is.
            index_B: the index of the token in it.
            top_p_B1: draw from the likeliest tokens that have so much probability together (float64; None: from all).
        """
        size, vocabulary = logits_BV.shape
        block = min(vocabulary, BLOCK)
        blocks = -(-vocabulary // block)
        if self._weights.shape[-1] != blocks * block or len(self._weights) < size:
            # The end of the last block has no token and keeps its zeros.
            self._weights = self._weights.new_zeros((size, blocks * block))
        weights_BV = self._weights[:size]
        p_BV = weights_BV[:, :vocabulary]
        p_BV.copy_(logits_BV).sub_(top_B.to(self.device)[:, None])
        if isinstance(temperature, Tensor) or temperature != 1:
            p_BV.div_(temperature)
        p_BV.exp_()
        if top_p_B1 is not None:
            p_BV.masked_fill_(_beyond(p_BV, top_p_B1), 0)
        rows_B, index_B = rows_B.to(self.device), index_B.to(self.device)
        u_B1 = self.uniforms_RT[rows_B, index_B.clamp_max(self.uniforms_RT.shape[1] - 1)][:, None]
        if blocks == 1:
            upto_BV = weights_BV.cumsum(-1)
            token_B1 = _first_above(upto_BV, u_B1 * upto_BV[:, -1:])
        else:
            parts_BNK = weights_BV.view(size, blocks, block)
            sums_BN = parts_BNK.sum(-1)
            upto_BN = sums_BN.cumsum(-1)
            target_B1 = u_B1 * upto_BN[:, -1:]
            n_B1 = _first_above(upto_BN, target_B1)
            target_B1 = target_B1 - (upto_BN - sums_BN).gather(1, n_B1)
            part_BK = parts_BNK[torch.arange(size, device=self.device), n_B1[:, 0]]
            token_B1 = n_B1 * block + _first_above(part_BK.cumsum(-1), target_B1)
        return token_B1[:, 0].to(logits_BV.device)


def _beyond(p_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """Tokens that are not among the likeliest that have `top_p` of the weight together, (B, V); of 1, none.

    The likeliest always stays (nucleus sampling, arXiv:1904.09751).
    """
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    upto_BV = sorted_BV.cumsum(-1)
    beyond_BV = (upto_BV - sorted_BV >= top_p_B1 * upto_BV[:, -1:]) & (top_p_B1 < 1)
    beyond_BV[:, 0] = False
    return torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)


def _first_above(upto_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first index whose running sum is above the target, (B, 1); the last that adds anything if rounding lets none
    be."""
    last_B1 = torch.searchsorted(upto_BN, upto_BN[:, -1:].contiguous())
    return torch.searchsorted(upto_BN, target_B1, right=True).minimum(last_B1)
