"""Probes: logistic regression on the device model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from selfroute.routers.base import Attempt, Routed, alike, scored


class Probe:
    """On the state where the response chose to answer. score = probability that the answer is wrong; the strength of
    the L2 penalty by cross-validation."""

    prompt_only = False

    def __init__(self) -> None:
        self.model = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=np.logspace(-4, 2, 7),
                cv=5,
                scoring="neg_log_loss",
                max_iter=2000,
                l1_ratios=(0,),
                use_legacy_attributes=False,
            ),
        )
        self.constant: float | None = None

    def fit(self, attempts: Sequence[Attempt], correct: Sequence[bool]) -> None:
        """Learn from states of training problems. With fewer than five of a kind their share is all there is to say."""
        wrong = np.array([not c for c in correct])
        if min(wrong.sum(), (~wrong).sum()) < 5:
            self.constant = float(wrong.mean()) if len(wrong) else 0.5
            return
        self.constant = None
        self.model.fit(np.stack([self._state(a) for a in attempts]), wrong)

    def route(self, attempts: Sequence[Attempt]) -> list[Routed]:
        if self.constant is not None:
            return scored(attempts, alike(attempts, self.constant))
        return scored(attempts, self.model.predict_proba(np.stack([self._state(a) for a in attempts]))[:, 1])

    def _state(self, attempt: Attempt) -> NDArray[np.float32]:
        return attempt.state


class PromptProbe(Probe):
    """The same on the state before the response's first token: what the device knows of a problem that it has read."""

    prompt_only = True

    def _state(self, attempt: Attempt) -> NDArray[np.float32]:
        return attempt.prompt_state
