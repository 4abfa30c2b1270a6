"""The hierarchical reward (arXiv:2509.24050, section 3.2): solving beats asking, asking beats form alone."""

from __future__ import annotations

from pydantic import Field, model_validator

from selfroute.config import Config
from selfroute.types import Answer, Decision, HelpCall


class RewardConfig(Config):
    """The reward's three weights, answer > cloud > format; with cloud and format 0, accuracy alone."""

    answer: float = Field(1.0, gt=0)
    """alpha_a: a correct local answer."""
    cloud: float = Field(0.25, ge=0)
    """alpha_c: a help call that the cloud answers correctly. At 0 training never asks the cloud."""
    format: float = Field(0.1, ge=0)
    """alpha_f: a well-formed local answer, right or wrong."""

    @model_validator(mode="after")
    def _order(self) -> RewardConfig:
        if not self.answer > self.cloud > self.format and (self.cloud, self.format) != (0, 0):
            raise ValueError("need answer > cloud > format (alpha_a > alpha_c > alpha_f), or cloud = format = 0")
        return self


def reward(decision: Decision, *, correct: bool, cloud_correct: bool | None, weights: RewardConfig) -> float:
    """The reward of one response.

    | response                                 | reward            |
    |------------------------------------------|-------------------|
    | answered, correct, well-formed           | alpha_a + alpha_f |
    | answered, correct, malformed             | alpha_a           |
    | help call, cloud correct                 | alpha_c           |
    | answered, wrong, well-formed             | alpha_f           |
    | anything else                            | 0                 |

    Args:
        decision: the response, parsed.
        correct: the verifier's verdict on the local answer; without meaning for a help call.
        cloud_correct: the verdict on the cloud's answer; None if the cloud was not asked.

    Raises:
        ValueError: a help call without a verdict on the cloud (a missing cloud is an error, never a 0).
    """
    if isinstance(decision, HelpCall):
        if weights.cloud == 0:
            return 0.0
        if cloud_correct is None:
            raise ValueError("a help call has no reward before the cloud's answer is judged")
        return weights.cloud if cloud_correct else 0.0
    if isinstance(decision, Answer):
        return weights.answer * correct + weights.format * decision.well_formed
    return 0.0
