"""The advantage rules that are compared, against hand-computed values."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from selfroute.train.algorithms import ALGORITHMS, next_dual
from selfroute.train.config import TrainConfig

# One group: a right answer, a rewarded help call, a wrong answer, a help call that the cloud fails.
REWARDS = torch.tensor([[1.0, 0.25, 0.0, 0.0]], dtype=torch.float64)
ASKED = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
CENTRED = [0.6875, -0.0625, -0.3125, -0.3125]
# Squares 0.47265625, 0.00390625, 0.09765625 twice: 0.671875 over 3.
STD = math.sqrt(0.671875 / 3) + 1e-4
COST = [-0.5, 0.5, -0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "dual", "expected"),
    [
        ("gapg", 0.0, [c * 4 / 3 for c in CENTRED]),
        ("rloo", 0.0, [c * 4 / 3 for c in CENTRED]),
        ("dr_grpo", 0.0, CENTRED),
        ("grpo", 0.0, [c / STD for c in CENTRED]),
        ("da_grpo", 0.0, [c / STD for c in CENTRED]),
        ("da_grpo", 0.5, [c / STD - 0.5 * a for c, a in zip(CENTRED, COST, strict=True)]),
        ("lagrangian_gapg", 0.0, [c * 4 / 3 for c in CENTRED]),
        # s = 1, -0.25, 0, -0.5 with mean 0.0625
        ("lagrangian_gapg", 0.5, [s * 4 / 3 for s in (0.9375, -0.3125, -0.0625, -0.5625)]),
    ],
)
def test_advantages(name: str, dual: float, expected: list[float]) -> None:
    got = ALGORITHMS[name].advantages(REWARDS, ASKED, dual)
    assert got[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equal_responses_have_no_advantage_at_all(name: str) -> None:
    same = torch.full((1, 7), 0.1, dtype=torch.float64)
    assert ALGORITHMS[name].advantages(same, torch.ones(1, 7, dtype=torch.float64), 0.3).eq(0).all()


def test_a_standard_deviation_makes_solving_alone_and_by_the_cloud_look_alike() -> None:
    """The paper's reason against it: half solved, half wrong; and half rescued by the cloud, half wrong."""
    alone, rescued = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.25, 0.0, 0.0]])
    none = torch.zeros(1, 4)
    grpo, gapg = ALGORITHMS["grpo"].advantages, ALGORITHMS["gapg"].advantages
    assert torch.allclose(grpo(alone, none, 0.0), grpo(rescued, none, 0.0), atol=1e-3)
    assert torch.allclose(gapg(alone, none, 0.0), 4 * gapg(rescued, none, 0.0))


def test_which_of_them_filter_and_which_have_a_dual() -> None:
    assert {n for n, a in ALGORITHMS.items() if a.filters} == {"gapg"}
    assert {n for n, a in ALGORITHMS.items() if a.dual} == {"da_grpo", "lagrangian_gapg"}
    assert set(get_args(TrainConfig.model_fields["algorithm"].annotation)) == set(ALGORITHMS)


def test_the_dual_follows_the_excess_and_never_pays_for_help() -> None:
    assert next_dual(0.0, call_rate=0.5, budget=0.3, rate=0.2) == pytest.approx(0.04)
    assert next_dual(0.04, call_rate=0.2, budget=0.3, rate=0.2) == pytest.approx(0.02)
    assert next_dual(0.01, call_rate=0.0, budget=0.3, rate=0.2) == 0.0
