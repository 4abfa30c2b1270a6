"""The real command line, in an empty folder, as a user types it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfroute import api
from selfroute.records import read_records

SELFROUTE = str(Path(sys.executable).with_name("selfroute"))
SMALL = [
    "task.train=60",
    "task.calibration=20",
    "task.test=30",
    "problems_per_step=6",
    "num_responses=4",
]


def selfroute(*args: str, cwd: Path, code: int = 0, timeout: float = 240, **env: str) -> str:
    """What a command printed, with more in its environment."""
    done = subprocess.run(
        [SELFROUTE, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SELFROUTE, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run in `run`, trained, calibrated and evaluated through the CLI."""
    cwd = tmp_path_factory.mktemp("home")
    out = selfroute("train", "countdown-tiny", *SMALL, "steps=2", "--out", "run", cwd=cwd)
    assert "selfroute evaluate run" in out
    selfroute("evaluate", "run", "--before", cwd=cwd)
    selfroute("evaluate", "run", cwd=cwd)
    assert "95 % interval" in selfroute("calibrate", "run", "--budget", "0.3", cwd=cwd)
    assert "budget 30 %" in selfroute("evaluate", "run", "--budget", "0.3", cwd=cwd)
    return cwd


def test_help_is_fast_and_teaches(tmp_path: Path) -> None:
    best = min(_cpu_s(lambda: selfroute("--help", cwd=tmp_path)) for _ in range(5))
    assert best < 0.5
    text = selfroute("--help", cwd=tmp_path)
    for command in ("train", "evaluate", "calibrate", "report", "demo", "ask", "warmstart"):
        assert command in text
        assert "Usage" in selfroute(command, "--help", cwd=tmp_path)
    # Brackets are no mark-up, and the lines of a paragraph are one.
    text = selfroute("keys", "new", "--help", cwd=tmp_path)
    assert "[default: for ever]" in " ".join(text.split())
    assert "those of the whole gateway hold all the" in text


@pytest.mark.parametrize("width", [40, 60, 79, 80])
def test_help_names_every_option_whole_in_a_narrow_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = selfroute("keys", "new", "--help", cwd=tmp_path)
    for option in ("--requests-per-minute", "--usd-per-day", "--help"):
        assert option in text
    assert "calibrate" in selfroute("--help", cwd=tmp_path)


def test_the_version(tmp_path: Path) -> None:
    assert selfroute("--version", cwd=tmp_path).strip() == version("selfroute")


def _cpu_s(call: Any) -> float:
    """CPU seconds of a command, which is what it takes where nothing else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_readmes_python_runs_in_a_fresh_process(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    small = [*SMALL, "task.calibration=60", "steps=2"]
    assert '["steps=50"]' in snippet
    done = subprocess.run(
        [sys.executable, "-c", snippet.replace('["steps=50"]', repr(small))],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Reply(question=" in done.stdout


def test_dry_run_prints_the_resolved_config_and_does_nothing(tmp_path: Path) -> None:
    out = selfroute("train", "countdown-tiny", "steps=7", "cloud.accuracy=0.5", "--dry-run", cwd=tmp_path)
    # The memory goes to stderr, which `selfroute` here returns last.
    printed, memory = out.split("\nmemory: ")
    assert re.fullmatch(r"about \d\.\d GB at most \(weights .*\); \d+\.\d GB free\n", memory)
    config = json.loads(printed)
    assert (config["steps"], config["cloud"]["accuracy"], config["budget"]) == (7, 0.5, 0.3)
    # Settings left alone are written out too.
    assert (config["cloud"]["latency_s"], config["task"]["seed"]) == (2.0, 0)
    assert json.loads(selfroute("warmstart", "countdown-1m", "--dry-run", cwd=tmp_path))["hidden_size"] == 128
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_adapters_on_4_bit_weights(tmp_path: Path) -> None:
    out = selfroute(
        "train", "countdown-tiny", "device.lora={rank=4}", "device.quantize=4bit", "device.dtype=bfloat16", "--dry-run",
        cwd=tmp_path,
    )  # fmt: skip
    assert json.loads(out.split("\nmemory: ")[0])["device"]["quantize"] == "4bit"
    assert re.search(r"\nmemory: about \d\.\d GB at most", out)
    text = selfroute("train", "countdown-tiny", "device.quantize=4bit", "--dry-run", cwd=tmp_path, code=1)
    assert "quantized weights are not trained: set lora, such as device.lora={rank=16}" in text


def test_a_dry_run_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = selfroute("train", "countdown-qwen2.5-3b", "--dry-run", cwd=tmp_path)
    assert '"model": "Qwen/Qwen2.5-3B-Instruct"' in out
    assert "memory: not known (cannot load the device model 'Qwen/Qwen2.5-3B-Instruct'" in out
    out = selfroute("train", "code-taco", "--unsafe-sandbox", "--dry-run", cwd=tmp_path)
    task = json.loads(out.split("\nmemory: ")[0])["task"]
    assert (task["name"], task["dataset"], task["unsafe_sandbox"]) == ("code", "taco-verified", True)
    out = selfroute("train", "countdown-tiny", "device.model=./none", "--dry-run", cwd=tmp_path)
    assert "memory: not known (cannot load the device model './none'" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "nope"], "no such config: 'nope'"),
        (["train", "countdown-tiny", "stesp=3"], "stesp: Extra inputs are not permitted"),
        (["train", "countdown-tiny", "task.nubmer_max=3", "--dry-run"], "nubmer_max: Extra inputs are not permitted"),
        (["train", "countdown-tiny", "task.name=nope"], "known: addition, choice, code, countdown"),
        (
            ["train", "code-taco", "device.model=countdown-1m", "task.path=data/taco-verified"],
            "no such file or folder: data/taco-verified",
        ),
        (["train", "countdown-tiny", "--unsafe-sandbox"], "unsafe_sandbox: Extra inputs are not permitted"),
        (["evaluate", "damaged"], "run.json is damaged: it holds no config"),
        (["train", "countdown-tiny", "device.model=no/such-model", "steps=1"], "cannot load the device model"),
        (["evaluate", "nowhere"], "not a run directory"),
        (["report", "nowhere"], "not a run directory"),
        (["calibrate", "nowhere", "--budget", "0.3"], "not a run directory"),
        (["calibrate", "nowhere", "--budget", "30"], "between 0 and 1"),
        (["ask", "nowhere", "1 2 3 4"], "not a run directory"),
        (["ask", "countdown-tiny", "hello"], "3 to 6 whole numbers and a target"),
        (["ask", "mine.toml", "hello"], "3 to 6 whole numbers and a target"),
        (["ask", "nowhere.toml", "1 2 3 4"], "no such file: nowhere.toml"),
    ],
)
def test_errors_name_the_cause_without_a_traceback(tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text("{}")
    (tmp_path / "mine.toml").write_bytes((Path(api.__file__).parent / "configs/countdown-tiny.toml").read_bytes())
    text = selfroute(*args, cwd=tmp_path, code=1)
    assert message in text
    assert "Traceback" not in text


def test_the_run_reports(trained: Path) -> None:
    run = trained / "run"
    text = selfroute("report", "run", cwd=trained)
    for row in ("untrained device model", "random offloading", "selfroute, budget", "oracle", "cloud alone"):
        assert row in text
    summary = json.loads((run / "summary.json").read_text())
    interval = {"value", "low", "high"}
    for key in ("local_accuracy", "call_rate", "decision_auc"):
        assert set(summary["before"][key]) == interval
    for key in ("accuracy", "call_rate", "local_accuracy", "pgr_vs_untrained", "routing_gain_captured"):
        assert set(summary["after"][key]) == interval
    for key in ("accuracy", "call_rate", "accuracy_at_30", "routing_gain_captured"):
        assert set(summary["at_budget_30"][key]) == interval
    for key in ("random_at_30", "oracle_at_30", "cloud"):
        assert set(summary[key]["accuracy"]) == interval
    assert {"cloud_calls", "cost_usd", "seconds", "cpu_seconds", "steps", "seconds_per_step"} <= set(summary["train"])
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in page


def test_records_hold_what_the_measures_need(trained: Path) -> None:
    records = read_records(trained / "run/evaluations/after/records.jsonl")
    assert len(records) == 30
    for r in records:
        assert {"problem", "response", "route", "score", "device_correct", "cloud_correct", "cloud_cost_usd"} <= set(r)
        asked = r["route"] == "cloud"
        assert r["correct"] == (r["cloud_correct"] if asked else r["device_correct"])
        assert r["cloud_cost_usd"] > 0
        assert (r["device_solve_share"] is not None) == asked


def test_ask_shows_the_decision_and_its_price(trained: Path) -> None:
    question = "numbers 13, 17, 19; target 97"
    with api.load(trained / "run") as pair:
        routes = {pair.answer(question, seed=seed).route: seed for seed in range(40)}
    for route, says in (("device", "answers itself"), ("cloud", "asks the cloud")):
        text = selfroute("ask", "run", question, "--seed", str(routes[route]), cwd=trained)
        assert "  device | 1:" in text
        assert f"the device {says} (l = " in text
        assert f"from the {route}" in text
        assert "verdict    " in text
    assert "l = " in selfroute("ask", "run", "numbers 1, 2, 3; target 6", "--budget", "0.3", cwd=trained)
    assert "not calibrated" in selfroute("ask", "run", "1 2 3 6", "--budget", "0.5", cwd=trained, code=1)


def test_the_python_api_does_the_same(trained: Path) -> None:
    with api.load(trained / "run", budget=0.3) as pair:
        reply = pair.answer("numbers 3, 7, 25; target 46")
    assert reply.route in ("device", "cloud", "undecided")
    assert reply.score is not None
    summary = api.report(trained / "run")
    assert summary["train"]["steps"] == 2


RESUMED = [*SMALL, "steps=6", "checkpoint_every=3"]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(run / "metrics.jsonl")]


def same_weights(a: Path, b: Path) -> bool:
    names = ("model.safetensors", "optimizer.safetensors")
    pairs = [(load_file(a / n), load_file(b / n)) for n in names]
    return all(set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_six_steps_equal_three_then_kill_then_three(tmp_path: Path) -> None:
    text = selfroute("train", "countdown-tiny", *RESUMED, "--out", "whole", "--resume", cwd=tmp_path)
    assert "no checkpoint in whole yet: starting from the first step" in text
    # Killed in the middle of step 5: steps 4 and 5 are past the checkpoint and are done again.
    process = start("train", "countdown-tiny", *RESUMED, "--out", "killed", cwd=tmp_path)
    wait_for_step(process, tmp_path / "killed", 4)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in sorted((tmp_path / "killed/checkpoints").iterdir())] == ["step-000003"]
    assert "already holds a run" in selfroute(
        "train", "countdown-tiny", *RESUMED, "--out", "killed", cwd=tmp_path, code=1
    )
    selfroute("train", "countdown-tiny", *RESUMED, "--out", "killed", "--resume", cwd=tmp_path)
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "killed")
    assert same_weights(*(tmp_path / n / "checkpoints/step-000006" for n in ("whole", "killed")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_step_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    settings = [*SMALL, "steps=5", "checkpoint_every=100"]
    process = start("train", "countdown-tiny", *settings, "--out", "run", cwd=tmp_path)
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "saving after this step" in text
    assert "run the same command with --resume" in text
    assert "Traceback" not in text
    done = len(steps_of(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoints/step-{done:06d}").is_dir()
    text = selfroute("train", "countdown-tiny", *settings, "--out", "run", "--resume", cwd=tmp_path)
    assert "no checkpoint" not in text
    assert f"resumed after step {done}" in text
    assert "reward" in text
    selfroute("train", "countdown-tiny", *settings, "--out", "whole", cwd=tmp_path)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    settings = [*SMALL, "steps=4", "checkpoint_every=2"]
    # A process that may not write files over 1 MB meets the same refusal as on a full disk.
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "limited", SELFROUTE]
    done = subprocess.run(
        [*limited, "train", "countdown-tiny", *settings, "--out", "run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot save a checkpoint" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(steps_of(tmp_path / "run")) == 2
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    selfroute("train", "countdown-tiny", *settings, "--out", "run", "--resume", cwd=tmp_path)
    assert len(steps_of(tmp_path / "run")) == 4


def test_a_failing_cloud_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    (tmp_path / "clouds.py").write_text((Path(__file__).parents[1] / "clouds.py").read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [SELFROUTE, "train", "countdown-tiny", *SMALL, "cloud.name=clouds:FlakyOracle",
         f"cloud.broken={tmp_path / 'broken'}", "cloud.answers_first=12", "steps=9", "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "connection refused" in done.stderr
    assert "will not be paid again" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(steps_of(tmp_path / "run")) >= 1
    assert list((tmp_path / "run/checkpoints").iterdir())
