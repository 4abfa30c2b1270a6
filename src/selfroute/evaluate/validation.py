"""One number for a trained model, by which learning rates are chosen and the best checkpoint is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from selfroute import measures
from selfroute.cloud.memory import Cloud
from selfroute.device.base import Sampling
from selfroute.evaluate.run import columns, evaluate, local_accuracy
from selfroute.tasks import Task
from selfroute.types import Progress

if TYPE_CHECKING:
    from selfroute.device.hf import HFEngine


def validation(
    engine: HFEngine,
    task: Task,
    cloud: Cloud,
    *,
    sampling: Sampling,
    seed: int,
    budget: float,
    alone: bool,
    progress: Progress | None = None,
) -> float:
    """Accuracy on the calibration problems, read off the model's own curve at a call rate of exactly the budget.

    A response that reaches no decision, which anyone can see, is asked first. The cloud is asked about every
    calibration problem, once for ever.

    Args:
        engine: the device.
        task: where the problems come from.
        cloud: its memory.
        sampling: how responses are drawn.
        seed: the same seed draws the same responses.
        budget: b, the share of problems that may go to the cloud.
        alone: the accuracy of the device alone, for a model that was taught solving only; the cloud is not asked.
        progress: told of the responses that are done.

    Raises:
        CloudError: the cloud failed; what it answered is kept.
    """
    if alone:
        return local_accuracy(engine, task, sampling=sampling, seed=seed, split="calibration", progress=progress)
    outcomes = evaluate(engine, task, cloud, sampling=sampling, seed=seed, split="calibration", progress=progress)
    c = columns(outcomes)
    undecided = np.array([o.route == "undecided" for o in outcomes])
    return measures.accuracy_at(replace(c, score=np.where(undecided, np.inf, c.score)), budget)
