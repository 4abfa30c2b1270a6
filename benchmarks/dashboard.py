"""How long the dashboard's page is read from a store that has seen much.

    python benchmarks/dashboard.py --out FILE [--requests 1000000] [--store URL]

A new store, in a temporary folder or at URL (an empty PostgreSQL database), gets so many requests of 20 keys over 30
days, a third of which the cloud answered and a twentieth of which were denied. FILE gets medians of 7 in ms:

    {"store": backend, "requests": number, "all": {span: ms}, "one_key": {span: ms}, "rare_key": {span: ms},
     "metrics": ms}

`rare_key` has ten requests, the last of them weeks ago.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfroute.serve import board, history, keys
from selfroute.serve.account import Limits, Scope
from selfroute.serve.budget import usage_of_all
from selfroute.serve.history import RequestRecord
from selfroute.serve.store import Store

BATCH = 10_000
REPEATS = 7
LIMITS = Limits(share=0.3, usd_per_day=100.0)


def requests(number: int, names: Sequence[str], rare: str, now: float) -> Iterator[RequestRecord]:
    """The store's content, the oldest first."""
    draw = random.Random(0)
    for i in range(number):
        cloud, denied = i % 3 == 0, i % 20 == 1
        yield RequestRecord(
            id=f"{i:032x}", at=now - 30 * 86_400 * (1 - i / number), key_id=rare if i < 10 else draw.choice(names),
            model="selfroute", decision="help" if cloud or denied else "answer", route="cloud" if cloud else "device",
            score=draw.gauss(0, 2), denied="share" if denied and not cloud else "", device_completion_tokens=100,
            cost_usd=0.001 * cloud, first_ms=draw.uniform(5, 50), device_ms=draw.uniform(50, 900),
            cloud_ms=draw.uniform(500, 5000) if cloud else None, total_ms=draw.uniform(100, 6000),
        )  # fmt: skip


def median_ms(store: Store, read: Callable[[Any], Any]) -> float:
    """How long it takes, a new transaction included."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with store.begin(write=False) as connection:
            read(connection)
        times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 1)


def measure(store: Store, number: int) -> dict[str, Any]:
    """Fill a store, and read it."""
    with store.begin() as connection:
        owners = [keys.new(connection, f"key {i}")[1] for i in range(21)]
    names = [key.id for key in owners]
    batch: list[RequestRecord] = []
    for record in requests(number, names[1:], names[0], time.time()):
        batch.append(record)
        if len(batch) == BATCH:
            with store.begin() as connection:
                history.add(connection, batch)
            batch = []
    with store.begin() as connection:
        history.add(connection, batch)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("ANALYZE")

    def spans(scope: Scope | None) -> dict[str, float]:
        def reading(span: board.Span) -> Callable[[Any], Any]:
            return lambda connection: board.read(connection, span, LIMITS, scope)

        return {name: median_ms(store, reading(span)) for name, span in board.SPANS.items()}

    return {
        "requests": number,
        "all": spans(None),
        "one_key": spans(owners[1].scope),
        "rare_key": spans(owners[0].scope),
        "metrics": median_ms(store, lambda connection: usage_of_all(connection, LIMITS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--store")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(arguments.store or f"{folder}/gateway.sqlite")
        result = {"store": "postgresql" if arguments.store else "sqlite", **measure(store, arguments.requests)}
        store.close()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
