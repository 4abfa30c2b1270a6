"""A gateway under mixed load with faults, for as long as is wanted: does every request end well, do the books agree?

    python benchmarks/load.py --minutes 10 --out FILE

`selfroute serve` runs in a process of its own, between clients and a fake device and cloud, which run here. Requests
are plain and streamed, for the pair, the device and the cloud, under four keys: one with room, one with little money,
one with a small share, one with few requests a minute. A fifth of the requests meet a fault: a client that goes away in
mid-answer, or a device or a cloud that is busy (429), fails (500), closes, hangs, stalls, breaks off in mid-answer, or
sends garbage, for the first attempt or for all. Besides, both are down for a while, again and again. Checked are:

    every request ends with the text that was wanted, or with an error of the documented codes
    spent money is what the cloud saw, to the nano-USD, by key and in all, and what the records say; only of a call
    whose client went away may it be more, up to the worst case, where the cloud's last word crossed the leaving
    money spent and held back never passes a limit, looked at five times a second
    one record a request that was let in
    when all is over: no money held back, no task and no socket more than before, and memory has not grown

What broke off may have been charged, and counts at its worst case on both sides. FILE gets the figures and
`"failures"`, which is empty when all is well; the exit status says the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from faulty import FAULTS, Book, Faulty
from loopback import Connection, posted, said, text_of

ROOT = Path(__file__).parents[1]
FAULT_SHARE = 0.2
FOR_LIMITS = {"budget_exceeded", "rate_limit_exceeded"}
CODES = FOR_LIMITS | {"cloud_unavailable", "cloud_rate_limit", "cloud_broke_off", "device_unavailable"}
"""Errors that a request may end with: without a fault, and with one."""
LIMITS: Mapping[str, Mapping[str, str]] = {
    "free": {},
    "poor": {"--usd-per-day": "0.05"},
    "seldom": {"--share": "0.2"},
    "slow": {"--requests-per-minute": "60"},
}
ALLOWED_S = 30.0
"""Within which every request has to end."""

CONFIG = """
keys = true
store = "{folder}/gateway.sqlite"
device_idle_s = 4.0
[device]
name = "http"
base_url = "http://127.0.0.1:{device}/v1"
model = "device"
kind = "vllm"
first_byte_timeout_s = 3.0
idle_timeout_s = 3.0
[cloud]
name = "openai"
base_url = "http://127.0.0.1:{cloud}/v1"
model = "cloud"
concurrency = 256
first_byte_timeout_s = 3.0
whole_timeout_s = 3.0
idle_timeout_s = 3.0
backoff_s = 0.05
# The faults of single requests are many in a row by chance, once in ten minutes more than 8; an outage is more than 20.
breaker_failures = 20
breaker_cooldown_s = 0.5
usd_per_million_prompt_tokens = 1.0
usd_per_million_completion_tokens = 2.0
[budget]
usd_per_day = 1000.0
"""


class Clients:
    """Ask, one request after the other each, and check what comes."""

    def __init__(self, port: int, keys: Mapping[str, str], book: Book, seed: int) -> None:
        self._port, self._keys, self._book, self._random = port, keys, book, random.Random(seed)
        self.ended: Counter[str] = Counter()
        self.failures: list[str] = []
        self.gone: set[str] = set()
        self.number = 0

    async def run(self, until: float) -> None:
        connection: Connection | None = None
        while time.monotonic() < until:
            self.number += 1
            wanted = self._wanted(f"r{self.number}")
            try:
                async with asyncio.timeout(ALLOWED_S):
                    if connection is None or connection.transport.is_closing():
                        connection = await connect(self._port)
                    if wanted["at"] == "client":
                        await self._leave(connection, wanted)
                        continue
                    asked_at = time.monotonic()
                    answer = await connection.ask(self._request(wanted))
                    # A breaker needs a moment to find that the cloud is up again.
                    calm = not (wanted["fault"] or self._book.down) and asked_at > self._book.up_since + 2
                    self._check(wanted, answer, FOR_LIMITS if calm else CODES)
            except (OSError, ValueError, KeyError) as error:
                self.failures.append(f"{wanted}: {error!r}")
                connection = None
        if connection:
            connection.transport.close()

    def _wanted(self, name: str) -> dict[str, Any]:
        r = self._random
        at = r.choices(("", "cloud", "device", "client"), (1 - FAULT_SHARE, *(FAULT_SHARE / 3,) * 3))[0]
        model = r.choices(("selfroute", "selfroute-cloud", "selfroute-device"), (6, 3, 1))[0]
        # Who goes away does so long before the answer is whole, or the two sides might see different ends of it.
        slow = {"pieces": 400, "every_ms": 25} if at == "client" else {}
        return {
            "name": name,
            "key": r.choices(tuple(LIMITS), (5, 2, 2, 1))[0],
            "model": model,
            "stream": r.random() < 0.5,
            "device": r.choices(("answer", "help", "undecided"), (5, 4, 1))[0],
            "pieces": r.randint(1, 24),
            "every_ms": r.choice((0, 0, 5)),
            "at": at,
            "fault": r.choice(FAULTS) if at else "",
            "times": r.choice((1, 9)),
            **slow,
        }

    def _request(self, wanted: Mapping[str, Any]) -> bytes:
        asked = {
            "model": wanted["model"],
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": json.dumps(wanted)}],
            "max_tokens": 400,
            "stream": wanted["stream"],
        }
        return posted(asked, self._keys[wanted["key"]])

    async def _leave(self, connection: Connection, wanted: Mapping[str, Any]) -> None:
        """Go away in the middle of the answer."""
        asking = asyncio.create_task(connection.ask(self._request(wanted)))
        await asyncio.wait({asking}, timeout=0.3)
        if asking.done():
            self._check(wanted, asking.result(), CODES)
            return
        self.gone.add(wanted["name"])
        connection.transport.abort()
        await asyncio.gather(asking, return_exceptions=True)
        self.ended["client gone"] += 1

    def _check(self, wanted: Mapping[str, Any], answer: bytes, codes: Collection[str]) -> None:
        status = int(answer.split(b" ", 2)[1])
        # A stream's error is its last event.
        code = re.search(rb'"error":\{"message":"(?:[^"\\]|\\.)*","type":"\w+","param":\w+,"code":"(\w+)"\}\}', answer)
        if code:
            name = code[1].decode()
            if name not in codes or (status == 200 and not wanted["stream"]):
                self.failures.append(f"{wanted}: {answer!r:.600}")
            self.ended[f"{name}{' in mid-stream' if status == 200 else ''}"] += 1
            return
        whole = not wanted["stream"] or b"data: [DONE]" in answer
        if status != 200 or not whole or said(answer).strip() != "".join(text_of(wanted)).strip():
            self.failures.append(f"{wanted}: {answer!r:.600}")
        self.ended["answered"] += 1


async def connect(port: int) -> Connection:
    return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port))[1]


class Watch:
    """Looks at the gateway's process and at its accounts while it runs."""

    def __init__(self, process: subprocess.Popen[str], store: Path, caps_nano: Mapping[str, int]) -> None:
        self._process, self._store, self._caps = process, store, caps_nano
        self.rss_mb: list[float] = []
        self.most: Counter[str] = Counter()
        self.failures: list[str] = []

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(0.2)

    def look(self) -> None:
        for scope, spent, held in self.accounts():
            self.most[scope] = max(self.most[scope], spent + held)
            if spent + held > self._caps.get(scope, sys.maxsize):
                self.failures.append(f"{scope} has {spent} spent and {held} held of {self._caps[scope]} nano-USD")
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        self.rss_mb.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)

    def accounts(self) -> list[tuple[str, int, int]]:
        return self.query("SELECT scope, spent_nano, held_nano FROM accounts")

    def query(self, sql: str) -> list[Any]:
        store = sqlite3.connect(f"file:{self._store}?mode=ro", uri=True)
        try:
            return store.execute(sql).fetchall()
        finally:
            store.close()

    def open(self) -> dict[str, int]:
        """Tasks and sockets of the gateway."""
        self._process.send_signal(signal.SIGUSR1)
        tasks = int(self._process.stdout.readline())  # type: ignore[union-attr]
        files = Path(f"/proc/{self._process.pid}/fd")
        sockets = 0
        for file in files.iterdir():
            with suppress(FileNotFoundError):
                sockets += os.readlink(file).startswith("socket:")
        return {"tasks": tasks, "sockets": sockets}


def serve(config: str) -> None:
    """The gateway as the command serves it; on SIGUSR1 it writes how many tasks it has."""
    from selfroute import api

    def ready(url: str) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: print(len(asyncio.all_tasks()), flush=True))
        print(url, flush=True)

    api.serve(api.load_gateway_config(config, ["port=0"]), ready)


def new_keys(store: Path) -> dict[str, tuple[str, str]]:
    """Token and id of each key."""
    from selfroute.serve import keys
    from selfroute.serve.account import Limits
    from selfroute.serve.store import Store

    opened, made = Store(str(store)), {}
    with opened.begin() as connection:
        for name, options in LIMITS.items():
            limits = {option[2:].replace("-", "_"): float(value) for option, value in options.items()}
            token, key = keys.new(connection, name, Limits.model_validate(limits))
            made[name] = token, key.id
    opened.close()
    return made


async def ups_and_downs(book: Book, until: float) -> None:
    """Now the device is down, now the cloud, a second each."""
    while time.monotonic() < until:
        for who in ("device", "cloud"):
            await asyncio.sleep(7)
            book.down.add(who)
            await asyncio.sleep(1)
            book.down.discard(who)
            book.up_since = time.monotonic()


async def measure(folder: Path, seconds: float, clients: int, seed: int) -> dict[str, Any]:
    loop, book = asyncio.get_running_loop(), Book()
    ports = {}
    for who in ("device", "cloud"):
        server = await loop.create_server(lambda who=who: Faulty(who, book), "127.0.0.1", 0, backlog=512)
        ports[who] = server.sockets[0].getsockname()[1]
    (folder / "gateway.toml").write_text(CONFIG.format(folder=folder, **ports))
    store = folder / "gateway.sqlite"
    keys = new_keys(store)
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, __file__, "--serve", str(folder / "gateway.toml")], stdout=subprocess.PIPE, text=True,
        stderr=(folder / "log").open("w"),
    )  # fmt: skip
    try:
        url = await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
        asking = Clients(int(url.split(":")[2].partition("/")[0]), {n: t for n, (t, _) in keys.items()}, book, seed)
        caps = {f"key:{keys[n][1]}": round(float(o["--usd-per-day"]) * 1e9) for n, o in LIMITS.items()
                if "--usd-per-day" in o}  # fmt: skip
        watch = Watch(process, store, caps)
        before = watch.open()
        until = time.monotonic() + seconds
        around = [asyncio.create_task(w) for w in (watch.run(), ups_and_downs(book, until))]
        await asyncio.gather(*(asking.run(until) for _ in range(clients)))
        for task in around:
            task.cancel()
        after = await settled(watch, before)
        return verdict(asking, watch, book, keys, before, after, (folder / "log").read_text())
    finally:
        process.kill()
        process.communicate()


async def settled(watch: Watch, before: Mapping[str, int], allowed_s: float = 25.0) -> dict[str, int]:
    """What is open once it is as before, or when that has taken too long: idle connections are kept for seconds."""
    by = time.monotonic() + allowed_s
    while (now := watch.open()) and time.monotonic() < by:
        held = sum(held for _, _, held in watch.accounts())
        if not held and now["tasks"] <= before["tasks"] and now["sockets"] <= before["sockets"]:
            break
        await asyncio.sleep(0.5)
    return now


def verdict(
    asking: Clients, watch: Watch, book: Book, keys: Mapping[str, tuple[str, str]], before: Mapping[str, int],
    after: Mapping[str, int], log: str,
) -> dict[str, Any]:  # fmt: skip
    failures = [*asking.failures, *watch.failures]
    accounts = {scope: (spent, held) for scope, spent, held in watch.accounts()}
    scopes = {"gateway": None} | {f"key:{id}": name for name, (_, id) in keys.items()}
    books = {}
    for scope, name in scopes.items():
        spent, held = accounts.get(scope, (0, 0))
        least, most = book.spent_nano(asking.gone, name)
        books[name or "all"] = {"spent_nano": spent, "held_nano": held, "seen_nano": least, "seen_at_most_nano": most}
        if not least <= spent <= most or held:
            failures.append(f"{name or 'all'}: {spent} spent and {held} held; the cloud saw {least} to {most}")
    [(records, cost)] = watch.query("SELECT COUNT(*), COALESCE(SUM(cost_nano), 0) FROM requests")
    let_in = asking.number - asking.ended["rate_limit_exceeded"]
    # Who went away before the request was read has no record.
    if not let_in - len(asking.gone) <= records <= let_in or cost != books["all"]["spent_nano"]:
        failures.append(f"{records} records of {cost} nano-USD, and {let_in} requests, {len(asking.gone)} left alone")
    if after["tasks"] > before["tasks"] or after["sockets"] > before["sockets"]:
        failures.append(f"open before {dict(before)}, after {dict(after)}")
    # The first fifth fills caches and pools.
    rss = watch.rss_mb[len(watch.rss_mb) // 5 :]
    early, late = median(rss[: len(rss) // 5] or rss), median(rss[-len(rss) // 5 :])
    if late > early * 1.05 + 4:
        failures.append(f"memory grew from {early:.0f} to {late:.0f} MB")
    if "Traceback" in log or "never retrieved" in log:
        failures.append(f"the log: {log[max(0, log.find('Traceback') - 300) :][:1500]}")
    return {
        "failures": failures[:20],
        "requests": asking.number,
        "ended": dict(asking.ended.most_common()),
        "cloud_calls_seen": len(book.lines),
        "books": books,
        "clients_gone": len(asking.gone),
        "records": records,
        "most_spent_and_held_nano": {scopes.get(s) or "all": n for s, n in watch.most.items()},
        "rss_mb": {"early": round(early, 1), "late": round(late, 1), "most": round(max(watch.rss_mb), 1)},
        "open": {"before": dict(before), "after": dict(after)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), options.minutes * 60, options.clients, options.seed))
    found |= {"minutes": options.minutes, "clients": options.clients, "seed": options.seed,
              "fault_share": FAULT_SHARE, "took_s": round(time.monotonic() - began)}  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
