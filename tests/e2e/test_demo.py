"""The main job: quickly, in full, and from a wheel."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.e2e.test_cli import selfroute

ROOT = Path(__file__).parents[2]


def calls_of(run: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(run / "cloud.sqlite") as db:
        return db.execute("SELECT problem, phase FROM calls").fetchall()


def test_the_quick_demo_does_every_part_and_continues(tmp_path: Path) -> None:
    text = selfroute("demo", "--quick", "--out", "out", cwd=tmp_path)
    assert "report.html" in text
    run = tmp_path / "out"
    summary = json.loads((run / "summary.json").read_text())
    assert {"before", "after", "at_budget_30", "random_at_30", "oracle_at_30", "cloud", "train"} <= set(summary)
    calls = calls_of(run)
    assert len({problem for problem, _ in calls}) == len(calls), "a problem was paid twice"
    assert sum(phase == "train" for _, phase in calls) == summary["train"]["cloud_calls"]
    # Again: everything is there, nothing is done or paid twice, and the numbers stay.
    selfroute("demo", "--quick", "--out", "out", cwd=tmp_path)
    assert calls_of(run) == calls
    assert json.loads((run / "summary.json").read_text()) == summary


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_main_job_gives_its_numbers(tmp_path: Path) -> None:
    selfroute("demo", "--out", "out", cwd=tmp_path, timeout=3000)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    before = summary["before"]
    assert before["local_accuracy"]["value"] < 0.50
    assert 0.10 <= before["call_rate"]["value"] <= 0.20
    assert 0.45 <= before["decision_auc"]["value"] <= 0.55
    at_30 = summary["at_budget_30"]
    assert at_30["accuracy_at_30"]["value"] >= 0.90
    assert at_30["call_rate"]["value"] <= 0.33
    assert at_30["routing_gain_captured"]["value"] >= 0.90
    # The dial aims one standard error below the budget.
    aim = 0.3 - (0.3 * 0.7 / 500) ** 0.5
    assert aim - 0.005 < summary["calibration"]["0.3"]["call_rate"] <= aim
    calls = calls_of(tmp_path / "out")
    assert len({problem for problem, _ in calls}) == len(calls)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_the_quick_demo_in_an_empty_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel), *constraints], check=True, cwd=tmp_path)
    # The base install answers, and names what a command lacks.
    bare = tmp_path / "venv/bin/selfroute"
    done = subprocess.run([bare, "demo", "--quick", "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'selfroute[train]'" in done.stderr
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"{wheel}[train]", *constraints], check=True, cwd=tmp_path
    )
    subprocess.run([bare, "demo", "--quick", "--out", "out"], check=True, cwd=tmp_path, timeout=600)
    assert (tmp_path / "out/report.html").is_file()
