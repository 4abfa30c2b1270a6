"""Help calls that are declined, drawn again.

A model that asks early opens the tag before it has an answer, so that forbidding the help call behind the tags' shared
prefix would make it answer at once. `Redraws` takes the prefix back instead.

Axes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selfroute.device.base import Sampling
from selfroute.device.draw import drawn, uniforms
from selfroute.protocol import DecisionPoint


class Redraws:
    """The rows of a batch under `Sampling.early_exit`.

    Args:
        points: the decision points.
        names: of the rows' streams.
        sampling: the temperature and the token limit.
    """

    def __init__(self, points: Sequence[DecisionPoint], names: Sequence[str], sampling: Sampling) -> None:
        self.temperatures = [sampling.temperature] * len(names)
        self.begins = {point.prefix[0] for point in points if point.prefix}
        # For each token that stays, each form of the help call is declined at most once, and takes two draws.
        forms = max(1, len(self.begins))
        self.uniforms = [uniforms(f"{name}/declined", 2 * forms * sampling.max_tokens) for name in names]
        self.bare = [point.help for point in points if not point.prefix]
        self.draws = sampling.max_tokens * (1 + forms * max(len(point.prefix) for point in points))
        """Most draws of a row, with those of tokens that it took back."""
        self.taken_back = [0] * len(names)
        """Tokens of each row that it took back; their draws are not used again."""
        self._redrawn = [0] * len(names)
        # Where a row last opened a tag, and the logits that it did so from.
        self._opened: dict[int, tuple[int, Tensor]] = {}
        # Where a row last declined help calls, and the tags' first tokens of those.
        self._declined: dict[int, tuple[int, frozenset[int]]] = {}

    def note(self, row: int, index: int, token: int, logits_V: Tensor) -> None:
        """Remember what a row's token at `index` was drawn from, where it may open a tag."""
        if token in self.begins:
            self._opened[row] = index, logits_V.clone()

    def odds(self, row: int, index: int, point: DecisionPoint, logits_V: Tensor) -> float:
        """The log-odds of asking against all else that could have come where the tag was opened, in nats.

        Early on, the doubt lies in whether to open a tag; behind it little but the help call can come, and its odds
        against the answer say nothing. Where the tag was bound to come, they are those odds.
        """
        log_p = float(logits_V.cpu().double().log_softmax(-1)[point.help])
        opened_V = self._opened_at(row, index, point)
        if opened_V is not None:
            log_p += float(opened_V.cpu().double().log_softmax(-1)[point.prefix[0]])
        return log_p - math.log(-math.expm1(min(log_p, -1e-12)))

    def _opened_at(self, row: int, index: int, point: DecisionPoint) -> Tensor | None:
        """The logits from which a row opened the tag that it is in; None where that was before the draws began."""
        opened, opened_V = self._opened.get(row, (-1, None))
        return opened_V if point.prefix and opened == index - len(point.prefix) else None

    def declined(self, row: int, index: int, point: DecisionPoint) -> bool:
        """Whether this help call was declined at its place before, so that it cannot come there any more."""
        place, forms = self._declined.get(row, (-1, frozenset()))
        return bool(point.prefix) and place == index - len(point.prefix) and point.prefix[0] in forms

    def go_on(self, row: int, index: int, point: DecisionPoint, logits_V: Tensor) -> tuple[int, int]:
        """The next token of a row whose help call was drawn and is declined, and how many tokens it takes back.

        Drawn again from what else could have come where the tag was opened: with P the help call's probability there,
        any other way to go on has 1 / (1 - P) times its own. Where that is another token than the tag's first, the
        prefix goes; where it is that one again, or comes back to it by way of another form, the help call cannot come
        behind it. Once begun, a prefix of several tokens counts as certain.

        Args:
            row: its number in the batch.
            index: how many tokens it has, up to the decision.
            point: the form of its decision point.
            logits_V: those that the help call was drawn from.
        """
        chances_V, n = self._chances(row, logits_V), len(point.prefix)
        warmth = self.temperatures[row] or 1
        opened_V = None if self.declined(row, index, point) else self._opened_at(row, index, point)
        if opened_V is not None:
            place, forms = self._declined.get(row, (-1, frozenset()))
            self._declined[row] = index - n, (forms if place == index - n else frozenset()) | {point.prefix[0]}
            others_V = self._chances(row, opened_V)
            others_V[point.prefix[0]] *= 1 - chances_V[point.help]
            others_V[self.bare] = 0
            token = self._draw(row, others_V)
            if token != point.prefix[0]:
                self.taken_back[row] += n
                # It may open another form's tag.
                self.note(row, index - n, token, others_V.log() * warmth)
                return token, n
        chances_V[[point.help, *self.bare]] = 0
        token = self._draw(row, chances_V)
        self.note(row, index, token, chances_V.log() * warmth)
        return token, 0

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.temperatures = [self.temperatures[row] for row in rows]
        self.uniforms = [self.uniforms[row] for row in rows]
        self.taken_back = [self.taken_back[row] for row in rows]
        self._redrawn = [self._redrawn[row] for row in rows]
        self._opened = {n: self._opened[row] for n, row in enumerate(rows) if row in self._opened}
        self._declined = {n: self._declined[row] for n, row in enumerate(rows) if row in self._declined}

    def join(self, other: Redraws) -> None:
        """Go on with another's rows behind these."""
        count = len(self.uniforms)
        self.temperatures = self.temperatures + other.temperatures
        self.uniforms = self.uniforms + other.uniforms
        self.taken_back = self.taken_back + other.taken_back
        self._redrawn = self._redrawn + other._redrawn
        self._opened |= {count + row: opened for row, opened in other._opened.items()}
        self._declined |= {count + row: declined for row, declined in other._declined.items()}

    def _chances(self, row: int, logits_V: Tensor) -> Tensor:
        return torch.softmax(logits_V.cpu().double() / (self.temperatures[row] or 1), dim=-1)

    def _draw(self, row: int, weights_V: Tensor) -> int:
        if self.temperatures[row] == 0:
            return int(weights_V.argmax())
        uniform = float(self.uniforms[row][self._redrawn[row]])
        self._redrawn[row] += 1
        return drawn(weights_V, uniform)
