"""The hierarchical reward (arXiv:2509.24050, section 3.2): solving beats asking, asking beats form alone."""

from __future__ import annotations

from pydantic import Field, model_validator

from selfroute.config import Config
from selfroute.types import Answer, Decision, HelpCall


class RewardConfig(Config):
    """The reward's three weights, answer > cloud > format, and the price of a token; with cloud and format 0, accuracy
    alone."""

    answer: float = Field(1.0, gt=0)
    """alpha_a: a correct local answer; of a graded one, its score's share."""
    cloud: float = Field(0.25, ge=0)
    """alpha_c: a help call that the cloud answers correctly; of a graded answer, its score's share. At 0 training never
    asks the cloud."""
    format: float = Field(0.1, ge=0)
    """alpha_f: a well-formed local answer, right or wrong."""
    token_cost: float = Field(0.0, ge=0)
    """What each token of a response costs, in units of reward a token."""

    @model_validator(mode="after")
    def _order(self) -> RewardConfig:
        if not self.answer > self.cloud > self.format and (self.cloud, self.format) != (0, 0):
            raise ValueError("need answer > cloud > format (alpha_a > alpha_c > alpha_f), or cloud = format = 0")
        return self


def reward(
    decision: Decision, *, score: float, cloud_score: float | None, weights: RewardConfig, tokens: int = 0
) -> float:
    """The reward of one response: what the table says, less `token_cost` for each of its tokens.

    | response                                 | reward            |
    |------------------------------------------|-------------------|
    | answered, correct, well-formed           | alpha_a + alpha_f |
    | answered, correct, malformed             | alpha_a           |
    | help call, cloud correct                 | alpha_c           |
    | answered, wrong, well-formed             | alpha_f           |
    | anything else                            | 0                 |

    Where a task is graded, alpha_a and alpha_c are multiplied by the score of the answer that they pay for.

    Args:
        decision: the response, parsed.
        score: the verdict's score of the local answer, in [0, 1]; without meaning for a help call.
        cloud_score: that of the cloud's answer; None if the cloud was not asked.
        weights: the alphas and the price of a token.
        tokens: the response's length, its end token included; 0 gives the table's value.

    Raises:
        ValueError: a help call without a verdict on the cloud (a missing cloud is an error, never a 0).
    """
    earned = 0.0
    if isinstance(decision, HelpCall) and weights.cloud:
        if cloud_score is None:
            raise ValueError("a help call has no reward before the cloud's answer is judged")
        earned = weights.cloud * cloud_score
    elif isinstance(decision, Answer):
        earned = weights.answer * score + weights.format * decision.well_formed
    return earned - weights.token_cost * tokens
