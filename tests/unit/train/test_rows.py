"""Rows of the update, on an output layer that hands its states through as logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selfroute.protocol import DecisionPoint
from selfroute.train.rows import Row, log_odds, row_log_probs


def same(states: Tensor) -> Tensor:
    return states


def odds(logits_TV: Tensor, row: Row) -> Tensor:
    states_BTH = logits_TV[None]
    [found] = log_odds(same, states_BTH, [row], row_log_probs(same, states_BTH, [row]))
    return found


def test_the_odds_of_a_decision_by_hand() -> None:
    # Four tokens of probability 1/8, 1/2, 1/4, 1/8 at each of three places.
    logits_TV = torch.tensor([0.125, 0.5, 0.25, 0.125]).log().repeat(3, 1).requires_grad_()
    point = DecisionPoint((1,), help=2, answer=3)
    answered = odds(logits_TV, Row(0, (0, 1, 3), 0.0, 0.1, 2, point))
    assert answered.item() == pytest.approx(math.log(0.25 / 0.125))
    # Cut after token 0: asking there takes tokens 1 and 2, of probability 1/2 * 1/4, against everything else.
    cut = odds(logits_TV, Row(0, (0, 1, 2), 0.0, 0.1, 2, point, boundary=1))
    assert cut.item() == pytest.approx(math.log(0.125 / 0.875))
    cut.backward()
    assert logits_TV.grad is not None
    # d log(p / (1 - p)) = d log p / (1 - p): the place before the boundary is not touched.
    expected = [[0.0] * 4, [-0.125, 0.5, -0.25, -0.125], [-0.125, -0.5, 0.75, -0.125]]
    assert torch.allclose(logits_TV.grad * 0.875, torch.tensor(expected))


def test_the_odds_of_a_certain_help_call_are_finite() -> None:
    logits_TV = torch.tensor([[0.0, 200.0], [0.0, 200.0]]).requires_grad_()
    found = odds(logits_TV, Row(0, (1, 1), 0.0, 0.1, 1, DecisionPoint((1,), help=1, answer=0), boundary=0))
    found.backward()
    assert math.isfinite(found.item())
    assert logits_TV.grad is not None
    assert torch.isfinite(logits_TV.grad).all()


def test_each_row_counts_its_own_tokens() -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(3, 4, 8, dtype=torch.float64)
    point = DecisionPoint((4,), help=5, answer=6)
    rows = [
        Row(0, (1, 4, 6), 1.0, 0.1, 2, point),
        Row(0, (1, 4, 6), 0.0, 0.1, 2, point),
        Row(0, (1, 2, 4, 5), 0.0, 0.1, 3, point, boundary=2),
    ]
    log_BTV = logits_BTV.log_softmax(-1)
    whole = log_BTV[0, 0, 1] + log_BTV[0, 1, 4] + log_BTV[0, 2, 6]
    asked = log_BTV[2, 2, 4] + log_BTV[2, 3, 5]
    assert torch.allclose(row_log_probs(same, logits_BTV, rows), torch.stack([whole, torch.zeros_like(whole), asked]))


@pytest.mark.parametrize("prefix", [(), (4,)])
def test_where_help_was_forbidden_it_has_no_probability(prefix: tuple[int, ...]) -> None:
    """Tokens 5 asks and 6 answers, at once or behind a 4."""
    torch.manual_seed(0)
    point = DecisionPoint(prefix, help=5, answer=6)
    logits_BTV = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    rows = [Row(0, (1, 4, 6), advantage=1.0), Row(0, (1, 4, 5), 0.0, 0.1, 2, point, boundary=2)]
    found_B = row_log_probs(same, logits_BTV, rows, (point,))
    masked_TV = logits_BTV[0].clone()
    masked_TV[[2] if prefix else [0, 1, 2], 5] = -torch.inf
    expected = masked_TV.log_softmax(-1)[range(3), [1, 4, 6]].sum()
    assert found_B[0].item() == pytest.approx(expected.item(), rel=1e-12)
    # A help call that was not drawn keeps its probability.
    assert found_B[1].item() == pytest.approx(logits_BTV[1, 2].log_softmax(-1)[5].item(), rel=1e-12)
    # In the model's own thinking nothing was.
    free_B = row_log_probs(same, logits_BTV, rows, (point,), lambda row, t: row is rows[0])
    plain = logits_BTV[0].log_softmax(-1)[range(3), [1, 4, 6]].sum()
    assert free_B[0].item() == pytest.approx(plain.item(), rel=1e-12)
    # The help call's logit has no part in the gradient, and the policy's score is zero on average.
    [gradient_BTV] = torch.autograd.grad(found_B[0], logits_BTV)
    assert gradient_BTV[0, 2, 5] == 0
    assert gradient_BTV[0, 2, 6] > 0
    chances_V = masked_TV[2].softmax(-1)
    total_V = torch.zeros(8, dtype=torch.float64)
    for v in [v for v in range(8) if v != 5]:
        drawn = row_log_probs(same, logits_BTV, [Row(0, (1, 4, v), 1.0), rows[1]], (point,))[0]
        [gradient_BTV] = torch.autograd.grad(drawn, logits_BTV)
        total_V += chances_V[v].detach() * gradient_BTV[0, 2]
    assert torch.allclose(total_V, torch.zeros(8, dtype=torch.float64), atol=1e-12)
