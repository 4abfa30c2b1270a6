"""One of several processes on one store: python -m tests.store_worker URL WORK, where WORK is JSON.

Says "ready" when it has been imported, waits for a line, and says what came of it, as JSON. It opens the store only
then, so that several open a new one at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfroute.serve.account import Limits, Scope
from selfroute.serve.budget import Budget, Reservation
from selfroute.serve.store import Store


def at_once(url: str, *works: dict[str, Any]) -> list[dict[str, Any]]:
    """Run as many processes as there are works, let them go together, and return what they say."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.store_worker", url, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for work in works
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(line) for out in said for line in out.splitlines()]


async def spend(url: str, work: dict[str, Any]) -> dict[str, Any]:
    """`requests` in parallel, each holding back `worst_usd`; settled at a part of it, released, or left open."""
    store = Store(url)
    budget = Budget(store, Limits(**work["limits"]))
    key = Scope("key:a", Limits(**work["key_limits"])) if "key_limits" in work else None
    draw = random.Random(work["seed"])

    async def request(settled: float | None) -> tuple[str, float]:
        await budget.arrive(key)
        reserved = await budget.reserve(work["worst_usd"], key)
        if not isinstance(reserved, Reservation):
            return reserved.limit, 0.0
        await asyncio.sleep(0)
        if work.get("die"):
            print(json.dumps(asdict(reserved)), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if settled is None:
            return "open", work["worst_usd"]
        if settled == 0:
            assert await budget.release(reserved)
            return "released", 0.0
        assert await budget.settle(reserved, settled)
        assert not await budget.settle(reserved, settled)
        return "settled", settled

    shares: Sequence[float | None] = [draw.choice(work["settle"]) for _ in range(work["requests"])]
    outcomes = await asyncio.gather(*(request(None if s is None else s * work["worst_usd"]) for s in shares))
    await store.aclose()
    return {
        "outcomes": {name: [o for o, _ in outcomes].count(name) for name, _ in outcomes},
        "usd": sum(usd for _, usd in outcomes),
    }


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asyncio.run(spend(sys.argv[1], json.loads(sys.argv[2])))), flush=True)
