"""What Prometheus is told, of one process and of several, and who may ask."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serving import (
    FakeKey,
    FakeKeys,
    MemoryBudget,
    MemoryRecorder,
    ScriptedCloud,
    ScriptedDevice,
    said,
    serving,
)

from selfroute.protocol import HELP_CALL
from selfroute.serve import keys
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.budget import Budget, usage_of_all
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from selfroute.serve.history import RequestRecord
from selfroute.serve.metrics import Counted, Metrics
from selfroute.serve.refusal import RefusedError
from selfroute.serve.store import Store

CHAT = {"model": "selfroute", "messages": [{"role": "user", "content": "2+3?"}]}
CLOUD = RequestRecord(
    id="r", at=1.0, policy="auto", decision="help", route="cloud", status=200, device_prompt_tokens=50,
    device_completion_tokens=20, cloud_prompt_tokens=60, cloud_completion_tokens=300, cost_usd=0.25, first_ms=30.0,
    device_ms=400.0, cloud_ms=900.0, total_ms=1400.0,
)  # fmt: skip

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """Values by name and labels' values, in the order of the labels' names."""
    return {
        (sample.name.removeprefix("selfroute_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def told(records: Iterable[RequestRecord]) -> Samples:
    metrics = Metrics()
    for record in records:
        metrics.observe(record)
    return samples(metrics.page().decode())


def test_requests_decisions_denials_money_tokens_and_times() -> None:
    denied = replace(CLOUD, route="device", denied="share", cost_usd=0.0, cloud_ms=None, cloud_completion_tokens=-5)
    failed = RequestRecord(id="f", at=1.0, policy="cloud-only", route="cloud", status=502, denied="", cost_usd=0.5)
    found = told([CLOUD, CLOUD, denied, failed])
    assert found["requests_total", "auto", "cloud", "200"] == 2
    assert found["requests_total", "auto", "device", "200"] == 1
    assert found["requests_total", "cloud-only", "cloud", "502"] == 1
    assert found["decisions_total", "help"] == 3
    assert found["denials_total", "share"] == 1
    assert found["cloud_cost_usd_total",] == 1.0
    assert found["tokens_total", "completion", "cloud"] == 600
    assert found["device_seconds_sum",] == pytest.approx(1.2)
    assert found["cloud_seconds_count",] == 2
    assert found["first_token_seconds_bucket", "0.05"] == 3
    assert found["first_token_seconds_bucket", "0.025"] == 0
    assert found["request_seconds_count", "cloud"] == 3


def test_refusals_and_a_cloud_that_is_left_alone() -> None:
    class Cloud(ScriptedCloud):
        resting = True

    metrics, kept = Metrics(), MemoryRecorder()
    metrics.refuse(RefusedError(401, "no", code="invalid_api_key"))
    Counted(kept, metrics, Cloud()).record(CLOUD)
    metrics.dropped.inc(3)
    found = samples(metrics.page().decode())
    assert found["refused_total", "invalid_api_key", "401"] == 1
    assert found["cloud_resting",] == 1
    assert found["records_dropped_total",] == 3
    assert kept.records == [CLOUD]
    metrics.watch(ScriptedCloud())
    assert samples(metrics.page().decode())["cloud_resting",] == 0


def gateway(store: Store | None = None, **changes: Any) -> Gateway:
    metrics = Metrics()
    cloud = ScriptedCloud("fi", "ve", usd=0.002)
    budget = MemoryBudget()
    device = ScriptedDevice(said("hard", HELP_CALL))
    pair = Pair(device, cloud, budget, Counted(MemoryRecorder(), metrics, cloud))
    return Gateway(GatewayConfig(**changes.pop("config", {})), pair, budget, store=store, metrics=metrics, **changes)


def test_what_a_gateway_tells_of_its_requests() -> None:
    with serving(make_app(gateway())) as url, httpx2.Client(base_url=url, timeout=20) as client:
        before = samples(client.get("/metrics").text)
        for number in range(5):
            asked = {**CHAT, "user": f"user-{number}", "metadata": {"x": f"label-{number}"}}
            assert client.post("/v1/chat/completions", json=asked).status_code == 200
            client.post("/v1/chat/completions", json={**CHAT, "model": f"model-{number}"})
            client.post("/v1/chat/completions", json={**CHAT, "selfroute": {"policy": f"policy-{number}"}})
        response = client.get("/metrics")
    found = samples(response.text)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert found["requests_total", "auto", "cloud", "200"] == 5
    assert found["cloud_cost_usd_total",] == pytest.approx(0.01)
    assert found["refused_total", "model_not_found", "404"] == 5
    assert found["refused_total", "invalid_value", "400"] == 5
    assert before["requests_in_flight",] == found["requests_in_flight",] == 0
    # Nothing that a client writes is a label.
    assert not any(word in response.text for word in ("user-", "label-", "model-", "policy-"))


def test_with_keys_metrics_are_an_admins() -> None:
    shown = {"Bearer admin": FakeKey(admin=True), "Bearer other": FakeKey()}
    site = gateway(keys=FakeKeys(shown), config={"keys": True})
    with serving(make_app(site)) as url, httpx2.Client(base_url=url, timeout=20) as client:
        statuses = {
            shown: client.get("/metrics", headers={"authorization": shown} if shown else {}).status_code
            for shown in ("", "Bearer no", "Bearer other", "Bearer admin")
        }
    assert statuses == {"": 401, "Bearer no": 401, "Bearer other": 403, "Bearer admin": 200}


def test_the_budget_is_told_as_the_store_has_it(store: Store) -> None:
    limits = Limits(share=0.5, usd_per_day=2.0, min_requests=10)
    with store.begin() as connection:
        token, key = keys.new(connection, "laptop <b>", Limits(calls_per_minute=3))
        revoked, gone = keys.new(connection, "gone")
        keys.revoke(connection, gone.id)

    async def use() -> None:
        budget = Budget(store, limits)
        for _ in range(20):
            await budget.arrive(key.scope)
        held = await budget.reserve(0.75, key.scope)
        await budget.settle(held, 0.5)  # type: ignore[arg-type]
        await budget.reserve(0.25, key.scope)

    asyncio.run(use())
    with store.begin(write=False) as connection:
        usage = usage_of_all(connection, limits)
    text = Metrics().page(usage).decode()
    found = samples(text)
    assert found["budget_used", "share", "gateway"] == pytest.approx(0.1)
    assert found["budget_limit", "share", "gateway"] == 0.5
    assert found["budget_used", "usd_per_day", "gateway"] == pytest.approx(0.75)
    assert found["budget_used", "calls_per_minute", f"key:{key.id}"] == 2
    assert found["budget_limit", "calls_per_minute", f"key:{key.id}"] == 3
    assert ("budget_limit", "share", f"key:{key.id}") not in found
    assert not any(secret in text for secret in (token, revoked, key.prefix, "laptop", gone.id))


def test_a_store_that_is_down_leaves_the_counts(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "gateway.sqlite"))
    site = gateway(store)
    with serving(make_app(site)) as url, httpx2.Client(base_url=url, timeout=20) as client:
        assert 'selfroute_budget_used{limit="share",scope="gateway"} 0.0' in client.get("/metrics").text
        with store.begin() as connection:
            connection.exec_driver_sql("DROP TABLE accounts")
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        found = samples(client.get("/metrics").text)
    store.close()
    assert found["requests_total", "auto", "cloud", "200"] == 1
    assert not any(name == "budget_used" for name, *_ in found)


WORKERS = """
import os, sys
from dataclasses import replace
from prometheus_client import multiprocess
from tests.unit.serve.test_metrics import CLOUD
from selfroute.serve.metrics import Metrics
# Two workers, of which one ends.
first = os.fork()
metrics = Metrics()
metrics.observe(CLOUD)
metrics.in_flight.inc()
metrics.dropped.inc()
if not first:
    os._exit(0)
os.waitpid(first, 0)
multiprocess.mark_process_dead(first)
metrics.observe(replace(CLOUD, route="device"))
sys.stdout.buffer.write(metrics.page())
"""


def test_several_processes_count_together(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": ":".join(sys.path), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = samples(done.stdout)
    assert found["requests_total", "auto", "cloud", "200"] == 2
    assert found["requests_total", "auto", "device", "200"] == 1
    assert found["cloud_cost_usd_total",] == 0.75
    assert found["records_dropped_total",] == 2
    assert found["device_seconds_count",] == 3
    # Of the worker that is no more nothing is under way.
    assert found["requests_in_flight",] == 1
