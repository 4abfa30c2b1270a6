"""The output layer by itself: log-probabilities of tokens without the logits of all of them at once.

With a vocabulary of 150,000, the logits of 4,096 tokens and their gradient take 5 GB; a part at a time takes 0.5.

Axes: B rows, T tokens, N chosen tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from selfroute.errors import DeviceError

MAX_LOGITS = 2**26
"""Most logits that exist at a time (256 MB in float32)."""


class Head:
    """What a model makes of its last hidden states: (..., H) -> logits (..., V).

    Raises:
        DeviceError: the model does more to its logits than is known here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layer: Callable[[Tensor], Tensor] = model.get_output_embeddings()
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self.cap = getattr(config, "final_logit_softcapping", None)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[0, 1, 2]], device=model.device), output_hidden_states=True)
            if not torch.allclose(self(output.hidden_states[-1]), output.logits, rtol=1e-3, atol=1e-3):
                raise DeviceError(f"{type(model).__name__} changes its logits in a way that training does not know")

    def __call__(self, states: Tensor) -> Tensor:
        logits = self.layer(states)
        if self.scale != 1:
            logits = logits * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def log_probs(
    head: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    targets_N: Tensor,
    forbidden: Sequence[tuple[int, int]] = (),
    *,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """log p(target) of N tokens, (N,) float32 or the states' float64.

    Logits beyond `max_logits` are computed again in the backward pass, so that no more exist at a time.

    Args:
        head: hidden states to logits.
        states_NH: the states that predict the tokens.
        targets_N: the tokens.
        forbidden: pairs (n, v): token v had probability 0 where token n was drawn.
        max_logits: most logits at a time, N * V.
    """
    if not len(targets_N):
        return states_NH.new_zeros(0, dtype=torch.promote_types(states_NH.dtype, torch.float32))
    where_N, tokens_N = ([pair[i] for pair in forbidden] for i in (0, 1))

    def part(begin: int, end: int) -> Tensor:
        logits_NV = head(states_NH[begin:end])
        if logits_NV.dtype != torch.float64:
            logits_NV = logits_NV.float()
        here = [i for i, n in enumerate(where_N) if begin <= n < end]
        if here:
            logits_NV = logits_NV.clone()
            logits_NV[[where_N[i] - begin for i in here], [tokens_N[i] for i in here]] = -torch.inf
        return -cross_entropy(logits_NV, targets_N[begin:end], reduction="none")

    count, vocabulary = len(targets_N), head(states_NH[:1]).shape[-1]
    size = max(1, max_logits // vocabulary)
    if count <= size:
        return part(0, count)
    # Nothing in it is drawn at random.
    once_more = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    parts = [once_more(begin, min(begin + size, count)) for begin in range(0, count, size)]
    return torch.cat(parts)
