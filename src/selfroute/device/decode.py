"""Rows decoded together, a token at a time.

A problem's prompt runs once for all its responses; finished rows leave the batch. What is known of the rows stays in
tensors beside the model: a loop over rows in Python would take as long a token as a GPU takes for the model.

Axes: R responses, B rows (responses still decoded), T tokens, V vocabulary, N tokens of the longest prefix of a
decision point.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from selfroute.device.base import Sampling
from selfroute.device.choose import Choices
from selfroute.device.graphs import StaticSteps, has_fixed_shapes
from selfroute.device.growing import GrowingSteps
from selfroute.device.prefix import SharedPrompts
from selfroute.device.sharing import SharingSteps, can_share
from selfroute.protocol import find_decision
from selfroute.types import Response

if TYPE_CHECKING:
    from selfroute.device.hf import HFEngine


class Steps(Protocol):
    """The model over rows that continue their prompts, a token a step."""

    def logits(self, last_B: Tensor) -> Tensor:
        """The logits after each row's last token, (B, V); they may be overwritten by the next step's."""
        ...

    def fit(self, live: int) -> int:
        """How many rows to go on with when `live` of them are not over."""
        ...

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these rows, at most those that there are."""
        ...


NewSteps = Callable[[PreTrainedModel, SharedPrompts, Tensor, int], Steps]
"""A model, its prompts, which prompt each row continues, (B,), and the most tokens of a row."""


def steps_for(model: PreTrainedModel, *, graphs: bool = True) -> NewSteps:
    """How a model decodes: with captured graphs on a CUDA GPU, where it can and may; on a CPU with one copy of what all
    prompts begin with, where it can; else with a growing cache."""
    if graphs and model.device.type == "cuda" and has_fixed_shapes(model):
        return StaticSteps
    # Found out when it is first of use.
    shares = cache(lambda: can_share(model))

    def new(model: PreTrainedModel, shared: SharedPrompts, index_B: Tensor, room: int) -> Steps:
        return (SharingSteps if shared.common and shares() else GrowingSteps)(model, shared, index_B, room)

    return new


class Decoder:
    """One batch of rows, decoded together: the state of `HFEngine.generate`.

    Where requests come and go (`batch`), rows that are over are left out at once (`select`), and others `join`: with
    `joins`, each has all of its prompt to itself.
    """

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        starts: Sequence[list[int]],
        names: Sequence[str],
        limits: Sequence[int],
        sampling: Sampling,
        *,
        top_p: float = 1.0,
        joins: bool = False,
    ) -> None:
        self.engine = engine
        device = engine.model.device
        rows = len(names)
        if any(starts):
            # Rows that begin with tokens of their own share nothing beyond them.
            prompts = [[*prompts[owner], *start] for owner, start in zip(owners, starts, strict=True)]
            owners = range(rows)
        shared = SharedPrompts(engine.model, prompts, engine.pad, least=sys.maxsize if joins else None)
        index_B = torch.tensor(list(owners), device=device)
        # Others cannot be taken back.
        new_steps = GrowingSteps if joins or sampling.early_exit else engine.steps
        self.steps = new_steps(engine.model, shared, index_B, sampling.max_tokens)
        self.choices = Choices(engine.points, names, sampling, device, top_p=top_p)
        self.last_B = torch.tensor([prompts[owner][-1] for owner in owners], device=device)
        self.alive_B = torch.arange(rows, device=device)
        self.over_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.count_B = torch.tensor([len(start) for start in starts], device=device)
        self.limit_B = torch.tensor(list(limits), device=device)
        self.ends = torch.tensor(sorted(engine.end_tokens), device=device)

        # Whether a response may be in the model's own thinking; once it is not, that is for good.
        self._may_think = [True] * rows

        # -1 is no token: N columns before the first one, so that a window ends at any, and one that rows that are
        # over write to.
        longest = len(self.choices.window_N)
        room = max(sampling.max_tokens, 1 + max(map(len, starts)))
        self.tokens_RT = torch.tensor(
            [[-1] * longest + start + [-1] * (room - len(start) + 1) for start in starts], device=device
        )

    @property
    def scores(self) -> list[dict[int, float]]:
        """For each response, l at every place where it decided."""
        return self.choices.scores

    def run(self, progress: Callable[[int], None] | None) -> list[Response]:
        """Decode until all rows are over.

        Raises:
            DivergenceError: the model's logits are not finite.
        """
        rows, over = len(self.alive_B), 0
        while rows:
            self.step()
            before, over = over, int(self.over_B.sum())
            if progress and over > before:
                progress(over - before)
            size = 0 if over == rows else self.steps.fit(rows - over)
            if 0 < size < rows:
                # Those that go on first, in their order.
                self._keep(self.over_B.byte().argsort(stable=True)[:size])
                over -= rows - size
            rows = size
        return [self._response(row, tokens) for row, tokens in enumerate(self.tokens_RT.tolist())]

    def step(self) -> None:
        """Add a token to each row that is not over.

        Raises:
            DivergenceError: the model's logits are not finite, those of the rows `choices.lost`.
        """
        logits_BV = self.steps.logits(self.last_B)
        window_BN = self.tokens_RT[self.alive_B[:, None], self.count_B[:, None] + self.choices.window_N]
        token_B, taken_back = self.choices(logits_BV, window_BN, self.alive_B, self.count_B, self.over_B, self._thinks)
        for b, count in taken_back:
            self._take_back(b, count)
        self._append(token_B)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, and forget the others and their responses."""
        assert isinstance(self.steps, GrowingSteps)
        rows_B = torch.tensor(list(rows), device=self.last_B.device)
        self._keep(rows_B)
        self.steps.trim()
        self.tokens_RT, self.alive_B = self.tokens_RT[rows_B], torch.arange(len(rows), device=rows_B.device)
        self._may_think = [self._may_think[row] for row in rows]
        self.choices.select(rows)

    def join(self, other: Decoder) -> None:
        """Go on with another's rows behind these; none of either is over."""
        assert isinstance(self.steps, GrowingSteps)
        assert isinstance(other.steps, GrowingSteps)
        self.steps.join(other.steps)
        self.choices.join(other.choices)
        self._may_think += other._may_think
        columns = max(self.tokens_RT.shape[1], other.tokens_RT.shape[1])
        self.tokens_RT = torch.cat(
            [pad(x, (0, columns - x.shape[1]), value=-1) for x in (self.tokens_RT, other.tokens_RT)]
        )
        self.last_B, self.over_B = torch.cat([self.last_B, other.last_B]), torch.cat([self.over_B, other.over_B])
        self.count_B, self.limit_B = torch.cat([self.count_B, other.count_B]), torch.cat([self.limit_B, other.limit_B])
        self.alive_B = torch.arange(len(self.last_B), device=self.last_B.device)

    def again(self) -> None:
        """Undo the model's last pass, after which no token was added: the next one comes to the same logits."""
        assert isinstance(self.steps, GrowingSteps)
        for b in range(len(self.alive_B)):
            self.steps.take_back(b, 1)

    def response(self, row: int) -> Response:
        """A row's response so far."""
        return self._response(row, self.tokens_RT[row].tolist())

    def _keep(self, rows_B: Tensor) -> None:
        self.steps.keep(rows_B)
        self.alive_B, self.last_B, self.over_B = self.alive_B[rows_B], self.last_B[rows_B], self.over_B[rows_B]
        self.count_B, self.limit_B = self.count_B[rows_B], self.limit_B[rows_B]

    def _thinks(self, b: int) -> bool:
        """Whether a row is in the model's own thinking."""
        row, count = int(self.alive_B[b]), int(self.count_B[b])
        if not self._may_think[row]:
            return False
        begin = len(self.choices.window_N)
        thinks = self.engine.in_thoughts(self.tokens_RT[row, begin : begin + count].tolist())
        # By then it would have begun.
        self._may_think[row] = thinks or count <= 8
        return thinks

    def _append(self, token_B: Tensor) -> None:
        """Add a token to each row that is not over."""
        columns = self.tokens_RT.shape[1]
        column_B = torch.where(self.over_B, columns - 1, self.count_B + len(self.choices.window_N))
        self.tokens_RT[self.alive_B, column_B] = token_B
        self.count_B += ~self.over_B
        self.over_B |= torch.isin(token_B, self.ends) | (self.count_B >= self.limit_B)
        self.last_B = token_B

    def _take_back(self, b: int, count: int) -> None:
        """Forget a row's last tokens."""
        assert isinstance(self.steps, GrowingSteps)
        end = int(self.count_B[b]) + len(self.choices.window_N)
        self.tokens_RT[self.alive_B[b], end - count : end] = -1
        self.count_B[b] -= count
        self.steps.take_back(b, count)

    def _response(self, row: int, tokens: list[int]) -> Response:
        ids = [token for token in tokens[:-1] if token >= 0]
        finished = ids[-1] in self.engine.end_tokens
        found = find_decision(ids, self.engine.points, self.engine.tokenizer) if finished else None
        index = found[0] if found else None
        score = self.scores[row].get(index) if index is not None else None
        if self.choices.redraws:
            # The dial asks at the first that it does not decline, so the highest says whether it asks.
            score = max(self.scores[row].values(), default=None)
        return Response(self.engine.decode(ids), tuple(ids), finished, score, index)
