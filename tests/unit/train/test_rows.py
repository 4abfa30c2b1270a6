from __future__ import annotations

import pytest
import torch

from selfroute.protocol import DecisionPoint
from selfroute.train.rows import Row, without_help


@pytest.mark.parametrize("prefix", [(), (4,)])
def test_without_help_is_the_distribution_that_was_drawn_from(prefix: tuple[int, ...]) -> None:
    """Tokens 5 asks and 6 answers, at once or behind a 4."""
    torch.manual_seed(0)
    point = DecisionPoint(prefix, help=5, answer=6)
    logits_BTV = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    rows = [Row(0, (1, 4, 6), advantage=1.0), Row(0, (1, 4, 5), advantage=0.0)]
    masked_BTV = without_help(logits_BTV, rows, (point,))
    decisions = [2] if prefix else [0, 1, 2]
    for t in range(3):
        expected = logits_BTV[0, t].clone()
        if t in decisions:
            expected[5] = -torch.inf
        assert torch.equal(masked_BTV[0, t], expected)
    # A help call that was not drawn keeps its probability.
    assert torch.equal(masked_BTV[1], logits_BTV[1])
    # Summed over the tokens that could be drawn, p grad log p is zero, and the help call's logit has no part in it.
    log_prob_V = torch.log_softmax(masked_BTV[0, 2], -1)
    allowed = [v for v in range(8) if v != 5]
    [gradient_BTV] = torch.autograd.grad((log_prob_V.exp().detach() * log_prob_V)[allowed].sum(), logits_BTV)
    assert torch.allclose(gradient_BTV, torch.zeros_like(gradient_BTV), atol=1e-12)
    [gradient_BTV] = torch.autograd.grad(
        torch.log_softmax(without_help(logits_BTV, rows, (point,)), -1)[0, 2, 6], logits_BTV
    )
    assert gradient_BTV[0, 2, 5] == 0
    assert gradient_BTV[0, 2, 6] > 0
