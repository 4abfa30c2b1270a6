"""The comparison on the real command line: every row quickly, stopped and continued, and its page."""

from __future__ import annotations

import csv
import gzip
import json
import re
import signal
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from selfroute.compare.methods import METHODS
from tests.e2e.test_cli import selfroute, start, wait_for_step

QUICK = ("compare", "compare-countdown", "--quick", "seeds=[0]", "train.task.test=40", "--out", "out")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with every row of the quick comparison in `out`, and what the command printed."""
    cwd = tmp_path_factory.mktemp("compare")
    return cwd, selfroute(*QUICK, "--jobs", "2", cwd=cwd, timeout=580, COLUMNS="240")


def test_every_row_is_in_every_file(compared: tuple[Path, str]) -> None:
    cwd, printed = compared
    out = cwd / "out"
    rows = json.loads((out / "compare.json").read_text())
    assert [r["method"] for r in rows] == list(METHODS)
    for r in rows:
        assert r["testbed"] == "countdown-3"
        assert r["seeds"] == [0]
        assert set(r["call_rate"]) == {"value", "low", "high"}
        assert 0 <= r["accuracy"]["low"] <= r["accuracy"]["value"] <= r["accuracy"]["high"] <= 1
        # Methods with a score have a curve; the two sides alone are points.
        assert (r["accuracy_at_30"] is None) == (r["apgr"] is None)
        assert (r["train_cloud_calls"] is None) == (METHODS[r["method"]].kind == "bound")
        assert METHODS[r["method"]].label in printed
    by_method = {r["method"]: r for r in rows}
    assert by_method["device_only"]["call_rate"]["value"] == 0
    assert by_method["cloud_only"]["call_rate"]["value"] == 1
    assert by_method["task_tuning"]["train_cloud_calls"] == 0
    assert all(by_method[m]["difference_to_ours"] is not None for m in METHODS)
    numbers = list(csv.DictReader((out / "numbers.csv").open()))
    assert {n["method"] for n in numbers} == set(METHODS)
    accuracy = next(n for n in numbers if (n["method"], n["measure"]) == ("probe", "accuracy"))
    assert float(accuracy["value"]) == by_method["probe"]["accuracy"]["value"]
    curves = list(csv.DictReader((out / "curves.csv").open()))
    assert {c["method"] for c in curves} == {r["method"] for r in rows if r["accuracy_at_30"]}
    training = list(csv.DictReader((out / "training.csv").open()))
    assert {t["method"] for t in training} == {m for m, method in METHODS.items() if method.changes is not None}
    for name in ("curves", "dynamics"):
        assert (out / f"figures/countdown-3-{name}.svg").read_text().startswith("<svg")
        assert (out / f"figures/countdown-3-{name}.png").stat().st_size > 10_000


def test_every_number_on_the_page_leads_to_its_records(compared: tuple[Path, str]) -> None:
    cwd, _ = compared
    out = cwd / "out"
    page = (out / "report.html").read_text()
    assert not re.search(r'(?:src|href)="https?:', page), "the page must open offline"
    assert "<th>clairvoyant at 30 %</th>" in page
    anchors = set(re.findall(r'<tr id="([^"]+)"', page))
    inside = set(re.findall(r'href="#(r-[^"]+)"', page))
    assert inside == anchors == {f"r-countdown-3-{m}" for m in METHODS}
    files = [unquote(f) for f in re.findall(r'href="(countdown-3/[^"]+)"', page)]
    assert len([f for f in files if f.endswith(".records.jsonl.gz")]) == len(METHODS)
    assert all((out / f).is_file() for f in files)
    records = gzip.decompress((out / "countdown-3/rows/probe/seed-0.records.jsonl.gz").read_bytes()).splitlines()
    assert len(records) == 40


def test_again_it_pays_for_nothing_and_reports_the_same(compared: tuple[Path, str]) -> None:
    cwd, printed = compared
    kept = ("compare.json", "numbers.csv", "seeds.csv", "curves.csv", "training.csv", "report.html")
    before = {name: (cwd / "out" / name).read_bytes() for name in kept}
    again = selfroute(*QUICK, cwd=cwd, COLUMNS="240")
    assert "training" not in again
    assert {name: (cwd / "out" / name).read_bytes() for name in kept} == before
    table = again[: again.index("page:")]
    assert table in printed
    assert table in selfroute("report", "out", cwd=cwd, COLUMNS="240")
    assert {name: (cwd / "out" / name).read_bytes() for name in kept} == before


SMALL = (
    *("--quick", "seeds=[0]", "fit_problems=20", "train.steps=1", "train.task.test=20", "train.task.calibration=20"),
    *("--out", "out"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["compare-countdown-4", "compare-countdown-345", "compare-countdown-informed", "compare-addition"]
)
def test_every_other_testbed_runs_to_its_end(name: str, tmp_path: Path) -> None:
    selfroute("compare", name, *SMALL, cwd=tmp_path, timeout=580)
    rows = {r["method"]: r for r in json.loads((tmp_path / "out/compare.json").read_text())}
    assert rows.keys() >= {
        *("device_only", "task_tuning", "router_encoder", "router_boosting", "probe", "gapg", "gapg_decision"),
        "da_grpo",
    }
    assert rows["device_only"]["call_rate"]["value"] == 0


@pytest.mark.slow
def test_every_ablation_runs_to_its_end(tmp_path: Path) -> None:
    selfroute("compare", "ablate-countdown", *SMALL, cwd=tmp_path, timeout=580)
    rows = {r["method"] for r in json.loads((tmp_path / "out/compare.json").read_text())}
    # Each weight, share and cloud of the ablations, and each trained cloud with each of the others.
    assert rows >= {f"alpha_c={a}" for a in (0.1, 0.25, 0.5, 0.9)} | {f"rho={r}" for r in (0.1, 0.43, 1)}
    assert rows >= {f"G={g}" for g in (4, 8, 16)} | {f"decision_weight={w}" for w in (0, 0.3, 1, 3, 10)}
    clouds = ("0.7", "0.95", "1.0")
    assert rows >= {f"cloud={c}" for c in clouds} | {f"cloud={c}@accuracy={other}" for c in clouds for other in clouds}
    assert "help_sampled" in rows


@pytest.mark.slow
def test_ctrl_c_keeps_the_step_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = (
        *("compare", "compare-countdown", "--quick", "--out", "out", "seeds=[0]", 'methods=["gapg_decision"]'),
        *("train.steps=12", "train.task.test=20", "train.checkpoint_every=100"),
    )
    run = tmp_path / "out/countdown-3/runs/gapg_decision/lr-0.0003-seed-0"
    process = start(*command, cwd=tmp_path)
    wait_for_step(process, run, 2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "out holds what is done: run the same command again" in printed
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert 2 <= steps < 12
    assert not (tmp_path / "out/countdown-3/rows").exists()
    selfroute(*command, cwd=tmp_path)
    done = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert done == list(range(1, 13))
    assert (tmp_path / "out/countdown-3/rows/gapg_decision/seed-0.json").is_file()


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    command = (
        *("compare", "compare-countdown", "--quick", "--out", "out", "--jobs", "2", "seeds=[0]"),
        *('methods=["gapg_decision", "gapg"]', "train.steps=400", "train.checkpoint_every=1000"),
    )
    runs = tmp_path / "out/countdown-3/runs"
    process = start(*command, cwd=tmp_path)
    for method in ("gapg_decision", "gapg"):
        wait_for_step(process, runs / method / "lr-0.0003-seed-0", 2)
    process.kill()
    process.communicate()
    # Nobody told them; each saves after its step and ends, so the folder is free again.
    deadline = time.monotonic() + 60
    while not all(list(runs.glob(f"{method}/*/checkpoints/step-*")) for method in ("gapg_decision", "gapg")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    out = selfroute(*command[:-2], "train.steps=400", 'methods=["device_only"]', "train.task.test=20", cwd=tmp_path)
    assert "Device only" in out


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "no such method: gapgg" in selfroute(
        "compare", "compare-countdown", 'methods=["gapgg"]', "--out", "out", cwd=tmp_path, code=1
    )
    assert "did you mean seeds?" in selfroute("compare", "compare-countdown", "seed=[0]", cwd=tmp_path, code=1)
    printed = selfroute("compare", "compare-countdown", "--dry-run", "train.steps=7", cwd=tmp_path)
    assert json.loads(printed)["train"]["steps"] == 7
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty/bed").mkdir(parents=True)
    (tmp_path / "empty/bed/testbed.json").write_text("{}")
    assert "holds no finished row yet" in selfroute("report", "empty", cwd=tmp_path, code=1)
