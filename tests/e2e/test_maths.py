"""Maths through the real command line: its tasks, its configs, and a run on fixture files with a cloud on loopback."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from selfroute.config import Choice
from selfroute.records import read_json, read_records
from selfroute.tasks import make_task
from selfroute.tasks.mathsets import MATH_SETS
from tests.e2e.test_cli import selfroute
from tests.servers import Exchange, Server, reply

FIXTURES = Path(__file__).parents[1] / "fixtures/maths"
CONFIGS = Path(__file__).parents[2] / "src/selfroute/configs"
MODELS = {
    "math-qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "math-llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "math-llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
}


def test_the_tasks_are_listed_with_source_size_and_licence(tmp_path: Path) -> None:
    text = selfroute("tasks", cwd=tmp_path)
    for name in ("countdown", "addition", *(f"maths dataset={name}" for name in MATH_SETS)):
        assert name in text
    for part in ("DigitalLearningGmbH/MATH-lighteval", "7,500 train / 5,000 test", "CC-BY-NC-SA-4.0", "licence"):
        assert part in text


def test_problems_are_shown_as_the_device_gets_them(tmp_path: Path) -> None:
    file = str(FIXTURES / "aime24.jsonl")
    text = selfroute("tasks", "show", "maths", "dataset=aime24", f"path={file}", "-n", "1", cwd=tmp_path)
    assert text.count("maths-") == 1
    for part in (
        "  system    Think step by step",
        "  user      Find",
        r"Give the final answer as \boxed{...}.",
        "  solution  ",
    ):
        assert part in text
    assert selfroute("tasks", "show", "countdown", "num_numbers=4", cwd=tmp_path).count("  user ") == 3
    assert "Add the numbers" in selfroute("tasks", "show", "addition", "--split", "calibration", cwd=tmp_path)


def test_verifiers_are_checked_and_what_fails_is_printed(tmp_path: Path) -> None:
    for args in (["countdown", "test=40"], ["addition"], ["maths", f"data_dir={FIXTURES}", "--split", "train"]):
        assert "problems pass" in selfroute("tasks", "check", *args, cwd=tmp_path)
    (tmp_path / "bad.jsonl").write_text(
        '{"question": "One?", "answer": "\\\\frac{"}\n{"question": "Two?", "answer": "(1+x"}\n'
        '{"question": "Three?", "answer": "x+1"}\n{"question": "Four?", "answer": "1+x"}\n'
    )
    text = selfroute("tasks", "check", "maths", "dataset=minervamath", "path=bad.jsonl", cwd=tmp_path, code=1)
    assert "another problem's answer is accepted" in text
    assert "of 4 problems fail" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["tasks", "show", "nope"],
            "no such choice: 'nope' (known: addition, choice, code, countdown",
        ),
        (["tasks", "show", "maths", "dataset=mmlu"], "dataset: Input should be 'math-lighteval'"),
        (["tasks", "show", "maths", "path=none.jsonl"], "no such file or folder: none.jsonl"),
        (["tasks", "check", "countdown", "--split", "dev"], "no such split: 'dev' (train, calibration or test)"),
        (
            ["train", "countdown-tiny", "task.name=maths"],
            "the cloud 'oracle' has exact solvers for countdown and addition",
        ),
        (
            ["train", "math-qwen2.5-1.5b", "cloud.name=oracle", "--dry-run"],
            "name a real one, such as cloud.name=openai",
        ),
    ],
)
def test_errors_name_the_cause_and_the_way_out(tmp_path: Path, args: list[str], message: str) -> None:
    text = selfroute(*args, cwd=tmp_path, code=1)
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_settings_are_valid(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = selfroute("train", name, "--dry-run", cwd=tmp_path).split("\nmemory: ")[0]
    config = json.loads(printed)
    assert config["device"]["model"] == MODELS[name]
    assert (config["task"]["name"], config["task"]["dataset"]) == ("maths", "math-lighteval")
    assert (config["cloud"]["model"], config["budget"]) == ("deepseek-reasoner", 0.3)
    text = (CONFIGS / f"{name}.toml").read_text()
    assert f"selfroute train {name}" in text
    for part in ("80 GB GPU", " GB and ", "USD in training", "Worked out in docs/scale.md, not run", "our choice"):
        assert part in " ".join(text.split())
    assert tomllib.loads(text)["cloud"]["spend_limit_usd"] == config["cloud"]["spend_limit_usd"]


def answers() -> dict[str, str]:
    """The reference answer to each question of the fixtures."""
    tasks = [make_task(Choice(name="maths", data_dir=str(FIXTURES), dataset=d)) for d in ("math-lighteval", "aime24")]
    loaded = [(t, p) for t in tasks for split in ("train", "calibration", "test") for p in _load(t, split)]
    return {p.question: t.solution(p) or "" for t, p in loaded}


def _load(task: Any, split: Any) -> Any:
    about = MATH_SETS[task.config.dataset]
    return task.load(split) if split == "test" or "train" in about.sizes else []


@pytest.mark.slow
def test_a_run_on_maths_trains_calibrates_and_is_evaluated_on_benchmarks(tmp_path: Path) -> None:
    known = answers()

    async def solve(exchange: Exchange) -> None:
        question = exchange.body["messages"][-1]["content"]
        await exchange.status(200, reply(rf"So it is <answer>\boxed{{{known[question]}}}</answer>"))

    with Server(otherwise=solve) as server:
        settings = [
            "task.name=maths", f"task.data_dir={FIXTURES}", "steps=2", "problems_per_step=6", "num_responses=4",
            "cloud.name=openai", f"cloud.base_url={server.url}", "cloud.model=teacher",
            "cloud.usd_per_million_prompt_tokens=1", "cloud.usd_per_million_completion_tokens=2",
            "sampling.max_tokens=60", "evaluation.max_tokens=60",
        ]  # fmt: skip
        selfroute("train", "countdown-tiny", *settings, "--out", "run", cwd=tmp_path)
        selfroute("evaluate", "run", "--before", cwd=tmp_path)
        selfroute("evaluate", "run", cwd=tmp_path)
        selfroute("calibrate", "run", "--budget", "0.5", cwd=tmp_path)
        assert "budget 50 %" in selfroute("evaluate", "run", "--budget", "0.5", cwd=tmp_path)
        text = selfroute("evaluate", "run", "task.dataset=aime24", "--budget", "0.5", cwd=tmp_path)
        folder = "run/benchmarks/task.dataset=aime24"
        assert f"kept in {folder}" in text
        assert "cloud alone" in selfroute("report", folder, cwd=tmp_path)
        # The run is left as it was.
        assert read_json(tmp_path / "run/run.json")["config"]["task"]["dataset"] == "math-lighteval"
        assert "of these test problems" in selfroute(
            "evaluate", "run", f"task.path={FIXTURES / 'math-lighteval/train.jsonl'}", cwd=tmp_path
        )
        refused = selfroute("evaluate", "run", "steps=3", cwd=tmp_path, code=1)
        assert "an evaluation can have other problems, task.KEY=VALUE, and nothing else" in refused
        unknown = selfroute("evaluate", "run", "task.dataset=aime24", "--budget", "0.2", cwd=tmp_path, code=1)
        assert "selfroute calibrate run --budget 0.2" in unknown
        questions = [exchange.body["messages"][-1]["content"] for exchange in server.requests]
    assert len(questions) == len(set(questions))
    steps = read_records(tmp_path / "run/metrics.jsonl")
    assert len(steps) == 2
    assert steps[-1]["cloud_calls"] > 0
    for place, count in (("run", 6), (folder, 2)):
        records = read_records(tmp_path / place / "evaluations/budget-0.5/records.jsonl")
        assert len(records) == count
        assert all(r["cloud_correct"] for r in records)
        assert {r["cloud_reason"] for r in records} == {"the same text"}
    assert os.path.samefile(tmp_path / "run/cloud.sqlite", tmp_path / folder / "cloud.sqlite")
