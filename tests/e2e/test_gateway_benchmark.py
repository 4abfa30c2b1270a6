"""The gateway's benchmarks in a short form: all sides run, the file has what it says, and the books agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_the_gateway_beside_a_direct_call(tmp_path: Path) -> None:
    found = run("gateway.py", tmp_path / "gateway.json", "--tiny")
    for figure in (
        "added_ms_p50",
        "added_ms_p99",
        "ttft_added_ms_p50",
        "handoff_added_ms_p50",
        "paced_added_ms_p50",
        "cpu_us_per_event",
    ):
        assert found[figure]["min"] <= found[figure]["median"] <= found[figure]["max"]
    assert found["cpu_us_per_event"]["median"] > 0
    # Not a piece was lost, doubled or out of its place, in 256 streams at once either.
    assert found["faults"] == {"direct": 0, "gateway": 0}
    assert found["streams_at_once"]["asked"] >= 256
    assert {(load["side"], load["kind"]) for load in found["loads"]} >= {("gateway", "handoff"), ("direct", "plain")}


@pytest.mark.parametrize("minutes", [0.05, pytest.param(0.35, marks=pytest.mark.slow)])
def test_mixed_load_with_faults(tmp_path: Path, minutes: float) -> None:
    found = run("load.py", tmp_path / "load.json", "--minutes", str(minutes))
    assert found["failures"] == []
    assert found["ended"]["answered"] > 20
    books = found["books"]["all"]
    # Of calls whose clients left it is a range: whether the last words arrived is not for the cloud to know.
    assert 0 < books["seen_nano"] <= books["spent_nano"] <= books["seen_at_most_nano"]
    assert found["open"]["after"]["tasks"] == found["open"]["before"]["tasks"]
