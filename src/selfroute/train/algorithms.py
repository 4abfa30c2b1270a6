"""The policy-gradient methods that can be compared: each is an advantage rule and a selection rule, and nothing else.

| name              | advantage of response i                        | learns from       | dual variable |
|-------------------|------------------------------------------------|-------------------|---------------|
| `gapg`            | G/(G-1) (r_i - mean r)                         | D1 and part of D2 |               |
| `rloo`            | G/(G-1) (r_i - mean r)                         | all               |               |
| `dr_grpo`         | r_i - mean r                                   | all               |               |
| `grpo`            | (r_i - mean r) / std r                         | all               |               |
| `da_grpo`         | (r_i - mean r) / std r - lambda (c_i - mean c) | all               | lambda        |
| `lagrangian_gapg` | G/(G-1) (s_i - mean s), s = r - lambda c       | all               | lambda        |

c_i is 1 for a help call. lambda grows while the call rate is above the budget. Nothing here samples or touches a model.

Axes: P problems, G responses a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from selfroute.train.gapg import advantages as leave_one_out

Advantages = Callable[[Tensor, Tensor, float], Tensor]
"""(rewards_PG, asked_PG, dual) -> advantages_PG; `asked_PG` is 1 for a help call, `dual` is lambda."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """`filters`: learn from D1 and part of D2 alone (`gapg.select`), not from all problems. `dual`: it has a lambda."""

    advantages: Advantages
    filters: bool = False
    dual: bool = False


def _centred(values_PG: Tensor) -> Tensor:
    """v_i - mean v, exactly zero for equal values."""
    equal_P1 = (values_PG == values_PG[:, :1]).all(dim=1, keepdim=True)
    return (values_PG - values_PG.mean(dim=1, keepdim=True)).masked_fill(equal_P1, 0.0)


def _standardised(values_PG: Tensor) -> Tensor:
    """(v_i - mean v) / (std v + 1e-4), with the group's own standard deviation (arXiv:2402.03300, section 4.1.1)."""
    return _centred(values_PG) / (values_PG.std(dim=1, keepdim=True) + 1e-4)


def unbiased(rewards_PG: Tensor, asked_PG: Tensor, dual: float) -> Tensor:
    """GAPG's leave-one-out advantages."""
    return leave_one_out(rewards_PG)


def dr_grpo(rewards_PG: Tensor, asked_PG: Tensor, dual: float) -> Tensor:
    """Dr. GRPO (arXiv:2503.20783): centred, not divided by the standard deviation, no length normalisation."""
    return _centred(rewards_PG)


def grpo(rewards_PG: Tensor, asked_PG: Tensor, dual: float) -> Tensor:
    """GRPO's division by the standard deviation, and nothing else of it, so that the twin differs in one thing."""
    return _standardised(rewards_PG)


def da_grpo(rewards_PG: Tensor, asked_PG: Tensor, dual: float) -> Tensor:
    """DA-GRPO (arXiv:2602.00166): A_r - lambda A_c, the two advantages made separately."""
    return _standardised(rewards_PG) - dual * _centred(asked_PG)


def lagrangian(rewards_PG: Tensor, asked_PG: Tensor, dual: float) -> Tensor:
    """GAPG's estimator of the Lagrangian's gradient: the reward pays lambda for each help call."""
    return leave_one_out(rewards_PG - dual * asked_PG)


ALGORITHMS = {
    "gapg": Algorithm(unbiased, filters=True),
    "rloo": Algorithm(unbiased),
    "dr_grpo": Algorithm(dr_grpo),
    "grpo": Algorithm(grpo),
    "da_grpo": Algorithm(da_grpo, dual=True),
    "lagrangian_gapg": Algorithm(lagrangian, dual=True),
}


def next_dual(dual: float, *, call_rate: float, budget: float, rate: float) -> float:
    """lambda <- max(0, lambda + rate * (call rate - budget))."""
    return max(0.0, dual + rate * (call_rate - budget))
