"""Rows decoded together, a token at a time.

A problem's prompt runs once for all its responses; finished rows leave the batch. What is known of the rows stays in
tensors beside the model: a loop over rows in Python would take as long a token as a GPU takes for the model.

Axes: R responses, B rows (responses still decoded), T tokens, V vocabulary, D forms of the decision point, N tokens of
the longest prefix of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from selfroute.device.base import Sampling
from selfroute.device.declined import Redraws
from selfroute.device.draw import Draws
from selfroute.device.graphs import StaticSteps, has_fixed_shapes
from selfroute.device.prefix import SharedPrompts
from selfroute.errors import DivergenceError
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
    """How a model decodes: with captured graphs on a CUDA GPU, where it can and may; elsewhere they gain nothing."""
    captured = graphs and model.device.type == "cuda" and has_fixed_shapes(model)
    return StaticSteps if captured else GrowingSteps


class Decoder:
    """One batch of rows, decoded together: the state of `HFEngine.generate`."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        starts: Sequence[list[int]],
        names: Sequence[str],
        limits: Sequence[int],
        sampling: Sampling,
    ) -> None:
        self.engine, self.sampling = engine, sampling
        device = engine.model.device
        rows = len(names)
        if any(starts):
            # Rows that begin with tokens of their own share nothing beyond them.
            prompts = [[*prompts[owner], *start] for owner, start in zip(owners, starts, strict=True)]
            owners = range(rows)
        shared = SharedPrompts(engine.model, prompts, engine.pad)
        index_B = torch.tensor(list(owners), device=device)
        self.redraws = Redraws(engine.points, names, sampling) if sampling.early_exit else None
        # Steps of fixed shape cannot be taken back.
        new_steps = GrowingSteps if self.redraws else engine.steps
        self.steps = new_steps(engine.model, shared, index_B, sampling.max_tokens)
        self.last_B = torch.tensor([prompts[owner][-1] for owner in owners], device=device)
        self.alive_B = torch.arange(rows, device=device)
        self.over_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.count_B = torch.tensor([len(start) for start in starts], device=device)
        self.limit_B = torch.tensor(list(limits), device=device)
        self.ends = torch.tensor(sorted(engine.end_tokens), device=device)
        self.draws = Draws(names, self.redraws.draws if self.redraws else sampling.max_tokens, device)
        self.scores: list[dict[int, float]] = [{} for _ in names]

        # -1 is no token: N columns before the first one, so that a window ends at any, and one that rows that are
        # over write to.
        points = engine.points
        longest = max(len(point.prefix) for point in points)
        room = max(sampling.max_tokens, 1 + max(map(len, starts)))
        self.tokens_RT = torch.tensor(
            [[-1] * longest + start + [-1] * (room - len(start) + 1) for start in starts], device=device
        )
        self.window_N = torch.arange(longest, device=device)
        prefixes = [[-1] * (longest - len(point.prefix)) + list(point.prefix) for point in points]
        self.prefix_DN = torch.tensor(prefixes, dtype=torch.long, device=device).view(len(points), longest)
        self.free_DN = self.prefix_DN < 0
        self.help_D = torch.tensor([point.help for point in points], device=device)
        self.answer_D = torch.tensor([point.answer for point in points], device=device)

    def run(self, progress: Callable[[int], None] | None) -> list[Response]:
        """Decode until all rows are over.

        Raises:
            DivergenceError: the model's logits are not finite.
        """
        rows, over = len(self.alive_B), 0
        while rows:
            self._append(self._choose(self.steps.logits(self.last_B)))
            before, over = over, int(self.over_B.sum())
            if progress and over > before:
                progress(over - before)
            size = 0 if over == rows else self.steps.fit(rows - over)
            if 0 < size < rows:
                # Those that go on first, in their order.
                keep = self.over_B.byte().argsort(stable=True)[:size]
                self.steps.keep(keep)
                self.alive_B, self.last_B, self.over_B = self.alive_B[keep], self.last_B[keep], self.over_B[keep]
                self.count_B, self.limit_B = self.count_B[keep], self.limit_B[keep]
                over -= rows - size
            rows = size
        return [self._response(row, tokens) for row, tokens in enumerate(self.tokens_RT.tolist())]

    def _append(self, token_B: Tensor) -> None:
        """Add a token to each row that is not over."""
        columns = self.tokens_RT.shape[1]
        column_B = torch.where(self.over_B, columns - 1, self.count_B + len(self.window_N))
        self.tokens_RT[self.alive_B, column_B] = token_B
        self.count_B += ~self.over_B
        self.over_B |= torch.isin(token_B, self.ends) | (self.count_B >= self.limit_B)
        self.last_B = token_B

    def _choose(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row, (B,). Decisions follow `sampling.decide` and the dial."""
        sampling = self.sampling
        if logits_BV.dtype == torch.float64:
            # A last digit that depends on the batch is gone before anything is drawn.
            logits_BV = logits_BV.float()
        # Rows that stand at a decision point, under each form of it: of most tokens, none.
        window_BN = self.tokens_RT[self.alive_B[:, None], self.count_B[:, None] + self.window_N]
        at_BD = ((window_BN[:, None] == self.prefix_DN) | self.free_DN).all(-1)
        decisive = bool(at_BD.any())
        if decisive:
            score_BD = logits_BV[:, self.help_D].float() - logits_BV[:, self.answer_D].float()
            if sampling.forbid_help and self.redraws is None:
                # Added, since two forms may share their token.
                logits_BV.index_add_(1, self.help_D, torch.where(at_BD, -torch.inf, 0.0).to(logits_BV.dtype))
        top_B = logits_BV.amax(-1)
        if not torch.isfinite(top_B).all():
            raise DivergenceError("the model's logits are not finite")
        if sampling.temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            drawn_B = self.count_B
            if self.redraws:
                drawn_B = drawn_B + torch.tensor(self.redraws.taken_back, device=drawn_B.device)[self.alive_B]
            token_B = self.draws(logits_BV, top_B, sampling.temperature, self.alive_B, drawn_B)
        if self.redraws:
            rows = zip(self.alive_B.tolist(), self.count_B.tolist(), token_B.tolist(), logits_BV, strict=True)
            for row, index, token, logits_V in rows:
                self.redraws.note(row, index, token, logits_V)
        if decisive:
            chosen_BD = (token_B[:, None] == self.help_D) | (token_B[:, None] == self.answer_D)
            deciding_B = (at_BD & chosen_BD).any(-1) & ~self.over_B
            for b in deciding_B.nonzero()[:, 0].tolist():
                token_B[b] = self._decide(b, int(token_B[b]), at_BD[b].tolist(), score_BD[b].tolist(), logits_BV[b])
        return token_B

    def _decide(self, b: int, token: int, at_D: list[bool], score_D: list[float], logits_V: Tensor) -> int:
        """Note l of a row that decides; returns the token that it goes on with."""
        sampling, row, index = self.sampling, int(self.alive_B[b]), int(self.count_B[b])
        for point, at, score in zip(self.engine.points, at_D, score_D, strict=True):
            if not at or token not in (point.help, point.answer):
                continue
            if self.redraws and self.redraws.declined(row, index, point):
                asks = False
            else:
                if self.redraws:
                    score = self.redraws.odds(row, index, point, logits_V)
                self.scores[row][index] = score
                by_dial = sampling.decide == "threshold"
                asks = not sampling.forbid_help and (score + sampling.bias > 0 if by_dial else token == point.help)
            if self.redraws and token == point.help and not asks:
                token, back = self.redraws.go_on(row, index, point, logits_V)
                self._take_back(b, back)
                return token
            token = point.help if asks else point.answer
        return token

    def _take_back(self, b: int, count: int) -> None:
        """Forget a row's last tokens."""
        assert isinstance(self.steps, GrowingSteps)
        end = int(self.count_B[b]) + len(self.window_N)
        self.tokens_RT[self.alive_B[b], end - count : end] = -1
        self.count_B[b] -= count
        self.steps.take_back(b, count)

    def _response(self, row: int, tokens: list[int]) -> Response:
        ids = [token for token in tokens[:-1] if token >= 0]
        finished = ids[-1] in self.engine.end_tokens
        found = find_decision(ids, self.engine.points, self.engine.tokenizer) if finished else None
        index = found[0] if found else None
        score = self.scores[row].get(index) if index is not None else None
        if self.redraws:
            # The dial asks at the first that it does not decline, so the highest says whether it asks.
            score = max(self.scores[row].values(), default=None)
        return Response(self.engine.decode(ids), tuple(ids), finished, score, index)


class GrowingSteps:
    """A cache that grows by a token a step; for any model, on any device."""

    def __init__(self, model: PreTrainedModel, shared: SharedPrompts, index_B: Tensor, room: int) -> None:
        self.model = model
        self.cache = shared.expand(index_B)
        for n, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[n] = _GrowingLayer(layer, room)
        self.mask_BT = shared.mask.index_select(0, index_B)

    def logits(self, last_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.mask_BT[:, :1])], dim=1)
        logits_BTV: Tensor = self.model(
            input_ids=last_B[:, None],
            attention_mask=self.mask_BT,
            position_ids=self.mask_BT.sum(-1, keepdim=True) - 1,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits_BTV[:, -1]

    def fit(self, live: int) -> int:
        """Compacting copies the cache, so it waits until an eighth of the batch is over: the bound on wasted rows."""
        rows = len(self.mask_BT)
        return live if (rows - live) * 8 >= rows else rows

    def take_back(self, row: int, count: int) -> None:
        """Forget a row's last tokens: the cache keeps their places, which nothing sees any more."""
        self.mask_BT[row, self.mask_BT.shape[1] - count :] = 0

    def keep(self, rows_B: Tensor) -> None:
        self.mask_BT = self.mask_BT[rows_B]
        for layer in self.cache.layers:
            layer.reorder_cache(rows_B)


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy with room for more positions, which are not cleared: nothing reads them before they are written."""
    *outer, length, width = x.shape
    roomy = x.new_empty((*outer, length + room, width))
    roomy[..., :length, :] = x
    return roomy


class _GrowingLayer(DynamicLayer):
    """A cache layer with room for the whole response, written in place: no copy of the cache a token."""

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.keys.shape[-2]
        self._keys, self._values = (_with_room(x, room) for x in (layer.keys, layer.values))
        self._view()

    def _view(self) -> None:
        self.keys, self.values = self._keys[..., : self.length, :], self._values[..., : self.length, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            # A row that took tokens back goes on past the room that was made.
            self._keys, self._values = (_with_room(x, end) for x in (self._keys, self._values))
        self._keys[..., self.length : end, :] = key_states
        self._values[..., self.length : end, :] = value_states
        self.length = end
        self._view()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._keys, self._values = self._keys.index_select(0, beam_idx), self._values.index_select(0, beam_idx)
        self._view()
