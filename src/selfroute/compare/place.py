"""How far a comparison is, and how long it may still take."""

from __future__ import annotations

import time
from pathlib import Path

from selfroute.compare.config import CompareConfig
from selfroute.compare.methods import BOUNDS, ROUTERS
from selfroute.compare.rows import row_info


class Place:
    """How far the whole matrix is, in words."""

    def __init__(self, config: CompareConfig, testbed: Path) -> None:
        bounds, routers = ([m for m in config.methods if m in kind] for kind in (BOUNDS, ROUTERS))
        self.rows = [(method, seed) for seed in config.seeds for method in (*bounds, *config.trained, *routers)]
        self.testbed = testbed
        self.started, self.at_start = time.monotonic(), self._finished()
        self.done, self.counted = self.at_start, self.started

    @property
    def left(self) -> int:
        """Rows that were not finished when they were last counted."""
        return len(self.rows) - self.done

    def _finished(self) -> int:
        return sum(row_info(self.testbed, *row) is not None for row in self.rows)

    def __str__(self) -> str:
        now = time.monotonic()
        # Progress comes often, and counting reads a file a row.
        if now - self.counted > 1:
            self.done, self.counted = self._finished(), now
        text = f"row {min(self.done + 1, len(self.rows))} of {len(self.rows)}"
        fresh = self.done - self.at_start
        if fresh:
            minutes = (now - self.started) / 60
            text += f", {minutes:.0f} min, about {minutes / fresh * self.left:.0f} left"
        return text
