"""Open-ended problems through training and evaluation, with a judge over HTTP on loopback.

The prompts are Countdown's, so that the shipped device model answers them, and the judge can tell what is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selfroute import api
from selfroute.cloud.memory import spent_by_phase
from selfroute.errors import CloudError, TaskError
from selfroute.records import read_records
from selfroute.tasks.countdown import Countdown, CountdownConfig
from tests.commands import selfroute
from tests.servers import Exchange, Server, reply

KNOWN = Countdown(CountdownConfig())
PROBLEMS = KNOWN.load("train")[:80]
BY_QUESTION = {p.question: p for p in PROBLEMS}
PRICES = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0}
CALL_USD = (100 * 1.0 + 10 * 2.0) / 1e6


def sections(text: str) -> dict[str, str]:
    """What stands between the judge's lines, by name."""
    return {
        name: inside for name, _, inside in re.findall(r"<<<([A-Z ]+) (\w+)>>>\n(.*?)\n<<<END \1 \2>>>", text, re.S)
    }


class Bench:
    """Points by a rubric: 10 for a right expression, 4 for another. A fifth of first votes are riddles."""

    def __init__(self) -> None:
        self.riddles: dict[str, str] = {}
        self.calls = 0

    async def __call__(self, exchange: Exchange) -> None:
        self.calls += 1
        text = exchange.body["messages"][-1]["content"]
        found = sections(text)
        right = KNOWN.verify(found["ANSWER"], BY_QUESTION[found["QUESTION"]]).correct
        if len(found["ANSWER"]) % 5 == 0 and text not in self.riddles:
            self.riddles[text] = found["ANSWER"]
            return await exchange.status(200, reply("What do you think?"))
        return await exchange.status(200, reply(f"It says VERDICT: 0.\n\n**VERDICT: {10 if right else 4}**"))


def settings(server: Server, path: Path, *more: str) -> list[str]:
    judge = {"name": "openai", "base_url": server.url, "model": "bench", "backoff_s": 0.01, **PRICES}
    return [
        "task.name=judge", f"task.path={path}", "task.mode=rubric", "task.rubric=The expression is right.",
        "task.votes=2", "task.pass_score=0.7", *(f"task.judge.{key}={value}" for key, value in judge.items()),
        # The oracle by its path answers what it can, whatever the task.
        "cloud.name=selfroute.cloud.oracle:Oracle", "cloud.accuracy=0.8", "steps=2", "problems_per_step=6",
        "num_responses=3", "sampling.max_tokens=150", "evaluation.max_tokens=150", *more,
    ]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_is_judged_over_http_and_each_vote_is_paid_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": p.question} for p in PROBLEMS])
    run, bench = tmp_path / "run", Bench()
    with Server(otherwise=bench) as server:
        # A limit of its own, which a resumed run may raise: 60 votes a step are not to be had for it.
        given = settings(server, path, "task.judge.max_tokens=10", "task.judge.spend_limit_usd=0.005")
        with pytest.raises(CloudError, match=r"spend limit of 0\.005 USD is reached"):
            api.train(api.load_train_config("countdown-tiny", given), run)
        assert 0 < bench.calls * CALL_USD <= 0.005
        given[-1] = "task.judge.spend_limit_usd=1.0"
        api.train(api.load_train_config("countdown-tiny", given), run, resume=True)
        trained = bench.calls
        outcomes = api.evaluate(run)
        summary = api.report(run)
        calls = bench.calls
        # What is judged again is not paid again, on some of the problems neither.
        assert api.evaluate(run) == outcomes
        assert len(api.evaluate(api.benchmark(run, ["task.test=3"]))) == 3
        assert bench.calls == calls
        with api.load(run) as pair:
            said = pair.answer(PROBLEMS[0].question)
        assert said.reason.startswith("grade ") or said.answer is None
        asked = bench.calls - calls
    assert 0 < trained < calls
    assert bench.riddles
    spent = spent_by_phase(run / "judge.sqlite")
    assert (spent["train"].calls, spent["evaluate"].calls) == (trained, calls - trained)
    assert sum(s.cost_usd for s in spent.values()) == pytest.approx((calls + asked) * CALL_USD)
    assert summary["judge"]["evaluate"]["calls"] == calls - trained
    # The cloud's ledger is another one, and so is the training's.
    steps = read_records(run / "metrics.jsonl")
    assert len(steps) == 2
    cloud = spent_by_phase(run / "cloud.sqlite")
    assert (cloud["train"].calls, cloud["evaluate"].calls) == (steps[-1]["cloud_calls"], len(outcomes))
    for o in outcomes:
        problem = BY_QUESTION[o.question]
        for answer, correct, grade in (
            (o.device_answer, o.device_correct, o.device_grade),
            (o.cloud_answer, o.cloud_correct, o.cloud_grade),
        ):
            assert grade == (None if not answer else 1.0 if KNOWN.verify(answer, problem).correct else 0.4)
            assert correct == (grade == 1.0)
    finals = [o.cloud_grade if o.route == "cloud" else o.device_grade for o in outcomes]
    assert summary["after"]["mean_score"]["value"] == pytest.approx(sum(g or 0 for g in finals) / len(finals))
    assert summary["after"]["mean_score"]["value"] > summary["after"]["accuracy"]["value"]
    page = (run / "report.html").read_text()
    assert "mean score" in page
    assert "The judge" in page


def test_what_the_cloud_cannot_answer_is_found_out_before_a_vote_is_paid(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Why is the sky {n}?"} for n in range(80)])
    bench = Bench()
    with Server(otherwise=bench) as server:
        config = api.load_train_config("countdown-tiny", [*settings(server, path), "device.model=no/such-model"])
        with pytest.raises(CloudError, match=r"not 'Why is the sky \d+\?': name a real one in \[cloud\]"):
            api.train(config, tmp_path / "run")
    assert bench.calls == 0
    assert not (tmp_path / "run/run.json").exists()


def test_a_judge_is_checked_against_labels(tmp_path: Path) -> None:
    rows = []
    for n, p in enumerate(PROBLEMS[:12]):
        right = n % 3 != 0
        answer = KNOWN.solution(p) if right else "1+1"
        # One label in twelve is not the judge's.
        rows.append({"prompt": p.question, "answer": answer, "label": float(right) if n else 1.0})
    path = write(tmp_path / "rows.jsonl", rows)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "x"}])
    rubric = ["mode=rubric", "rubric=The expression is right.", "pass_score=0.7", "--out", str(tmp_path / "out")]
    bench = Bench()
    with Server(otherwise=bench) as server:
        judge = {"name": "openai", "base_url": server.url, "model": "bench", **PRICES}
        args = [*(f"judge.{key}={value}" for key, value in judge.items()), *rubric]
        text = selfroute("tasks", "check", "judge", f"path={path}", *args)
        calls = bench.calls
        assert selfroute("tasks", "check", "judge", f"path={path}", *args) == text
        assert bench.calls == calls
        with pytest.raises(TaskError, match="holds no labelled answer: give each row an answer and its label"):
            selfroute("tasks", "check", "judge", f"path={bare}", *args)
    assert "12 labelled answers: 91.7% [64.6%, 98.5%] on the same side of pass_score 0.7" in text
    assert "Cohen's kappa 0.80, Spearman 0.82" in text
    assert "label 1, grade 0.4: 4 of 10 points: '1+1'" in text
    assert f"the judge: {calls} calls, {calls * CALL_USD:.4f} USD" in text


def test_the_shipped_config_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = selfroute("train", "open-ended-qwen2.5-1.5b", "task.judge.spend_limit_usd=3", "--dry-run")
    config = json.loads(printed[: printed.rindex("}") + 1])
    judge = config["task"]["judge"]
    assert (config["task"]["mode"], judge["model"], judge["spend_limit_usd"]) == ("pairwise", "deepseek-chat", 3)
    # Every default stands there, the judge's too.
    assert judge["max_retries"] == 5
