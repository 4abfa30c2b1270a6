"""What the hard budget adds to a call: a reservation and its settlement, in a store that is in use.

    python benchmarks/budget.py --out FILE [--store URL]

On a new SQLite file in a temporary folder, or at URL (such as postgresql://user@host/database; its accounts are
changed). One call after the other, of one key, with limits of every kind; the clock of the accounts is moved on so
that all slots of all windows are filled, which is the most that an account can hold. FILE gets, in ms over the calls:

    {"store": backend, "calls": number, "reserve": {"p50", "p99"}, "settle": {"p50", "p99"}, "both": {"p50", "p99"},
     "cpu_ms_per_call": CPU time of this process over both}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from selfroute.serve.account import Limits, Scope
from selfroute.serve.budget import Budget, Reservation
from selfroute.serve.store import Store

EVERYTHING = Limits(share=1, min_requests=10**6, usd_per_day=10**6, calls_per_minute=10**6)


async def measure(store: Store, calls: int) -> dict[str, Any]:
    """Times of `calls` calls, once the windows are full."""
    now = time.time()
    budget, key = Budget(store, EVERYTHING, clock=lambda: now), Scope("key:benchmark", EVERYTHING)
    reserve, settle = [], []

    async def call() -> None:
        await budget.arrive(key)
        began = time.perf_counter()
        reserved = await budget.reserve(0.01, key)
        held = time.perf_counter()
        assert isinstance(reserved, Reservation)
        assert await budget.settle(reserved, 0.004)
        reserve.append(held - began)
        settle.append(time.perf_counter() - held)

    # A slot of the hour's window is a minute long, one of the minute's a second.
    for step_s in [60.0] * 61 + [1.0] * 61:
        now += step_s
        await call()
    reserve.clear()
    settle.clear()
    cpu = time.process_time()
    for _ in range(calls):
        now += 1.0
        await call()
    cpu = time.process_time() - cpu
    both = [r + s for r, s in zip(reserve, settle, strict=True)]
    times = {"reserve": reserve, "settle": settle, "both": both}
    return {name: _ms(values) for name, values in times.items()} | {"cpu_ms_per_call": round(cpu / calls * 1e3, 3)}


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100)
    return {"p50": round(cuts[49] * 1e3, 3), "p99": round(cuts[98] * 1e3, 3)}


def main() -> None:
    """Measure and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store")
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(options.store or str(Path(folder) / "gateway.sqlite"))
        try:
            found = asyncio.run(measure(store, options.calls))
        finally:
            store.close()
    backend = "postgresql" if options.store else "sqlite"
    options.out.write_text(json.dumps({"store": backend, "calls": options.calls, **found}, indent=2) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
