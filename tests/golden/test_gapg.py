"""GAPG's estimator, filter and decision loss against hand-computed values and gradients."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfroute.train import gapg
from selfroute.train.algorithms import ALGORITHMS
from selfroute.train.reward import RewardConfig, reward
from selfroute.types import Answer, HelpCall


def test_advantages_are_leave_one_out() -> None:
    got = gapg.advantages(torch.tensor([[1.1, 0.25, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64))
    # r_1 - mean of the others: 1.1 - 0.15, 0.25 - 1.3/3, 0.1 - 1.45/3
    expected = [1.1 - 0.15, 0.25 - 1.3 / 3, 0.1 - 1.45 / 3, 0.1 - 1.45 / 3]
    assert got[0].tolist() == pytest.approx(expected)
    assert got[1].tolist() == [0.0] * 4


def test_equal_rewards_are_exactly_zero_despite_rounding() -> None:
    assert gapg.advantages(torch.full((1, 7), 0.1, dtype=torch.float64)).eq(0).all()


def test_one_response_is_no_group() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        gapg.advantages(torch.ones(3, 1))


YES, NO = [True, True], [False, False]
MIXED = [True, False]


def pick(
    correct: list[list[bool]], cloud: list[bool | None], budget: float, rule: str = "any_correct"
) -> gapg.Selection:
    return gapg.select(correct, cloud, budget=budget, rule=rule, rng=random.Random(0))  # type: ignore[arg-type]


def test_d1_and_d2_under_both_rules() -> None:
    correct = [YES, MIXED, NO, NO, MIXED, YES, MIXED]
    cloud = [None, True, True, False, None, None, None]
    assert pick(correct, cloud, 0.3) == gapg.Selection((0, 1, 4, 5, 6), (2,), (0, 1, 2, 4, 5, 6))
    assert pick(correct, cloud, 0.3, "mixed") == gapg.Selection((1, 4, 6), (2,), (1, 2, 4, 6))
    assert pick(correct, cloud, 0.3).kept == (0, 1, 2, 4, 5, 6)


def test_the_floor_is_exact() -> None:
    # 9/11 * 33 = 27 exactly; in floats 0.45 / 0.55 * 33 is 26.999...
    correct = [YES] * 33 + [NO] * 40
    cloud: list[bool | None] = [None] * 33 + [True] * 40
    assert 0.45 / (1 - 0.45) * 33 < 27
    assert len(pick(correct, cloud, 0.45).d2) == 27
    # 3/7 * 5 = 2.14
    assert len(pick([YES] * 5 + [NO] * 9, [None] * 5 + [True] * 9, 0.3).d2) == 2


def test_empty_d1_leaves_nothing_and_empty_d2_leaves_d1() -> None:
    assert pick([NO, NO], [True, True], 0.3) == gapg.Selection((), (), ())
    assert pick([YES, NO], [None, False], 0.3) == gapg.Selection((0,), (), (0,))
    assert pick([NO], [None], 0.3) == gapg.Selection((), (), ())
    assert pick([], [], 0.3).kept == ()


def test_budget_ends() -> None:
    assert pick([YES, NO, NO], [None, True, True], 0.0).d2 == ()
    assert pick([YES, NO, NO], [None, True, True], 1.0).d2 == (1, 2)


def test_the_draw_of_d2_follows_its_rng() -> None:
    correct = [YES] * 10 + [NO] * 30
    cloud: list[bool | None] = [None] * 10 + [True] * 30
    draws = {gapg.select(correct, cloud, budget=0.3, rule="any_correct", rng=random.Random(s)).d2 for s in range(20)}
    assert len(draws) > 10
    assert pick(correct, cloud, 0.3) == pick(correct, cloud, 0.3)


@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=2, max_size=3), st.booleans())), st.integers(0, 99))
def test_the_bound_holds_for_any_batch(batch: list[tuple[list[bool], bool]], percent: int) -> None:
    got = pick([c for c, _ in batch], [cloud for _, cloud in batch], percent / 100)
    assert len(got.d2) * (100 - percent) <= percent * len(got.d1)
    assert not set(got.d1) & set(got.d2)
    assert all(not any(batch[p][0]) and batch[p][1] for p in got.d2)


def test_the_gap_between_asking_and_answering() -> None:
    gap = gapg.decision_gap
    assert gap(1.1, cloud_score=True, cloud_share=0.5, cloud_reward=0.25) == pytest.approx(-0.85)
    assert gap(0.1, cloud_score=True, cloud_share=0.5, cloud_reward=0.25) == pytest.approx(0.15)
    assert gap(0.1, cloud_score=False, cloud_share=0.5, cloud_reward=0.25) == pytest.approx(-0.1)
    assert gap(0.0, cloud_score=None, cloud_share=0.8, cloud_reward=0.25) == pytest.approx(0.2)


def test_decision_loss_value_and_gradient() -> None:
    log_odds = torch.tensor([-2.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([0.15, -0.85, 0.0], dtype=torch.float64)
    loss = gapg.decision_loss(log_odds, gap, weight=3.0, count=16)
    by_hand = 3 / 16 * (0.15 * math.log(1 + math.exp(2)) + 0.85 * math.log(1 + math.exp(1)))
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    loss.backward()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert log_odds.grad is not None
    expected = [-3 / 16 * 0.15 * sigmoid(2), 3 / 16 * 0.85 * sigmoid(1), 0.0]
    assert log_odds.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_decision_loss_is_least_where_odds_equal_the_masses() -> None:
    # Three decisions where asking pays 0.15 and one where it costs 0.85, at one shared prefix.
    log_odds = torch.tensor(math.log(0.45 / 0.85), dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([0.15, 0.15, 0.15, -0.85], dtype=torch.float64)
    gapg.decision_loss(log_odds.expand(4), gap, weight=1.0, count=4).backward()
    assert log_odds.grad is not None
    assert abs(log_odds.grad.item()) < 1e-12


def test_policy_loss_value_and_gradient() -> None:
    log_prob = torch.tensor([-3.0, -5.0], dtype=torch.float64, requires_grad=True)
    loss = gapg.policy_loss(log_prob, torch.tensor([0.5, -0.25], dtype=torch.float64), count=4)
    assert loss.item() == pytest.approx(-(0.5 * -3.0 + -0.25 * -5.0) / 4)
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [-0.125, 0.0625]


# A policy small enough to enumerate: three responses, softmax over three logits, the reward table's values.
WEIGHTS = RewardConfig(answer=1.0, cloud=0.25, format=0.1)
CORRECT = (True, False, False)
REWARDS = torch.tensor(
    [
        reward(Answer("right", True), score=True, cloud_score=None, weights=WEIGHTS),
        reward(Answer("wrong", True), score=False, cloud_score=None, weights=WEIGHTS),
        reward(HelpCall(), score=False, cloud_score=True, weights=WEIGHTS),
    ],
    dtype=torch.float64,
)
G = 3


def expected_gradient(advantage_rule: object, keep: object = lambda actions: 1.0) -> Tensor:
    """The probability-weighted mean, over all groups, of the group's gradient (float64, exact)."""
    total = torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=G):
        logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
        log_prob = torch.log_softmax(logits, 0)[list(actions)]
        probability = log_prob.sum().exp().item()
        advantage = advantage_rule(REWARDS[list(actions)][None])[0]  # type: ignore[operator]
        (-gapg.policy_loss(log_prob, advantage, count=G)).backward()
        assert logits.grad is not None
        total += probability * keep(actions) * logits.grad  # type: ignore[operator]
    return total


def exact_gradient() -> Tensor:
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    (torch.softmax(logits, 0) * REWARDS).sum().backward()
    assert logits.grad is not None
    return logits.grad


def grpo(rewards_PG: Tensor) -> Tensor:
    return ALGORITHMS["grpo"].advantages(rewards_PG, torch.zeros_like(rewards_PG), 0.0)


def test_the_estimator_is_unbiased() -> None:
    assert torch.allclose(expected_gradient(gapg.advantages), exact_gradient(), rtol=0, atol=1e-6)


def test_grpo_is_not() -> None:
    assert not torch.allclose(expected_gradient(grpo), exact_gradient(), rtol=0, atol=1e-6)
    # Not even up to a factor: the direction differs too.
    cosine = torch.nn.functional.cosine_similarity(expected_gradient(grpo), exact_gradient(), dim=0)
    assert cosine < 1 - 1e-4


def test_the_filter_has_a_bias_which_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    # One problem a batch: D1 keeps groups with a correct answer, and D2, bounded by rho * 0, is empty.
    def keep(actions: tuple[int, ...]) -> float:
        return float(bool(pick([[CORRECT[a] for a in actions]], [True], 0.3).kept))

    filtered, exact = expected_gradient(gapg.advantages, keep), exact_gradient()

    # Beside enough solved problems D2 takes every group that fails, and nothing is left out.
    def keep_all(actions: tuple[int, ...]) -> float:
        solved, last = [[True] * G] * 3, [CORRECT[a] for a in actions]
        return float(3 in pick([*solved, last], [None] * 3 + [True], 0.5).kept)

    whole = expected_gradient(gapg.advantages, keep_all)
    with capsys.disabled():
        print(f"\nexact gradient: {exact.tolist()}")
        print(f"bias with D1 alone: {(filtered - exact).tolist()}; with D1 and all of D2: {(whole - exact).tolist()}")
    assert not torch.allclose(filtered, exact, rtol=0, atol=1e-6)
    assert torch.allclose(whole, exact, rtol=0, atol=1e-6)
