"""What an audit's answers come to."""

from __future__ import annotations

from typing import Any

import pytest
from tests.audit import NOT_RUN, judge

KNOWN = [{"name": "jinja2", "version": "2.11.2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"], "description": ""}]}]
SKIPPED = [{"name": "jinja2", "skip_reason": "Dependency not found on PyPI"}]
CLEAN = [{"name": "numpy", "version": "2.4.6", "vulns": []}]


@pytest.mark.parametrize(
    ("canary", "found", "status", "said"),
    [
        ([], [], NOT_RUN, "NOT AUDITED"),
        (SKIPPED, SKIPPED, NOT_RUN, "NOT AUDITED"),
        ([{**KNOWN[0], "vulns": []}], CLEAN, NOT_RUN, "NOT AUDITED"),
        (KNOWN, CLEAN, 0, "1 packages, no known vulnerability"),
        (KNOWN, CLEAN + KNOWN, 1, "jinja2 2.11.2: CVE-1, fixed in 3"),
        (KNOWN, CLEAN + SKIPPED, 1, "jinja2: not audited"),
    ],
)
def test_no_answer_is_no_good_news(
    canary: list[dict[str, Any]], found: list[dict[str, Any]], status: int, said: str
) -> None:
    judged, lines = judge(canary, found)
    assert judged == status
    assert said in "\n".join(lines)
