"""Shared prompts against whole sequences: the same gradient, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from selfroute.device.prefix import SharedPrompts


def assert_the_gradient_of_whole_sequences(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rows: Sequence[list[int]],
    pad: int,
    *,
    close: float,
    recompute: bool = False,
) -> None:
    """One row a prompt; `close` is relative to each weight's largest gradient."""
    shared = SharedPrompts(model, prompts, pad, recompute=recompute)
    logits_BTV, targets_BT, mask_BT = shared.logits(range(len(rows)), rows)
    log_prob_BT = torch.log_softmax(logits_BTV, -1).gather(-1, targets_BT[..., None])[..., 0]
    (log_prob_BT * mask_BT).sum().backward()
    shared.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    for prompt, row in zip(prompts, rows, strict=True):
        logits_TV = model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
        torch.log_softmax(logits_TV, -1).gather(-1, torch.tensor(row)[:, None]).sum().backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(whole) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in whole.items():
        assert torch.allclose(ours[name], gradient, rtol=0, atol=close * float(gradient.abs().max())), name
