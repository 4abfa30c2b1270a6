"""The next token of each row: drawn as its settings say, and what it decides.

Rows may have settings of their own, since requests that come from outside do. What is known of the rows stays in
tensors beside the model; only rows that decide are looked at one by one.

Axes: R responses, B rows (responses still decoded), V vocabulary, D forms of the decision point, N tokens of the
longest prefix of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selfroute.device.base import Sampling
from selfroute.device.declined import Redraws
from selfroute.device.draw import Draws, drawn, uniforms
from selfroute.errors import DivergenceError
from selfroute.protocol import DecisionPoint


class Choices:
    """How R responses go on, and what they decided.

    Args:
        points: every form of the decision point.
        names: of the responses' random streams.
        sampling: temperature, and what may be decided.
        device: where the logits are.
        top_p: draw from the likeliest tokens that have so much probability together.
    """

    def __init__(
        self,
        points: Sequence[DecisionPoint],
        names: Sequence[str],
        sampling: Sampling,
        device: torch.device,
        *,
        top_p: float = 1.0,
    ) -> None:
        self.points, self.names = points, list(names)
        self.redraws = Redraws(points, names, sampling) if sampling.early_exit else None
        self.draws = Draws(names, self.redraws.draws if self.redraws else sampling.max_tokens, device)
        self.scores: list[dict[int, float]] = [{} for _ in names]
        """For each response, l at every place where it decided."""
        self.begins: dict[int, frozenset[int]] = {}
        """Responses whose next token is one of some."""
        self.lost: list[int] = []
        """The rows whose logits were not finite when that was raised last."""
        self._samplings, self._top_ps = [sampling] * len(names), [top_p] * len(names)

        longest = max(len(point.prefix) for point in points)
        self.window_N = torch.arange(longest, device=device)
        prefixes = [[-1] * (longest - len(point.prefix)) + list(point.prefix) for point in points]
        self._prefix_DN = torch.tensor(prefixes, dtype=torch.long, device=device).view(len(points), longest)
        self._free_DN = self._prefix_DN < 0
        self._help_D = torch.tensor([point.help for point in points], device=device)
        self._answer_D = torch.tensor([point.answer for point in points], device=device)
        self._settle()

    def __call__(
        self,
        logits_BV: Tensor,
        window_BN: Tensor,
        rows_B: Tensor,
        count_B: Tensor,
        over_B: Tensor,
        thinks: Callable[[int], bool] = lambda b: False,
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """The next token of each row, (B,), and the rows that take tokens back, each with their number.

        Args:
            logits_BV: those of the next tokens; they may be overwritten.
            window_BN: each row's last tokens, -1 before its first.
            rows_B: which response each row is.
            count_B: how many tokens it has.
            over_B: rows that are over; theirs does not matter.
            thinks: whether row b is in the model's own thinking, where it decides nothing.

        Raises:
            DivergenceError: logits are not finite; `lost` names the rows.
        """
        if logits_BV.dtype == torch.float64:
            # A last digit that depends on the batch is gone before anything is drawn.
            logits_BV = logits_BV.float()
        # Rows that stand at a decision point, under each form of it: of most tokens, none.
        at_BD = ((window_BN[:, None] == self._prefix_DN) | self._free_DN).all(-1)
        standing = at_BD.any(-1).nonzero()[:, 0].tolist()
        thinking = [b for b in standing if thinks(b)]
        if thinking:
            at_BD[thinking] = False
        decisive = len(thinking) < len(standing)
        if decisive:
            score_BD = logits_BV[:, self._help_D].float() - logits_BV[:, self._answer_D].float()
            if self._forbid_R is not None:
                masked_BD = torch.where(at_BD & self._forbid_R[rows_B, None], -torch.inf, 0.0)
                # Added, since two forms may share their token.
                logits_BV.index_add_(1, self._help_D, masked_BD.to(logits_BV.dtype))
        top_B = logits_BV.amax(-1)
        finite_B = torch.isfinite(top_B)
        if not finite_B.all():
            self.lost = (~finite_B).nonzero()[:, 0].tolist()
            raise DivergenceError("the model's logits are not finite")
        token_B = self._draw(logits_BV, top_B, rows_B, count_B)
        if self.begins:
            self._begin(token_B, logits_BV, rows_B)
        if self.redraws:
            rows = zip(rows_B.tolist(), count_B.tolist(), token_B.tolist(), logits_BV, strict=True)
            for row, index, token, logits_V in rows:
                self.redraws.note(row, index, token, logits_V)
        taken_back: list[tuple[int, int]] = []
        if decisive:
            chosen_BD = (token_B[:, None] == self._help_D) | (token_B[:, None] == self._answer_D)
            deciding_B = (at_BD & chosen_BD).any(-1) & ~over_B
            for b in deciding_B.nonzero()[:, 0].tolist():
                row, index, token = int(rows_B[b]), int(count_B[b]), int(token_B[b])
                token_B[b], back = self._decide(
                    row, index, token, at_BD[b].tolist(), score_BD[b].tolist(), logits_BV[b]
                )
                if back:
                    taken_back.append((b, back))
        return token_B, taken_back

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these responses, and forget the others."""
        self.names, self.scores = [self.names[row] for row in rows], [self.scores[row] for row in rows]
        self._samplings, self._top_ps = [self._samplings[row] for row in rows], [self._top_ps[row] for row in rows]
        self.begins = {n: self.begins[row] for n, row in enumerate(rows) if row in self.begins}
        self.draws.select(rows)
        if self.redraws:
            self.redraws.select(rows)
        self._settle()

    def join(self, other: Choices) -> None:
        """Go on with another's responses behind these; either all of them may exit early, or none."""
        self.begins |= {len(self.names) + row: tokens for row, tokens in other.begins.items()}
        self.names, self.scores = self.names + other.names, self.scores + other.scores
        self._samplings, self._top_ps = self._samplings + other._samplings, self._top_ps + other._top_ps
        self.draws.join(other.draws)
        if self.redraws and other.redraws:
            self.redraws.join(other.redraws)
        self._settle()

    def _settle(self) -> None:
        """Settings as tensors: a temperature where it is not the same for all, the others where anyone has them."""
        exact = self.draws.device
        temperatures = [sampling.temperature for sampling in self._samplings]
        self._temperature: float | Tensor = (
            temperatures[0]
            if len(set(temperatures)) == 1
            else torch.tensor(temperatures, dtype=torch.float64, device=exact)
        )
        self._top_p_R: Tensor | None = None
        if min(self._top_ps, default=1.0) < 1:
            self._top_p_R = torch.tensor(self._top_ps, dtype=torch.float64, device=exact)
        self._forbid_R: Tensor | None = None
        if self.redraws is None and any(sampling.forbid_help for sampling in self._samplings):
            forbid = [sampling.forbid_help for sampling in self._samplings]
            self._forbid_R = torch.tensor(forbid, device=self._help_D.device)

    def _draw(self, logits_BV: Tensor, top_B: Tensor, rows_B: Tensor, count_B: Tensor) -> Tensor:
        temperature, exact = self._temperature, self.draws.device
        if isinstance(temperature, float) and temperature == 0:
            return logits_BV.argmax(-1)
        if self.redraws:
            count_B = count_B + torch.tensor(self.redraws.taken_back, device=count_B.device)[rows_B]
        top_p_B1 = None if self._top_p_R is None else self._top_p_R[rows_B.to(exact), None]
        if isinstance(temperature, float):
            return self.draws(logits_BV, top_B, temperature, rows_B, count_B, top_p_B1)
        greedy_R = temperature == 0
        warm_B1 = temperature.masked_fill(greedy_R, 1)[rows_B.to(exact), None]
        token_B = self.draws(logits_BV, top_B, warm_B1, rows_B, count_B, top_p_B1)
        return torch.where(greedy_R.to(rows_B.device)[rows_B], logits_BV.argmax(-1), token_B)

    def _begin(self, token_B: Tensor, logits_BV: Tensor, rows_B: Tensor) -> None:
        """Draw again where a next token that is one of some is none of them.

        Together with the first draw that is a draw from the model's distribution over those.
        """
        for b, row in enumerate(rows_B.tolist()):
            tokens = self.begins.pop(row, None)
            if tokens is None or int(token_B[b]) in tokens:
                continue
            allowed = sorted(tokens)
            logits_V = logits_BV[b, allowed].cpu().double()
            temperature = self._samplings[row].temperature
            if temperature == 0:
                token_B[b] = allowed[int(logits_V.argmax())]
            else:
                uniform = float(uniforms(f"{self.names[row]}/begin", 1)[0])
                token_B[b] = allowed[drawn(torch.softmax(logits_V / temperature, dim=-1), uniform)]

    def _decide(
        self, row: int, index: int, token: int, at_D: list[bool], score_D: list[float], logits_V: Tensor
    ) -> tuple[int, int]:
        """Note l of a row that decides; the token that it goes on with, and how many tokens it takes back."""
        sampling = self._samplings[row]
        for point, at, score in zip(self.points, at_D, score_D, strict=True):
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
                return self.redraws.go_on(row, index, point, logits_V)
            token = point.help if asks else point.answer
        return token, 0
