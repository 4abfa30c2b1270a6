"""Group-adaptive policy gradient (arXiv:2509.24050, sections 3.3 and 3.3.2) and the decision loss: pure tensor maths.

Nothing here samples, calls a cloud or touches a model, so that a test can enumerate it. The methods that it is compared
with differ from it in an advantage rule and a selection rule alone (`algorithms`).

Axes: P problems, G responses a problem, B rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor


def advantages(rewards_PG: Tensor) -> Tensor:
    """Leave-one-out advantages: A_i = G / (G - 1) * (r_i - mean r), (P, G).

    Averaged over a group's G responses, A_i * grad log pi(y_i) is 1/(G-1) * sum_i (r_i - mean r) grad log pi(y_i): the
    unbiased estimator. Not divided by the standard deviation, which would make a group that is solved alone and one
    that is solved by the cloud look alike.
    """
    G = rewards_PG.shape[1]
    if G < 2:
        raise ValueError("a group needs at least 2 responses")
    # Equal rewards give exactly zero, whatever the mean's rounding.
    spread_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal_P1, torch.zeros_like(spread_PG), spread_PG * (G / (G - 1)))


@dataclass(frozen=True, slots=True)
class Selection:
    """The problems that an update learns from, as sorted indices.

    Of `kept`, `d1` teaches solving and `d2` teaches asking.
    """

    d1: tuple[int, ...]
    d2: tuple[int, ...]
    kept: tuple[int, ...]


def select(
    correct_PG: Sequence[Sequence[bool]],
    cloud_correct_P: Sequence[bool | None],
    *,
    budget: float,
    rule: Literal["any_correct", "mixed"],
    rng: random.Random,
) -> Selection:
    """Adaptive prompt filtering: D1, and a random part of D2 with |D2| <= rho * |D1|, rho = budget / (1 - budget).

    Args:
        correct_PG: whether each local answer is correct; a help call is not.
        cloud_correct_P: the cloud's verdict; None where it was not needed.
        budget: share of problems that may go to the cloud, in [0, 1]; the bound is exact (0.45 and 33 give 27).
        rule: D1 holds the problems with a correct local answer, or those with both correct and other responses.
        rng: draws the part of D2.
    """
    d1, d2 = [], []
    for p, (correct_G, cloud_correct) in enumerate(zip(correct_PG, cloud_correct_P, strict=True)):
        if any(correct_G):
            if rule == "any_correct" or not all(correct_G):
                d1.append(p)
        elif cloud_correct:
            d2.append(p)
    share = Fraction(str(budget))
    if share < 1:
        most = math.floor(share / (1 - share) * len(d1))
        if len(d2) > most:
            d2 = sorted(rng.sample(d2, most))
    return Selection(tuple(d1), tuple(d2), tuple(sorted(d1 + d2)))


def decision_gap(answer_reward: float, *, cloud_score: float | None, cloud_share: float, cloud_reward: float) -> float:
    """Delta = what asking would have paid less what not asking paid; positive where asking pays.

    Args:
        answer_reward: r_ans, the full reward of the answer; 0 for a response cut at the token limit.
        cloud_score: the score of the cloud's answer to the problem, None if it was not asked.
        cloud_share: q, the mean score of the cloud's answers so far; stands in for a missing one.
        cloud_reward: alpha_c.
    """
    expected = cloud_share if cloud_score is None else cloud_score
    return cloud_reward * expected - answer_reward


def early_gap(
    earned: float, *, cloud_score: float | None, cloud_share: float, cloud_reward: float, token_cost: float, saved: int
) -> float:
    """Delta of asking before the end: token_cost * saved - max(0, r - alpha_c * q).

    Asking there saves tokens, and loses what the response went on to earn above a help call. One that went on to earn
    less could still have asked at its end, so going on is worth max(r, alpha_c * q).

    Args:
        earned: r, the response's reward without the price of its tokens.
        cloud_score: as in `decision_gap`.
        cloud_share: as in `decision_gap`.
        cloud_reward: alpha_c.
        token_cost: the price of a token.
        saved: the response's tokens from there on, less those of a help call.
    """
    lost = -decision_gap(earned, cloud_score=cloud_score, cloud_share=cloud_share, cloud_reward=cloud_reward)
    return token_cost * saved - max(0.0, lost)


def policy_loss(log_prob_B: Tensor, advantage_B: Tensor, count: int) -> Tensor:
    """-sum_i A_i log pi(y_i) / count, with log pi summed over a response's tokens and count = |D1 u D2| * G."""
    return -(advantage_B * log_prob_B).sum() / count


def declined_loss(asking_B: Tensor, weight_B: Tensor, count: int) -> Tensor:
    """sum_b w_b log(1 - P_b) / count, with log P_b the log-probability of a help call that could not be made there.

    What a response was drawn from has 1 / (1 - P) times the model's own probability of going on at each place where it
    would have asked, so its log-probability is the tokens' less log(1 - P) for each such place.
    """
    return (weight_B * torch.log(-torch.expm1(asking_B.clamp_max(-1e-6)))).sum() / count


def decision_loss(log_odds_B: Tensor, gap_B: Tensor, weight: float, count: int) -> Tensor:
    """weight / count * sum |Delta| softplus(-sign(Delta) * l), with l the log-odds of asking at the decision point.

    Both outcomes of an answered decision are known, so its gradient does not need a help call to have been sampled and
    does not vanish with p(help). Its optimum is p / (1 - p) = (mass of positive Delta) / (mass of negative Delta).
    """
    per_row_B = gap_B.abs() * torch.nn.functional.softplus(-gap_B.sign() * log_odds_B)
    return weight * per_row_B.sum() / count
