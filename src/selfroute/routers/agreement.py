"""Agreement: several responses to a problem, their most frequent answer, and how few of them gave it.

Over samples of one prompt this is self-consistency (arXiv:2203.11171); over prompts that ask the same in other words it
is the training-free form of CARGO (arXiv:2607.20481). Answers are compared in the task's canonical form, which does not
tell whether they are right. `DecisionVotes` is what our own decision makes of the same samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from selfroute.protocol import parse
from selfroute.routers.base import Attempt, Routed
from selfroute.types import Answer, Response


class Agreement:
    """k responses vote. score = (k - votes of the winner + 1 - confidence) / k, so that confidence breaks ties."""

    prompt_only = False

    def __init__(self, canonical: Callable[[str], str], over: Literal["samples", "variants"]) -> None:
        self.canonical, self.over = canonical, over

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Nothing to learn."""

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        return [self._vote(a) for a in attempts]

    def _vote(self, attempt: Attempt) -> Routed:
        responses = (attempt.response, *(attempt.samples if self.over == "samples" else attempt.variants))
        answers = [_answer(r, self.canonical) for r in responses]
        votes = Counter(a for a in answers if a is not None)
        tokens = sum(len(r.token_ids) for r in responses)
        if not votes:
            return Routed(1.0, attempt.response, tokens)
        # The first of the most frequent answers: ties go to the response that would have stood without a vote.
        winner = max(votes, key=lambda answer: votes[answer])
        k = len(responses)
        score = (k - votes[winner] + 1 - attempt.confidence) / k
        return Routed(score, responses[answers.index(winner)], tokens)


class DecisionVotes:
    """k responses of a model that decides itself: each votes with its probability of answering, 1 / (1 + exp(l)).

    The answer with the largest sum of votes stands, and score = 1 - that sum / k. A response that its own decision
    doubts counts for little, so that one sound answer outweighs several that agree by chance.
    """

    prompt_only = False

    def __init__(self, canonical: Callable[[str], str]) -> None:
        self.canonical = canonical

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Nothing to learn: the decision was learned with the model."""

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        return [self._vote(a) for a in attempts]

    def _vote(self, attempt: Attempt) -> Routed:
        responses = (attempt.response, *attempt.samples)
        tokens = sum(len(r.token_ids) for r in responses)
        votes: dict[str, float] = {}
        best: dict[str, Response] = {}
        for r in responses:
            answer = _answer(r, self.canonical)
            if answer is None or r.score is None:
                continue
            votes[answer] = votes.get(answer, 0.0) + 1 / (1 + math.exp(min(r.score, 700.0)))
            best.setdefault(answer, r)
        if not votes:
            return Routed(1.0, attempt.response, tokens)
        winner = max(votes, key=lambda answer: votes[answer])
        return Routed(1 - votes[winner] / len(responses), best[winner], tokens)


def _answer(response: Response, canonical: Callable[[str], str]) -> str | None:
    decision = parse(response.text, finished=response.finished)
    return canonical(decision.text) if isinstance(decision, Answer) else None
