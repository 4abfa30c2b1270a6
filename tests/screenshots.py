"""The pictures of the dashboard in the docs, made anew.

    python -m tests.screenshots docs/images

A day's requests and what the models say are made up; the gateway, its store, its pages and the browser are real.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from PIL import Image

from selfroute.protocol import HELP_CALL
from selfroute.serve import history, keys
from selfroute.serve.account import Limits
from selfroute.serve.app import Gateway, make_app
from selfroute.serve.budget import Budget, Reservation
from selfroute.serve.config import GatewayConfig
from selfroute.serve.handoff import Pair
from selfroute.serve.history import RequestRecord
from selfroute.serve.keys import Key, Keyring
from selfroute.serve.sessions import Sessions
from selfroute.serve.store import Store
from selfroute.types import Bill, CloudChunk, CloudRequest
from tests.browser import Page, chromium
from tests.serving import MemoryRecorder, ScriptedCloud, ScriptedDevice, Step, said, serving

LIMITS = Limits(share=0.3, usd_per_day=2.0, calls_per_minute=30)
SEARCH = "1:20-6=14,14-2=12?\n2:20+6=26,26+2=28?\n3:20+6=26,26-2=24?\n4:20-2=18,18-6=12?\n5:6+2=8,20+8=28?\n"
COLOURS = 160


def day(now: float, owners: list[Key]) -> Iterator[RequestRecord]:
    """A day of requests: fewer at night, and a quarter of an hour in which the cloud was down."""
    draw = random.Random(4)
    at, number = now - 86_400, 0
    while at < now - 3:
        at += draw.expovariate((1.3 + math.sin((at - now) / 86_400 * 2 * math.pi)) / 40)
        number += 1
        score = draw.gauss(-1.4, 2.0)
        asks, down = score > 0, 52_000 < now - at < 54_000
        denied = "" if not asks else "cloud" if down else "share" if draw.random() < 0.12 else ""
        called = asks and not denied
        device_ms, cloud_ms = draw.lognormvariate(5.6, 0.5), draw.lognormvariate(7.4, 0.4) if called else None
        written = draw.randrange(40, 400)
        yield RequestRecord(
            id=f"{number:032x}", at=min(at, now - 3), key_id=draw.choice(owners).id, model="selfroute",
            decision="help" if asks else "answer", route="cloud" if called else "device", score=score, denied=denied,
            device_prompt_tokens=60, device_completion_tokens=written, cloud_completion_tokens=500 * called,
            cost_usd=draw.uniform(0.0008, 0.0028) * called, first_ms=draw.lognormvariate(3.4, 0.3),
            device_ms=device_ms, cloud_ms=cloud_ms, total_ms=device_ms + (cloud_ms or 0.0),
        )  # fmt: skip


async def spent(store: Store, now: float, owners: list[Key]) -> None:
    """What the last hour's requests have used of the budget."""
    draw, clock = random.Random(5), [0.0]
    budget = Budget(store, LIMITS, clock=lambda: clock[0])
    for back in range(3600, 0, -15):
        clock[0] = now - back
        key = draw.choice(owners).scope
        await budget.arrive(key)
        if draw.random() < 0.3:
            held = await budget.reserve(0.02, key)
            if isinstance(held, Reservation):
                await budget.settle(held, draw.uniform(0.004, 0.016))
    await budget.flush()


class Slow(ScriptedCloud):
    """A cloud that takes its time."""

    async def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        await asyncio.sleep(0.4)
        async for chunk in super().stream(request, bill, whole=whole):
            yield chunk


def save(page: Page, path: Path) -> None:
    """A picture with few colours, which takes a quarter of the bytes."""
    page.screenshot(path)
    with Image.open(path) as shot:
        shot.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(out: Path) -> None:
    """Write the pictures to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as page:
        store = Store(f"{folder}/gateway.sqlite")
        now = time.time()
        with store.begin() as connection:
            token, _ = keys.new(connection, "operations", admin=True)
            owners = [
                keys.new(connection, "laptops", Limits(share=0.3, usd_per_day=1.0))[1],
                keys.new(connection, "phones", Limits(share=0.2, usd_per_day=0.5))[1],
                keys.new(connection, "evaluation")[1],
            ]
            history.add(connection, list(day(now, owners)))
        asyncio.run(spent(store, now, owners))
        pieces = [SEARCH[i : i + 4] for i in range(0, len(SEARCH), 4)]
        script: list[Step] = said(*pieces, HELP_CALL, score=6.85)
        config = GatewayConfig(budget=LIMITS, keys=True)
        device, cloud = ScriptedDevice(script, pause_s=0.01), Slow("(6/", "2)+20", usd=0.0011)
        pair = Pair(device, cloud, Budget(store, LIMITS), MemoryRecorder())
        ring = Keyring(store)
        gateway = Gateway(config, pair, pair.budget, ring, Sessions(store, ring), store)  # type: ignore[arg-type]
        with serving(make_app(gateway)) as url:
            page.size(1280, 800)
            page.open(f"{url}/dashboard/sign-in")
            page.type(token)
            page.press("Enter")
            page.until("location.pathname === '/dashboard'")
            for name, width, height, dark in (
                ("dashboard", 1280, 1620, False),
                ("dashboard-dark", 1280, 1620, True),
                ("dashboard-phone", 360, 1500, False),
            ):
                page.size(width, height, dark=dark, scale=1 if width > 500 else 1.5)
                page.open(f"{url}/dashboard?span=24h")
                page.until("document.querySelector('#state').textContent.startsWith('live')")
                save(page, out / f"{name}.png")
            page.size(1280, 700)
            page.open(f"{url}/dashboard/playground")
            page.js("document.querySelector('#example').click(); document.querySelector('#example').click()")
            page.press("Enter", ctrl=True)
            page.until("!document.querySelector('#facts').hidden")
            save(page, out / "playground.png")
            page.open("about:blank")
        store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
