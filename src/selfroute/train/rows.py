"""What enters the update: a row of tokens with its weights, and l of its decision.

Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from selfroute.protocol import DecisionPoint


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence of the update.

    `advantage` weighs the sum of its log-probabilities; `gap` is Delta at token `decision_index`. A row with advantage
    0 ends at its decision. In a row made of a cut response the tokens from `boundary` on are the help call that it did
    not make.
    """

    problem: int
    token_ids: Sequence[int]
    advantage: float
    gap: float = 0.0
    decision_index: int = 0
    point: DecisionPoint | None = None
    boundary: int | None = None


def log_odds(logits_TV: torch.Tensor, row: Row, point: DecisionPoint) -> torch.Tensor:
    """l of a row: asking against answering; in a cut response, asking at `boundary` against all else there."""
    if row.boundary is None:
        at_V = logits_TV[row.decision_index].float()
        return at_V[point.help] - at_V[point.answer]
    path = slice(row.boundary, row.decision_index + 1)
    target_T = torch.tensor(row.token_ids[path], device=logits_TV.device)
    log_prob = -cross_entropy(logits_TV[path].float(), target_T, reduction="sum")
    return log_prob - torch.log(-torch.expm1(log_prob.clamp_max(-1e-6)))
