"""Near-duplicates: training problems that all but repeat a test problem.

    question -> words, numbers, signs -> the set of three in a row
    near: the same numbers, and  |A ∩ B| / |A ∪ B| >= 0.7

Problems that differ in a number are exercises of one kind, and not near. What more than half of the test questions
share does not count, such as the request at their end. Left out on purpose: the same in other words or languages.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from selfroute.types import Problem

LEAST = 0.7
"""Of what either of two questions has, the share that both must have."""

_TOKEN = re.compile(r"\\?[^\W\d_]+|[0-9]+(?:\.[0-9]+)?|[^\w\s$]")

Pair = tuple[Problem, Problem]
"""A training problem, and the test problem that it is nearest to."""


def near(training: Sequence[Problem], test: Sequence[Problem]) -> list[Pair]:
    """The training problems that are near a test problem, each with the nearest one; the same problem is none.

    Nothing is missed: two near sets of n and m elements share at least ceil(0.7 n), so that a test question is found by
    any n - ceil(0.7 n) + 1 of its elements, the rarest (prefix filtering: Bayardo et al., WWW 2007).
    """
    known = [_Text(p.question) for p in test]
    counts = Counter(three for text in known for three in text.threes)
    common = {three for three, count in counts.items() if count > max(1, len(known) / 2)}
    index: dict[Three, list[int]] = defaultdict(list)
    for place, text in enumerate(known):
        text.threes -= common
        rarest = sorted(text.threes, key=lambda three: (counts[three], three))
        for three in rarest[: len(rarest) - math.ceil(LEAST * len(rarest)) + 1]:
            index[three].append(place)
    pairs = []
    for p in training:
        text = _Text(p.question)
        text.threes -= common
        places = {place for three in index.keys() & text.threes for place in index[three] if test[place].id != p.id}
        nearest = max(places, key=lambda place: (text.shared(known[place]), -place), default=None)
        if nearest is not None and text.shared(known[nearest]) >= LEAST:
            pairs.append((p, test[nearest]))
    return pairs


Three = tuple[str, ...]


class _Text:
    """A question's tokens, three in a row (all of them where there are fewer), and its numbers in order of size."""

    def __init__(self, question: str) -> None:
        tokens = _TOKEN.findall(question.lower())
        self.threes: set[Three] = set(zip(tokens, tokens[1:], tokens[2:], strict=False)) or {tuple(tokens)}
        self.numbers = sorted(token for token in tokens if token[0].isdigit())

    def shared(self, other: _Text) -> float:
        """The share of what either has that both have; 0 where their numbers differ."""
        if self.numbers != other.numbers:
            return 0.0
        both = len(self.threes & other.threes)
        return both / (len(self.threes) + len(other.threes) - both) if both else 0.0
