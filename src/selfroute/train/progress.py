"""What a training step reports, where it is logged, and how a run is asked to stop."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from selfroute.errors import ConfigError
from selfroute.train.config import TrainConfig
from selfroute.train.plan import Judged
from selfroute.types import Answer, HelpCall, Undecided


@dataclass(slots=True)
class StepRecord:
    """What a step did, as it stands in metrics.jsonl; shares are of the batch's responses.

    `help` is the share that asked, `asking` the mean probability of asking over the decisions that were made, which
    shows where help calls are forbidden too; cut responses made none. Under
    `early_exit` each response counts, with the highest probability of asking on its way.
    """

    step: int
    reward: float
    local_accuracy: float
    help: float
    asking: float
    wrong: float
    undecided: float
    d1: int
    d2: int
    dual: float
    cloud_calls: int
    cloud_tokens: int
    cost_usd: float
    cloud_share: float
    device_tokens: int
    rows: int
    decision_loss: float
    grad_norm: float
    seconds: dict[str, float]


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    """The shares of a step's responses, by their names in `StepRecord`."""
    everyone = [(d, ok) for one in judged for d, ok in zip(one.decisions, one.correct, strict=True)]
    odds = [r.score for one in judged for r in one.responses if r.score is not None]
    return {
        "local_accuracy": sum(ok for _, ok in everyone) / len(everyone),
        "help": sum(isinstance(d, HelpCall) for d, _ in everyone) / len(everyone),
        "asking": sum(0.5 + 0.5 * math.tanh(score / 2) for score in odds) / len(odds) if odds else 0.0,
        "wrong": sum(isinstance(d, Answer) and not ok for d, ok in everyone) / len(everyone),
        "undecided": sum(isinstance(d, Undecided) for d, _ in everyone) / len(everyone),
    }


def start_trackers(config: TrainConfig, out: Path) -> Any:
    """accelerate's trackers, started.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    missing = sorted(set(config.trackers) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        raise ConfigError(f"trackers need their packages: pip install {' '.join(missing)}")
    accelerator = Accelerator(log_with=list(config.trackers), project_dir=str(out))
    accelerator.init_trackers("selfroute", config=flat(config.model_dump(mode="json")))
    return accelerator


class Clock:
    """Seconds of each part of a step, and the processor's in all."""

    def __init__(self) -> None:
        self._last = self._start = time.perf_counter()
        self._cpu = time.process_time()
        self._parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        parts = {**self._parts, "total": time.perf_counter() - self._start, "cpu": time.process_time() - self._cpu}
        return {name: round(value, 3) for name, value in parts.items()}


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event, so that the step under way can finish; a second, of either, kills."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        # Not print: a signal may come in the middle of one.
        os.write(2, b"\nsaving after this step (once more: stop at once, back to the last checkpoint)\n")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, for trackers that know no tables."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return result
