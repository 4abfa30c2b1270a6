"""What enters the update: a row of tokens with its weights, l of its decision, and the gradient of both losses.

Axes: B rows, T tokens, H hidden size, D rows with a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfroute.device.head import log_probs
from selfroute.device.hf import HFEngine
from selfroute.device.prefix import SharedPrompts, pack
from selfroute.errors import DivergenceError
from selfroute.protocol import DecisionPoint
from selfroute.train import gapg
from selfroute.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Row:
    """One token sequence of the update.

    `advantage` weighs the sum of its log-probabilities; `gap` is Delta at token `decision_index`. A row with advantage
    0 ends at its decision. In a row made of a cut response, which has none, or of an early exit, the tokens from
    `boundary` on are the help call that it did not make. Where that could not come, `declined` weighs log(1 - P) of it
    in the policy loss.
    """

    problem: int
    token_ids: Sequence[int]
    advantage: float
    gap: float = 0.0
    decision_index: int = 0
    point: DecisionPoint | None = None
    boundary: int | None = None
    declined: float = 0.0

    @property
    def counted(self) -> range:
        """Where the log-probabilities matter: all of a response, or the help call that a cut one did not make."""
        if self.advantage:
            return range(len(self.token_ids))
        return range(0) if self.boundary is None else range(self.boundary, self.decision_index + 1)


def row_log_probs(
    head: Callable[[Tensor], Tensor],
    states_BTH: Tensor,
    rows: Sequence[Row],
    forbidden: Sequence[DecisionPoint] = (),
    thinks: Callable[[Row, int], bool] = lambda row, t: False,
) -> Tensor:
    """The log-probability of each row's counted tokens, summed, (B,).

    Args:
        head: hidden states to logits.
        states_BTH: the hidden states that predict each token of the rows.
        rows: B rows.
        forbidden: the decision points at which help was forbidden when responses were drawn. There the help call has
            probability 0, so that a response's gradient says nothing of asking. Rows without an advantage were not
            drawn.
        thinks: whether a row's token was drawn in the model's own thinking, where nothing is forbidden.
    """
    tokens = [(b, t) for b, row in enumerate(rows) for t in row.counted]
    never = [
        (n, point.help)
        for n, (b, t) in enumerate(tokens)
        for point in forbidden
        if rows[b].advantage and point.ends(rows[b].token_ids[:t]) and not thinks(rows[b], t)
    ]
    targets_N = torch.tensor([rows[b].token_ids[t] for b, t in tokens], dtype=torch.long, device=states_BTH.device)
    states_NH = states_BTH[[b for b, _ in tokens], [t for _, t in tokens]]
    log_prob_N = log_probs(head, states_NH, targets_N, never)
    return torch.stack([part.sum() for part in log_prob_N.split([len(row.counted) for row in rows])])


def log_odds(head: Callable[[Tensor], Tensor], states_BTH: Tensor, rows: Sequence[Row], log_prob_B: Tensor) -> Tensor:
    """l of each row that has a decision, (D,): asking against answering.

    In a cut response: asking at `boundary`, whose log-probability `log_prob_B` holds, against all else there.
    """
    answered = [(b, row.decision_index) for b, row in enumerate(rows) if row.point and row.boundary is None]
    at_AV = head(states_BTH[[b for b, _ in answered], [t for _, t in answered]]).to(log_prob_B.dtype)
    logits_V = dict(zip((b for b, _ in answered), at_AV, strict=True))
    found = []
    for b, row in enumerate(rows):
        if row.point and row.boundary is None:
            found.append(logits_V[b][row.point.help] - logits_V[b][row.point.answer])
        elif row.point:
            found.append(log_prob_B[b] - torch.log(-torch.expm1(log_prob_B[b].clamp_max(-1e-6))))
    return torch.stack(found)


def asking_log_probs(
    head: Callable[[Tensor], Tensor], states_BTH: Tensor, rows: Sequence[Row], log_prob_B: Tensor
) -> Tensor:
    """log P of the help call, from where its tag begins, in each row with a decision, (D,)."""
    answered = [(b, row) for b, row in enumerate(rows) if row.point and row.boundary is None]
    paths = [(b, row.decision_index - len(row.point.prefix), (*row.point.prefix, row.point.help))
             for b, row in answered if row.point]  # fmt: skip
    tokens = [(b, begin + i, token) for b, begin, path in paths for i, token in enumerate(path)]
    states_NH = states_BTH[[b for b, _, _ in tokens], [t for _, t, _ in tokens]]
    targets_N = torch.tensor([token for _, _, token in tokens], dtype=torch.long, device=states_BTH.device)
    parts = log_probs(head, states_NH, targets_N).split([len(path) for _, _, path in paths])
    found = {b: part.sum() for (b, _, _), part in zip(paths, parts, strict=True)}
    return torch.stack([found.get(b, log_prob_B[b]) for b, row in enumerate(rows) if row.point])


def accumulate_gradients(
    engine: HFEngine,
    head: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    config: TrainConfig,
    count: int,
) -> float:
    """Add the gradient of the rows' policy loss and decision loss to the weights' `grad`; returns the decision loss.

    Args:
        engine: the device.
        head: its output layer.
        prompts: the prompts that rows continue, by `Row.problem`.
        rows: those to learn from.
        config: the decision's weight, what was forbidden in sampling, and the tokens in one pass.
        count: |D1 u D2| * G, which both losses are divided by.

    Raises:
        DivergenceError: the loss is not finite.
    """
    if not rows:
        return 0.0
    total_decision = 0.0
    # Where a declined help call went on, each place has a term of its own.
    forbidden = engine.points if config.sampling.forbid_help and not config.sampling.early_exit else ()

    def thinks(row: Row, t: int) -> bool:
        return engine.in_thoughts(row.token_ids[:t])

    # A group without a gradient has no row, and its prompt does not run either.
    learning = sorted({row.problem for row in rows})
    place = {problem: n for n, problem in enumerate(learning)}
    shared = SharedPrompts(
        engine.model,
        [prompts[problem] for problem in learning],
        engine.pad,
        recompute=config.gradient_checkpointing,
    )
    for part in pack([row.token_ids for row in rows], config.micro_batch_tokens):
        chosen = [rows[i] for i in part]
        states_BTH = shared.states([place[row.problem] for row in chosen], [row.token_ids for row in chosen])
        log_prob_B = row_log_probs(head, states_BTH, chosen, forbidden, thinks)
        advantage_B = torch.tensor([row.advantage for row in chosen], device=states_BTH.device)
        loss = gapg.policy_loss(log_prob_B, advantage_B, count)
        if any(row.point for row in chosen):
            log_odds_D = log_odds(head, states_BTH, chosen, log_prob_B)
            gap_D = torch.tensor([row.gap for row in chosen if row.point], device=states_BTH.device)
            decision = gapg.decision_loss(log_odds_D, gap_D, config.decision_weight, count)
            total_decision += decision.item()
            loss = loss + decision
            declined_D = torch.tensor([row.declined for row in chosen if row.point], device=states_BTH.device)
            if declined_D.any():
                asking_D = asking_log_probs(head, states_BTH, chosen, log_prob_B)
                loss = loss + gapg.declined_loss(asking_D, declined_D, count)
        if not torch.isfinite(loss):
            raise DivergenceError(f"the loss is {loss.item()}")
        loss.backward()
    shared.backward()
    return total_decision
