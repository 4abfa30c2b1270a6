"""The settings of a post-training run; without torch, so that reports can be read anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from selfroute.cloud import CLOUDS, SERVES, whole_task
from selfroute.config import Choice, Config, resolve, validate
from selfroute.device.base import DeviceConfig, Sampling
from selfroute.errors import ConfigError
from selfroute.tasks import TASKS
from selfroute.train.reward import RewardConfig
from selfroute.types import Handoff


class Evaluation(Sampling):
    """How responses are drawn when a run is evaluated, calibrated and asked, what the cloud is given of those that ask,
    and how often a run is evaluated while it trains."""

    handoff: Handoff = "problem"
    """The problem alone, or the device's reasoning too; in training always the problem alone, so that one answer serves
    all of a problem's responses."""
    every: int = Field(0, ge=0)
    """Steps between evaluations on the calibration problems, which keep the best checkpoint beside the newest; 0: none.
    Each problem's cloud answer is bought once."""


class TrainConfig(Config):
    """One post-training run."""

    task: Choice = Choice(name="countdown")
    """Where problems come from and how answers are judged."""
    device: DeviceConfig = DeviceConfig()
    """The on-device model to start from."""
    cloud: Choice = Choice(name="oracle")
    """The cloud that answers help calls."""
    reward: RewardConfig = RewardConfig()
    """alpha_a, alpha_c, alpha_f, and what a token costs."""
    sampling: Sampling = Sampling(max_tokens=160)
    """How training responses are drawn; the temperature must be 1. With `forbid_help` no response asks: each teaches
    solving, and the decision loss alone teaches asking. With `early_exit` that is taught at every line break, and
    `evaluation` has it too."""
    evaluation: Evaluation = Field(Evaluation(max_tokens=160), validate_default=True)
    """How responses are drawn and handed over when the run is evaluated, calibrated and asked, and if the best
    checkpoint stays."""
    seed: int = 0
    """Seed of what the run draws, such as responses and the order of problems. New adapters (`device.lora`) begin the
    same whatever it is; tasks and the oracle have seeds of their own (`task.seed`, `cloud.seed`)."""
    steps: int = Field(100, ge=1)
    """Updates."""
    problems_per_step: int = Field(64, ge=1)
    """P: problems in a batch."""
    num_responses: int = Field(8, ge=2)
    """G: responses sampled for each problem."""
    budget: float = Field(0.3, ge=0, le=1)
    """b: share of problems that may go to the cloud; |D2| <= b / (1 - b) * |D1|."""
    algorithm: Literal["gapg", "rloo", "dr_grpo", "grpo", "da_grpo", "lagrangian_gapg"] = "gapg"
    """The advantage rule and the problems learned from; all but `gapg` are there to be compared with."""
    d1: Literal["any_correct", "mixed"] = "any_correct"
    """D1 holds problems with a correct local answer, or those with both correct and other responses."""
    dual_rate: float = Field(0.2, gt=0)
    """`da_grpo` and `lagrangian_gapg`: how fast lambda follows the call rate in excess of the budget."""
    decision_weight: float = Field(1.0, ge=0)
    """Weight of the decision loss; 0 gives the paper's method exactly."""
    decision_cloud: Literal["estimate", "call"] = "estimate"
    """Where the decision loss lacks the cloud's verdict: use the running share of correct ones, or buy it."""
    lr: float = Field(2e-4, gt=0)
    """AdamW's learning rate at the first step."""
    lr_end: float = Field(1.0, ge=0, le=1)
    """Share of `lr` that is left at the last step; it falls in a straight line."""
    beta2: float = Field(0.95, gt=0, lt=1)
    """AdamW's second beta; the first is 0.9. No weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """The gradient is scaled down to this norm where it is longer; 0 leaves it as it is."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Padded response tokens in one forward pass; changes speed, memory and rounding only."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    checkpoint_every: int = Field(25, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log each step there, through accelerate."""

    @field_validator("sampling")
    @classmethod
    def _own_distribution(cls, sampling: Sampling) -> Sampling:
        if sampling.temperature != 1 or sampling.decide != "sample":
            raise ValueError("training samples from the model itself: temperature 1, decide sample")
        return sampling

    @field_validator("evaluation")
    @classmethod
    def _as_it_learned(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        learned = "sampling" in info.data and info.data["sampling"].early_exit
        return evaluation.model_copy(update={"early_exit": True}) if learned else evaluation

    @model_validator(mode="after")
    def _cloud_serves_the_task(self) -> TrainConfig:
        served = SERVES.get(self.cloud.name, ())
        # What a user's own questions ask shows when they are asked.
        own = self.task.name == "custom" or self.task.name not in TASKS
        if served and not own and self.task.name not in served:
            raise ValueError(
                f"the cloud {self.cloud.name!r} has exact solvers for {' and '.join(served)} alone, none for "
                f"{self.task.name}: name a real one, such as cloud.name=openai cloud.base_url=URL cloud.model=MODEL"
            )
        return self

    @model_validator(mode="after")
    def _something_teaches_asking(self) -> TrainConfig:
        if self.sampling.forbid_help and not self.decision_weight and self.reward.cloud:
            raise ValueError(
                "with sampling.forbid_help no help call is sampled: only the decision loss can teach asking"
            )
        return self

    @model_validator(mode="after")
    def _solving_beats_asking(self) -> TrainConfig:
        reward = self.reward
        most = reward.token_cost * self.sampling.max_tokens
        if most >= reward.answer - reward.cloud:
            raise ValueError(
                f"reward.token_cost: a right answer of sampling.max_tokens tokens would cost {most:g}, more than the "
                f"{reward.answer - reward.cloud:g} that it earns above a help call"
            )
        if self.sampling.early_exit and not (self.decision_weight and reward.cloud):
            raise ValueError(
                "sampling.early_exit needs decision_weight and reward.cloud > 0: the decision loss teaches it"
            )
        return self


def check_dtype(config: TrainConfig) -> None:
    """Refuse to train in float16; a run that was may be read all the same.

    Raises:
        ConfigError: it is.
    """
    if config.device.dtype == "float16":
        raise ConfigError(
            "float16 is not trained, since small gradients vanish in it: set device.dtype=bfloat16 or float32"
        )


def whole(config: TrainConfig) -> TrainConfig:
    """A training with every default of its task, its judge and its cloud written out, so that a record of it means the
    same for ever.

    Raises:
        ConfigError: no such task or cloud, or settings that it does not take.
    """
    choices = {"task": whole_task(config.task), "cloud": resolve(config.cloud, CLOUDS, "cloud")}
    return config.model_copy(update=choices)


def as_now(written: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote down, with those that came since at their defaults."""
    try:
        return whole(validate(TrainConfig, written, "what was written down")).model_dump(mode="json")
    except ConfigError:
        return dict(written)
