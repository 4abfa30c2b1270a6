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


def without_help(logits_BTV: torch.Tensor, rows: Sequence[Row], points: Sequence[DecisionPoint]) -> torch.Tensor:
    """The logits of the distribution that responses were drawn from while help was forbidden, (B, T, V).

    At each decision point the help call has probability 0, so that a response's gradient says nothing of asking. Rows
    without an advantage were not drawn, and stay as they are.
    """
    masked_BTV = logits_BTV.clone()
    for b, row in enumerate(rows):
        if not row.advantage:
            continue
        for point in points:
            here = [t for t in range(len(row.token_ids)) if point.ends(row.token_ids[:t])]
            masked_BTV[b, here, point.help] = -torch.inf
    return masked_BTV
