"""Asking before the end: what it is worth, its loss and its gradient, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from selfroute.protocol import DecisionPoint
from selfroute.train import gapg
from selfroute.train.rows import Row, asking_log_probs, log_odds, row_log_probs


def gap(earned: float, cloud_correct: bool | None, saved: int = 50, token_cost: float = 0.002) -> float:
    return gapg.early_gap(
        earned, cloud_score=cloud_correct, cloud_share=0.8, cloud_reward=0.25, token_cost=token_cost, saved=saved
    )


def test_what_asking_early_is_worth() -> None:
    # Went on to solve it: 50 tokens saved, 1.02 - 0.25 * 0.8 lost.
    assert gap(1.02, None) == pytest.approx(0.1 - 0.82)
    assert gap(1.02, True) == pytest.approx(0.1 - 0.77)
    assert gap(1.02, False) == pytest.approx(0.1 - 1.02)
    # Went on to fail, or to ask at the end: nothing is lost.
    assert gap(0.02, True) == gap(0.0, None) == gap(0.25, True) == pytest.approx(0.1)
    # A wrong answer in good form earns more than a wrong cloud.
    assert gap(0.02, False) == pytest.approx(0.1 - 0.02)
    # At no price nothing speaks for it, and an answer of three tokens is shorter than a help call of eleven.
    assert gap(0.0, True, token_cost=0.0) == 0
    assert gap(1.02, True, token_cost=0.0) == pytest.approx(-0.77)
    assert gap(0.0, True, saved=-8) == pytest.approx(-0.016)


def test_the_loss_of_two_early_exits_and_its_gradient() -> None:
    """Tokens 0..3 have probability 1/8, 1/2, 1/4, 1/8 everywhere; 1 opens the tag, 2 asks: 1/8 in all, l = -log 7."""
    logits_BTV = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log().repeat(2, 3, 1).requires_grad_()
    point = DecisionPoint((1,), help=2, answer=3)
    # One went on to solve it after 10 tokens, one failed after 60; they weigh 0.5 and 1.5.
    solved = 0.5 * gap(1.02, True, saved=10)
    failed = 1.5 * gap(0.02, True, saved=60)
    assert (solved, failed) == pytest.approx((0.5 * -0.75, 1.5 * 0.12))
    rows = [Row(0, (0, 1, 2), 0.0, g, 2, point, boundary=1) for g in (solved, failed)]

    def same(states: torch.Tensor) -> torch.Tensor:
        return states

    log_prob_B = row_log_probs(same, logits_BTV, rows)
    loss = gapg.decision_loss(
        log_odds(same, logits_BTV, rows, log_prob_B), torch.tensor([solved, failed]), weight=10.0, count=16
    )
    # softplus(l) = log(1 + 1/7) where it loses, softplus(-l) = log(1 + 7) where it pays.
    by_hand = 10 / 16 * (0.375 * math.log(8 / 7) + 0.18 * math.log(8))
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    assert logits_BTV.grad is not None
    # d loss / dl = 10/16 * 0.375 * 1/8 and -10/16 * 0.18 * 7/8; dl = d log P / (1 - P), P = 1/8.
    for grad_TV, at_l in zip(logits_BTV.grad, (0.375 / 8, -0.18 * 7 / 8), strict=True):
        scale = 10 / 16 * at_l * 8 / 7
        expected = [[0.0] * 4, [-0.125, 0.5, -0.25, -0.125], [-0.125, -0.5, 0.75, -0.125]]
        assert torch.allclose(grad_TV, scale * torch.tensor(expected, dtype=torch.float64), rtol=1e-5)


def test_the_odds_of_asking_tend_to_what_is_won_over_what_is_lost() -> None:
    """Three responses go through a place: one solves it on 2 places in all, two fail on 4; each is drawn evenly and
    weighs its number of places, so that at this one they count alike."""
    solves, fails = gap(1.02, True, saved=20), gap(0.02, True, saved=80)
    chances = torch.tensor([1 / 2, 1 / 4, 1 / 4], dtype=torch.float64)
    gaps = torch.tensor([2 * solves, 4 * fails, 4 * fails], dtype=torch.float64)
    odds = torch.tensor(math.log(2 * fails / -solves), dtype=torch.float64, requires_grad=True)
    terms = [gapg.decision_loss(odds[None], g[None], 1.0, 1) for g in gaps]
    (torch.stack(terms) * chances).sum().backward()
    assert odds.grad is not None
    assert abs(odds.grad.item()) < 1e-12


def test_what_a_response_without_help_was_drawn_from() -> None:
    """Where help was forbidden and the response went on, the policy's gradient is that of the distribution it was drawn
    from: at each place, all but the help call, over what that leaves; one early place stands for both."""
    torch.manual_seed(0)
    point = DecisionPoint((1,), help=5, answer=4)
    # Token 2 breaks a line. States predict each token, and at the early places what comes behind a tag opened there.
    tokens = (0, 2, 3, 2, 3, 2, 1, 4, 0)
    logits_TV = torch.randn(len(tokens), 6, dtype=torch.float64, requires_grad=True)
    opened_PV = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    places, last = (2, 4), 6

    log_p = logits_TV.log_softmax(-1)
    log_q = log_p[range(len(tokens)), tokens].sum()
    for place, behind_V in [*zip(places, opened_PV, strict=True), (last, logits_TV[last + 1])]:
        asks = log_p[place, 1].exp() * behind_V.softmax(-1)[5]
        log_q = log_q - torch.log(1 - asks)
    # The last place by the rule that tokens are drawn by: what opens the tag, and behind it all but help.
    p, behind = log_p[last].exp(), logits_TV[last + 1].softmax(-1)
    others = p * torch.where(torch.arange(6) == 1, 1 - behind[5], 1.0)
    by_rule = (others[1] / others.sum()).log() + (behind[4] / (1 - behind[5])).log()
    assert (by_rule - (log_p[last, 1] + log_p[last + 1, 4] - torch.log(1 - p[1] * behind[5]))).abs() < 1e-12

    advantage, count = 0.7, 4
    wanted = torch.autograd.grad(-advantage * log_q / count, (logits_TV, opened_PV))

    def same(states: torch.Tensor) -> torch.Tensor:
        return states

    losses = []
    for place, behind_V in zip(places, opened_PV, strict=True):
        rows = [
            Row(0, tokens, advantage, 0.1, last + 1, point, declined=advantage),
            Row(0, (*tokens[:place], 1, 5), 0.0, 0.1, place + 1, point, boundary=place, declined=2 * advantage),
        ]
        branch = torch.cat([logits_TV[: place + 1], behind_V[None], logits_TV[place + 2 :]])
        states_BTH = torch.stack([logits_TV, branch])
        log_prob_B = row_log_probs(same, states_BTH, rows)
        asking_D = asking_log_probs(same, states_BTH, rows, log_prob_B)
        weights = torch.tensor([row.declined for row in rows])
        policy = gapg.policy_loss(log_prob_B, torch.tensor([row.advantage for row in rows]), count)
        losses.append(policy + gapg.declined_loss(asking_D, weights, count))
    found = torch.autograd.grad(sum(losses) / 2, (logits_TV, opened_PV))
    assert all(torch.allclose(f, w, rtol=1e-6) for f, w in zip(found, wanted, strict=True))
