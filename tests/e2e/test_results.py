"""The committed results are what the committed rows say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from selfroute.compare.report import write_report

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_results_page_follows_from_the_committed_rows(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks/results/compare", tmp_path / "compare")
    write_report(tmp_path / "compare")
    assert (tmp_path / "compare/results.md").read_text() == (ROOT / "docs/results.md").read_text()
