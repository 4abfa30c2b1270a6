"""Comparisons: their config, a run of what is missing, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfroute.config import load
from selfroute.extras import needs
from selfroute.records import lock_run
from selfroute.types import Progress

if TYPE_CHECKING:
    from selfroute.compare.config import CompareConfig


def load_config(name: str, overrides: Sequence[str] = ()) -> CompareConfig:
    """A comparison's config by package name or path, changed by `key=value` overrides."""
    from selfroute.compare.config import CompareConfig

    return load(CompareConfig, name, overrides)


def compare(
    config: str | CompareConfig,
    out: str | Path,
    *,
    jobs: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Run what is missing of a comparison, in `jobs` processes, and write its report into `out`.

    Returns the rows of compare.json.
    """
    resolved = load_config(config) if isinstance(config, str) else config
    with needs("compare"):
        from selfroute.compare import run
    run.compare(resolved, Path(out), jobs=jobs, progress=progress)
    return report(out, progress=progress)


def report(out: str | Path, *, progress: Progress = lambda what, done, total: None) -> list[dict[str, Any]]:
    """Write a comparison's compare.json, report.html, CSV and figures from its finished rows; returns the rows.

    Raises:
        RunError: no row is finished yet.
    """
    from selfroute.compare.report import write_report

    # Two testbeds that end together share a page, which is soon written.
    with lock_run(Path(out), wait=True):
        return write_report(Path(out), progress=progress)
