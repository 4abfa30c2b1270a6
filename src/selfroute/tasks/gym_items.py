"""Makes problems of reasoning-gym: runs in a worker of a pool, since with some settings one never ends."""

from __future__ import annotations

import json
import signal
import time
from types import FrameType
from typing import Any

import reasoning_gym

ITEM_CPU_S = 2.0
"""Processor seconds that an item may take; most take milliseconds. Not seconds of the clock, so that a busy machine
makes the same problems."""
CALL_CPU_S = 5.0
"""Processor seconds after which a call makes no further item."""


def items(family: str, settings: dict[str, Any], first: int, count: int) -> list[Any]:
    """The problems of `count` numbers from `first` on, or of fewer where they take long.

    Each is `question`, `answer` and `metadata`, as plain data, or `{"failure": why}` where the family makes none.
    """
    made: list[Any] = []
    began = time.process_time()
    while len(made) < count and time.process_time() - began < CALL_CPU_S:
        try:
            made.append(_item(family, settings, first + len(made)))
        except Exception as error:
            made.append({"failure": f"{type(error).__name__}: {str(error)[:200]}"})
    return made


def _item(family: str, settings: dict[str, Any], number: int) -> Any:
    # A worker calls in its main thread. Again and again, as numpy sometimes swallows what is raised.
    signal.signal(signal.SIGVTALRM, _late)
    signal.setitimer(signal.ITIMER_VIRTUAL, ITEM_CPU_S, 0.1)
    try:
        made = reasoning_gym.create_dataset(family, **settings, seed=number, size=1)[0]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return json.loads(json.dumps(made))


def _late(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no problem within {ITEM_CPU_S:g} processor seconds")
