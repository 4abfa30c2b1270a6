"""The committed results page is what the committed results say."""

from __future__ import annotations

import pytest
from benchmarks.page import ROOT, page


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_results_page_follows_from_the_committed_results() -> None:
    assert page() == (ROOT / "docs/results.md").read_text()
