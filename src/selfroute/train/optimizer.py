"""AdamW for weights of any precision: an update of 1e-6 is lost on a half-precision weight, so it falls on a copy."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class MasterAdamW(torch.optim.AdamW):
    """AdamW on a float32 copy of each half-precision weight, which then takes the copy's value, rounded.

    Gradients are added up in the copy as they are made, in float32. A weight in float32 or float64 is its own master.
    """

    def __init__(self, weights: Iterable[torch.nn.Parameter], **settings: Any) -> None:
        self.weights = list(weights)
        self.masters: list[Tensor] = [
            w if w.dtype in (torch.float32, torch.float64) else w.detach().float().requires_grad_()
            for w in self.weights
        ]
        super().__init__(self.masters, **settings)
        for weight, master in self._copied().values():
            weight.register_post_accumulate_grad_hook(partial(_hand_over, master))

    def _copied(self) -> dict[int, tuple[torch.nn.Parameter, Tensor]]:
        """The weights with a copy of their own, by their place."""
        pairs = enumerate(zip(self.weights, self.masters, strict=True))
        return {index: (weight, master) for index, (weight, master) in pairs if master is not weight}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            for weight, master in self._copied().values():
                weight.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with the masters."""
        made = super().state_dict()
        for index, (_, master) in self._copied().items():
            made["state"][index] = {**made["state"].get(index, {}), "master": master.detach()}
        return made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            KeyError: the state is of weights in another precision.
        """
        state = {index: dict(entry) for index, entry in state_dict["state"].items()}
        copied = self._copied()
        with torch.no_grad():
            for index, (_, master) in copied.items():
                master.copy_(state[index].pop("master"))
        if any("master" in entry for entry in state.values()):
            raise KeyError("master")
        super().load_state_dict({**state_dict, "state": {index: entry for index, entry in state.items() if entry}})


def _hand_over(master: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None
