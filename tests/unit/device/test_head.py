"""Log-probabilities a part at a time, and what models do to their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.checkpoints import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selfroute.device.head import Head, log_probs
from selfroute.errors import DeviceError


def model(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": 60, "bos_token_id": 1, **settings})
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    return made


def test_parts_give_what_the_whole_gives() -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    states = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets, forbidden = torch.tensor([0, 8, 3, 3, 1, 7, 2]), [(1, 4), (5, 0), (5, 1)]
    logits = states @ weight.T
    mask = torch.zeros_like(logits)
    for n, v in forbidden:
        mask[n, v] = -torch.inf
    expected = (logits + mask).log_softmax(-1)[range(7), targets]
    gradients = torch.autograd.grad(expected.sum(), [weight, states])
    most = 0

    def head(x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(x) * 9)
        return x @ weight.T

    for limit, bound in ((10**6, 63), (27, 27), (1, 9)):
        most = 0
        found = log_probs(head, states, targets, forbidden, max_logits=limit)
        assert torch.allclose(found, expected, rtol=1e-12)
        ours = torch.autograd.grad(found.sum(), [weight, states])
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, gradients, strict=True))
        assert most == bound


def test_few_logits_are_kept_for_the_backward_pass() -> None:
    head = torch.nn.Linear(4, 1000, bias=False)
    states, targets = torch.randn(64, 4, requires_grad=True), torch.arange(64)
    kept: dict[int, int] = {}
    for limit in (64_000, 4_000):
        sizes: list[int] = []

        def note(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            log_probs(head, states, targets, max_logits=limit)
        kept[limit] = sum(sizes)
    assert kept[64_000] >= 64_000
    assert kept[4_000] < 8_000


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("phi", {}),
        ("gemma2", {"final_logit_softcapping": 0.05}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_the_head_gives_the_models_logits(kind: str, settings: dict[str, Any]) -> None:
    made = model(kind, **settings)
    ids = torch.tensor([[5, 9, 30, 31, 2]])
    output = made(ids, output_hidden_states=True)
    assert torch.allclose(Head(made)(output.hidden_states[-1]), output.logits, rtol=1e-9)


def test_a_head_that_is_not_known_is_refused() -> None:
    made = model("llama")
    plain = made.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + 1
        return output

    made.forward = other  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="changes its logits"):
        Head(made)
