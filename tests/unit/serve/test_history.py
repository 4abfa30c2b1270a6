"""Request records: written, summed up, read by the dashboard, deleted."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfroute.errors import StoreError
from selfroute.serve import charts, history
from selfroute.serve.history import Percentiles, RequestRecord, Totals
from selfroute.serve.store import Store

HOUR = 3600.0 * 500_000
DEVICE = RequestRecord(
    id="r1", at=HOUR + 1, key_id="k1", model="pair", route="device", score=-1.5, device_prompt_tokens=50,
    device_completion_tokens=20, first_ms=5.0, device_ms=80.0, total_ms=81.0,
)  # fmt: skip
CLOUD = RequestRecord(
    id="r2", at=HOUR + 62, key_id="k2", model="pair", route="cloud", score=2.0, device_prompt_tokens=50,
    device_completion_tokens=10, cloud_prompt_tokens=60, cloud_completion_tokens=300, cost_usd=0.000123456,
    first_ms=6.0, device_ms=40.0, cloud_ms=900.0, total_ms=950.0, request='[{"role": "user"}]', response="four",
)  # fmt: skip
DENIED = replace(DEVICE, id="r3", at=HOUR + 125, denied="share", total_ms=120.0)
FAILED = RequestRecord(id="r4", at=HOUR + 200, key_id="k1", status=502, error="cloud_failed", total_ms=30.0)


def write(store: Store, *records: RequestRecord, again: bool = False) -> None:
    with store.begin() as connection:
        history.add(connection, records, again=again)


def read(store: Store, query: Any, *args: Any, **kwargs: Any) -> Any:
    with store.begin(write=False) as connection:
        return query(connection, *args, **kwargs)


def total(store: Store, since: float, key_id: str | None = None, step_minutes: int = 1) -> Totals:
    steps = read(store, history.timeline, since, step_minutes, key_id)
    return sum((totals for _, totals in steps), Totals())


def test_what_is_written_is_read_the_newest_first_page_by_page(store: Store) -> None:
    write(store, DEVICE, CLOUD)
    write(store, DENIED, FAILED)
    assert read(store, history.latest, 10) == [FAILED, DENIED, CLOUD, DEVICE]
    assert read(store, history.latest, 2) == [FAILED, DENIED]
    assert read(store, history.latest, 2, before=DENIED) == [CLOUD, DEVICE]
    assert read(store, history.latest, 10, "k2") == [CLOUD]
    assert read(store, history.find, "r2") == CLOUD
    assert read(store, history.find, "r5") is None


def test_pages_keep_requests_of_the_same_moment_apart(store: Store) -> None:
    same = [replace(DEVICE, id=f"r{i}") for i in range(5)]
    write(store, *same)
    first = read(store, history.latest, 2)
    rest = read(store, history.latest, 5, before=first[-1])
    assert [r.id for r in first + rest] == ["r4", "r3", "r2", "r1", "r0"]


def test_sums_by_the_minute_and_key(store: Store) -> None:
    write(store, DEVICE, CLOUD)
    write(store, DENIED, FAILED)
    everything = Totals(4, calls=1, denied=1, errors=1, cost_usd=0.000123456, device_tokens=200, cloud_tokens=360)
    assert total(store, HOUR) == everything
    assert total(store, HOUR, "k2") == Totals(1, 1, 0, 0, 0, 0.000123456, 60, 360)
    assert total(store, HOUR + 120) == Totals(2, 0, 1, 1, 0, 0.0, 70, 0)
    assert total(store, HOUR + 3600) == Totals()
    by_minutes = read(store, history.timeline, HOUR, 1)
    assert [(at - HOUR, t.requests) for at, t in by_minutes] == [(0, 1), (60, 1), (120, 1), (180, 1)]
    by_two = read(store, history.timeline, HOUR, 2)
    assert [(at - HOUR, t.requests, t.calls, t.denied, t.errors) for at, t in by_two] == [
        (0, 2, 1, 0, 0),
        (120, 2, 0, 1, 1),
    ]
    assert total(store, HOUR, step_minutes=60) == everything
    assert total(store, HOUR + 3599, step_minutes=60) == everything
    assert total(store, HOUR + 3600, step_minutes=60) == Totals()
    assert read(store, history.timeline, HOUR, 60, "k1") == [(HOUR, Totals(3, 0, 1, 1, 0, 0.0, 140, 0))]


def test_a_request_counts_once_wherever_it_ended(store: Store) -> None:
    gone = replace(FAILED, id="r5", status=499, error="client_gone")
    over_budget = replace(FAILED, id="r6", status=429, denied="share", error="budget_exceeded")
    broke_off = replace(CLOUD, id="r7", key_id="k1", status=502, error="cloud_broke_off")
    unsupported = replace(FAILED, id="r8", status=400, error="unsupported_value")
    write(store, gone, over_budget, broke_off, unsupported)
    found = total(store, HOUR)
    assert (found.requests, found.calls, found.denied, found.errors, found.failed_calls) == (4, 1, 1, 2, 1)
    assert (charts.on_device(found), charts.by_cloud(found)) == (1, 0)


def test_a_batch_that_is_written_twice_counts_once(store: Store) -> None:
    write(store, DEVICE, CLOUD)
    # They are not looked for without need.
    with pytest.raises(StoreError):
        write(store, CLOUD, DENIED)
    write(store, CLOUD, DENIED, DENIED, again=True)
    write(store, CLOUD, DENIED, again=True)
    assert total(store, HOUR).requests == 3
    assert len(read(store, history.latest, 10)) == 3


def test_percentiles_are_measured_latencies(store: Store) -> None:
    write(store, *(replace(DEVICE, id=str(i), total_ms=float(i), first_ms=None) for i in range(1, 101)))
    found = read(store, history.latencies, HOUR)
    assert found["total_ms"] == Percentiles(100, 50.0, 90.0, 99.0)
    assert found["first_ms"] == Percentiles(0, None, None, None)
    assert found["device_ms"] == Percentiles(100, 80.0, 80.0, 80.0)
    assert read(store, history.latencies, HOUR + 2)["total_ms"].count == 0
    assert read(store, history.latencies, HOUR, "k2")["total_ms"].count == 0


def test_percentiles_are_of_the_newest_requests(store: Store) -> None:
    number = history.SAMPLE + 100
    write(store, *(replace(DEVICE, id=str(i), at=HOUR + i, total_ms=float(i >= 100)) for i in range(number)))
    assert read(store, history.latencies, HOUR)["total_ms"] == Percentiles(history.SAMPLE, 1.0, 1.0, 1.0)


def test_denials_by_limit(store: Store) -> None:
    more = [replace(DENIED, id=f"d{i}", denied="usd_per_day", key_id="k2") for i in range(2)]
    write(store, DEVICE, DENIED, *more)
    assert list(read(store, history.denials, HOUR).items()) == [("usd_per_day", 2), ("share", 1)]
    assert read(store, history.denials, HOUR, "k1") == {"share": 1}
    assert read(store, history.denials, HOUR + 126) == {}


HOSTILE = "a\0b\ud800c'; DROP TABLE requests; --\r\n\u202e"


def test_what_no_database_would_take_is_made_fit(store: Store) -> None:
    bad = RequestRecord(
        id="bad", at=HOUR, model=HOSTILE + "x" * 10_000, error=HOSTILE, score=math.inf, total_ms=math.nan,
        cloud_completion_tokens=10**30, device_prompt_tokens=-(10**30), cost_usd=math.nan, request=HOSTILE,
    )  # fmt: skip
    write(store, bad, DEVICE)
    assert read(store, history.latest, 10)[0] == DEVICE
    kept = read(store, history.find, "bad")
    assert kept.request == kept.error == "a\ufffdb?c'; DROP TABLE requests; --\r\n\u202e"
    assert len(kept.model) == 200
    assert (kept.score, kept.total_ms, kept.cloud_completion_tokens) == (None, 0.0, 10**9)
    assert kept.cost_usd == 0
    assert total(store, HOUR).requests == 2


def test_what_is_older_is_forgotten_in_small_steps(store: Store) -> None:
    write(store, *(replace(CLOUD, id=str(i), at=HOUR + 60 * i) for i in range(10)))
    forgotten = asyncio.run(history.forget(store, 3600, batch=2, now=HOUR + 3600 + 7 * 60))
    assert forgotten == 7
    assert [r.id for r in read(store, history.latest, 10)] == ["9", "8", "7"]
    assert total(store, 0).requests == 3
    # Of an hour, all or nothing is forgotten.
    assert total(store, 0, step_minutes=60).requests == 10
    assert asyncio.run(history.forget(store, 3600, now=HOUR)) == 0


def test_forgotten_content_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite"
    for forgotten in (False, True):
        store = Store(str(path))
        write(store, replace(CLOUD, response="canary-8861"), again=forgotten)
        if forgotten:
            asyncio.run(history.forget(store, 0, now=HOUR + 86_400))
        store.close()
        assert (b"canary-8861" in path.read_bytes()) != forgotten


def test_forgotten_content_is_not_in_the_log_either(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sqlite"
    store = Store(str(path))
    try:
        write(store, *(replace(CLOUD, id=str(i), response="canary-8861 " * 100) for i in range(500)))
        write(store, replace(CLOUD, id="new", at=HOUR + 86_400))
        assert asyncio.run(history.forget(store, 3600, now=HOUR + 86_400)) == 500
        # While the gateway runs, and whoever reads on.
        for file in tmp_path.iterdir():
            assert b"canary-8861" not in file.read_bytes()
        assert [r.id for r in read(store, history.latest, 10)] == ["new"]
    finally:
        store.close()
