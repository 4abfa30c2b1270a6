"""How far a comparison is, and how long it may still take."""

from __future__ import annotations

import time
from pathlib import Path

from selfroute.compare.config import CompareConfig
from selfroute.compare.methods import BOUNDS, ROUTERS
from selfroute.compare.rows import row_info

ROUTER, BOUND = 0.1, 0.03
"""What a router's row and a bound's take, as shares of a training: shared responses, and no training."""


class Place:
    """How far the whole matrix is, in words."""

    def __init__(self, config: CompareConfig, testbed: Path) -> None:
        bounds, routers = ([m for m in config.methods if m in kind] for kind in (BOUNDS, ROUTERS))
        # The first seed trains every learning rate that there is to choose from.
        rates = {config.seeds[0]: len(config.lrs)}
        self.rows: dict[tuple[str, int], float] = {}
        for seed in config.seeds:
            self.rows |= {(m, seed): BOUND for m in bounds}
            self.rows |= {(m, seed): rates.get(seed, 1) for m in config.trained}
            self.rows |= {(m, seed): ROUTER for m in routers}
        self.testbed = testbed
        self.started = self.counted = time.monotonic()
        self._count()
        self.at_start = self.work_left

    @property
    def left(self) -> int:
        """Rows that were not finished when they were last counted."""
        return len(self.rows) - self.done

    def _count(self) -> None:
        missing = [work for row, work in self.rows.items() if row_info(self.testbed, *row) is None]
        self.done, self.work_left = len(self.rows) - len(missing), sum(missing)

    def __str__(self) -> str:
        now = time.monotonic()
        # Progress comes often, and counting reads a file a row.
        if now - self.counted > 1:
            self.counted = now
            self._count()
        text = f"row {min(self.done + 1, len(self.rows))} of {len(self.rows)}"
        fresh = self.at_start - self.work_left
        if fresh:
            minutes = (now - self.started) / 60
            text += f", {minutes:.0f} min, about {minutes / fresh * self.work_left:.0f} left"
        return text
