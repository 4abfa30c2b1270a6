"""Training with a cloud over HTTP, on a real server that fails now and then."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selfroute import api
from selfroute.cloud.oracle import Oracle, OracleConfig
from selfroute.config import Choice
from selfroute.errors import CloudError, RunError
from selfroute.records import read_json, read_records
from selfroute.types import CloudRequest
from tests.e2e.test_cli import SMALL
from tests.servers import Exchange, Server, reply

ORACLE = Oracle(OracleConfig())


async def solve(exchange: Exchange) -> None:
    request = CloudRequest(messages=tuple(exchange.body["messages"]))
    answer = await ORACLE.complete(request)
    await exchange.status(200, reply(answer.text))


class Flaky:
    """Every fifth problem fails the first time: by a status, a broken connection, or half an answer."""

    def __init__(self) -> None:
        self.failed: dict[str, int] = {}

    async def __call__(self, exchange: Exchange) -> None:
        question = exchange.body["messages"][-1]["content"]
        digest = hashlib.sha256(question.encode()).digest()
        if digest[0] % 5 or question in self.failed:
            return await solve(exchange)
        self.failed[question] = digest[1] % 3
        if digest[1] % 3 == 0:
            return await exchange.status(429, {"error": {"message": "slow down"}}, Retry_After="0")
        if digest[1] % 3 == 1:
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n" + b'{"choices": [{')
        exchange.writer.close()
        return None


def train(
    server: Server, out: Path, *, steps: int = 4, resume: bool = False, **cloud: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    settings = {
        "name": "openai", "base_url": server.url, "model": "oracle", "backoff_s": 0.01,
        "usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 2.0, **cloud,
    }  # fmt: skip
    config = api.load_train_config("countdown-tiny", [*SMALL, f"steps={steps}", "problems_per_step=16"])
    saved = api.train(config.model_copy(update={"cloud": Choice(**settings)}), out, resume=resume)
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(out / "metrics.jsonl")]
    return records, load_file(saved / "model.safetensors")


def test_faults_of_the_cloud_change_nothing_and_cost_nothing_twice(tmp_path: Path) -> None:
    flaky = Flaky()
    with Server(otherwise=solve) as server:
        steps, weights = train(server, tmp_path / "calm")
        asked = len(server.requests)
    with Server(otherwise=flaky) as server:
        again, same = train(server, tmp_path / "flaky")
        assert len(server.requests) == asked + len(flaky.failed)
    assert set(flaky.failed.values()) == {0, 1, 2}
    # What broke off may have been charged, and stands in the ledger as money.
    assert [{**step, "cost_usd": 0} for step in again] == [{**step, "cost_usd": 0} for step in steps]
    assert sum(step["cost_usd"] for step in again) > sum(step["cost_usd"] for step in steps)
    assert all((weights[name] == same[name]).all() for name in weights)
    with sqlite3.connect(tmp_path / "flaky/cloud.sqlite") as db:
        calls, problems, usd = db.execute(
            "SELECT COUNT(*), COUNT(DISTINCT problem), SUM(cost_usd) FROM calls WHERE key != ''"
        ).fetchone()
    assert calls == problems == asked
    assert usd == pytest.approx(asked * (100 * 1.0 + 10 * 2.0) / 1e6)


def test_a_spend_limit_stops_a_run_which_goes_on_with_a_higher_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Server(otherwise=solve) as server:
        # 120 micro-dollars an answer, and some 350 before it is known: a few of the first step's answers fit.
        limit = {"max_tokens": 10, "spend_limit_usd": 0.001}
        with pytest.raises(CloudError, match=r"spend limit of 0\.001 USD is reached.*raise spend_limit_usd"):
            train(server, run, steps=2, **limit)
        assert 0 < len(server.requests) * 120e-6 <= 0.001
        with pytest.raises(CloudError, match="spend limit"):
            train(server, run, steps=2, resume=True, **limit)
        train(server, run, steps=2, resume=True, **{**limit, "spend_limit_usd": 1.0})
        assert read_json(run / "run.json")["config"]["cloud"]["spend_limit_usd"] == 1.0
        with pytest.raises(RunError, match=r"made with other settings \(cloud\)"):
            train(server, run, steps=2, resume=True, **limit, model="another")
        once = len(server.requests)
        whole, weights = train(server, tmp_path / "whole", steps=2, max_tokens=10)
        assert len(server.requests) == 2 * once
        again, same = train(server, run, steps=2, resume=True, max_tokens=10)
    assert again == whole
    assert all((weights[name] == same[name]).all() for name in weights)
