"""What the gateway adds to a call, against calling the upstream directly and against LiteLLM's proxy.

    python benchmarks/gateway.py --out FILE

One upstream (`loopback.py`) is asked directly, through `selfroute serve`, and through LiteLLM's proxy, which gets a
virtual environment of its own under `build/`. All run in one session and take turns, round after round, so that they
meet the same machine. The load generator and the upstream share one core, the proxy that is measured has the other to
itself; the proxies that are not asked are idle. The gateway serves as it would anywhere: a key, limits of money, share
and calls on the key and the whole, the store on a new SQLite file. LiteLLM has one worker, a key, and no database.

Most figures are of `selfroute-cloud`, where the gateway does what any proxy does, and holds back and settles the cost
of each call on top. `handoff` is a device that asks and a cloud that answers, against the two calls in turn. An answer
has 32 events, each in a packet of its own. A fast upstream gives them at once, as fast as it can; a paced one gives one
every 5 ms, as a model writes them, and a whole answer after 160 ms.

Half load is requests at random moments (Poisson), half as many a second as the gateway answered of the same workload
(kind and pace) when 256 connections asked without a pause, right before. Where it answers a tenth more or less right
after, the machine has changed meanwhile and the load was not half: it is measured again, up to four times in all, and
the steadiest counts (`drift`: how much its capacity changed; `loads` has them all). A gateway that is full takes a
paced stream's events several at a time, which is cheaper than one by one: at half of that rate it is more than half
busy.
Every answer's text is checked, so that a lost, doubled or reordered piece is a fault. `upstream_busy` says whether the
core of the upstream and the generator was the one that was full.

FILE gets `{figure: {"median", "min", "max"} over the rounds, ..., "targets", "steady", "loads", "faults", "work"}`
("steady": no capacity changed by more than a tenth in what counts); the figures:

    added_ms_p50, added_ms_p99     plain requests at half load of a fast upstream, less the direct call's
    stream_added_ms_p50, ..._p99   the same of whole streams
    ttft_added_ms_p50              the same of a stream's first piece
    handoff_added_ms_p50, ..._p99  a hand-off, less the two calls
    paced_...                      the same of a paced upstream (without hand-offs)
    rps_ratio_vs_litellm           requests a second, the least of 16, 64 and 256 connections; stream_rps_...: streams
    cpu_us_per_event               CPU of the gateway for one more event in a stream
    drift                          change of a full gateway's requests a second over the measurements at half load
    upstream_busy                  share of their core that upstream and generator had while the gateway was full
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
LITELLM = "1.108.7"
KEY = "sk-benchmark"
PIECES, EVERY_MS = 32, 5.0
CONNECTIONS = (1, 16, 64, 256)
KINDS = ("plain", "stream")
WORKLOADS = (
    ("plain", 0, ""),
    ("stream", 0, ""),
    ("handoff", 0, ""),
    ("plain", EVERY_MS, "paced_"),
    ("stream", EVERY_MS, "paced_"),
)
"""What is measured at half load: the kind, milliseconds between two events, and how its figures begin."""
STEADY, TRIES = 0.1, 4
"""How much a full gateway's requests a second may change over a measurement at half load, and how often it is made."""

GATEWAY = """
keys = true
store = "{folder}/gateway.sqlite"
max_concurrent = 2048
[device]
name = "http"
base_url = "{upstream}"
model = "device"
kind = "vllm"
[cloud]
name = "openai"
base_url = "{upstream}"
model = "cloud"
concurrency = 1024
usd_per_million_prompt_tokens = 1.0
usd_per_million_completion_tokens = 2.0
[budget]
share = 1.0
usd_per_day = 1e5
calls_per_minute = 1000000
"""

PROXY = """
model_list:
  - model_name: cloud
    litellm_params: {{model: openai/cloud, api_base: "{upstream}", api_key: none}}
general_settings: {{master_key: {key}}}
"""


class Process:
    """A child process on some cores, that reads and writes lines."""

    def __init__(self, command: Sequence[str], cores: set[int], **options: Any) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **options
        )
        if cores:
            os.sched_setaffinity(self._process.pid, cores)

    def line(self) -> str:
        if not (read := self._process.stdout.readline()):  # type: ignore[union-attr]
            sys.exit(f"{self._process.args!r} ended early (its error is above)")
        return read

    def ask(self, question: Any) -> Any:
        self._process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
        return json.loads(self.line())

    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def running(command: Sequence[str], cores: set[int], **options: Any) -> Iterator[Process]:
    process = Process(command, cores, **options)
    try:
        yield process
    finally:
        process.close()


class Sides:
    """The upstream, what stands before it, and the generator; `ports`, `keys` and `proxies` by side."""

    def __init__(self, stack: ExitStack, folder: Path, litellm: Path | None) -> None:
        own, served = cores()
        self._all: list[Process] = []

        def run(command: Sequence[str], cores: set[int], **options: Any) -> Process:
            self._all.append(stack.enter_context(running(command, cores, **options)))
            return self._all[-1]

        loopback = [sys.executable, str(ROOT / "benchmarks/loopback.py")]
        upstream = run([*loopback, "upstream"], own).line().strip()
        self._generator = run([*loopback, "generate"], own)
        self.ports, self.keys, self.proxies = {"direct": int(upstream)}, {"direct": "none"}, dict[str, Process]()
        url = f"http://127.0.0.1:{upstream}/v1"
        (folder / "gateway.toml").write_text(GATEWAY.format(folder=folder, upstream=url))
        self.keys["gateway"] = new_key(folder / "gateway.sqlite")
        serve = [sys.executable, "-m", "selfroute", "serve", str(folder / "gateway.toml"), "port=0"]
        gateway = self.proxies["gateway"] = run(serve, served)
        address = next(word for word in gateway.line().split() if word.startswith("http"))
        self.ports["gateway"] = int(address.split(":")[2].partition("/")[0])
        if litellm:
            (folder / "litellm.yaml").write_text(PROXY.format(upstream=url, key=KEY))
            self.keys["litellm"], port = KEY, free_port()
            self.ports["litellm"] = port
            self.proxies["litellm"] = run(
                [str(litellm / "bin/litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1",
                 "--port", str(port), "--num_workers", "1"],
                served, stderr=subprocess.DEVNULL,
                env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION",
                     "LITELLM_LOG": "ERROR"},
            )  # fmt: skip
            wait_for(f"http://127.0.0.1:{port}/health/liveliness")
        self.loads: list[dict[str, Any]] = []
        self._began = time.monotonic(), self._elsewhere_s()

    def elsewhere(self) -> float:
        """How many cores other processes, and other guests of the host, have had since the beginning."""
        at, seconds = self._began
        return (self._elsewhere_s() - seconds) / (time.monotonic() - at)

    def _own_s(self) -> float:
        """CPU time so far of the upstream and the generator."""
        return sum(process.cpu_s() for process in self._all[:2])

    def _elsewhere_s(self) -> float:
        names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        ticks = dict(zip(names, map(int, Path("/proc/stat").read_text().split()[1:9]), strict=True))
        busy = sum(ticks.values()) - ticks["idle"] - ticks["iowait"]
        return busy / os.sysconf("SC_CLK_TCK") - time.process_time() - sum(process.cpu_s() for process in self._all)

    def load(self, side: str, kind: str, seconds: float, *, note: str, pieces: int = PIECES, every_ms: float = 0,
             **how: Any) -> dict[str, Any]:  # fmt: skip
        """What comes of a load; `how` is `connections` or a `rate`."""
        steps = [{"model": model, "key": self.keys[side], "stream": kind != "plain", "exact": exact}
                 for model, exact in MODELS[side, kind]]  # fmt: skip
        wanted = {"pieces": pieces, "every_ms": every_ms, "device": "help" if kind == "handoff" else "answer"}
        name = f"{len(self.loads)}"
        proxy = self.proxies.get(side)
        cpu_s, own_s, began = proxy.cpu_s() if proxy else 0.0, self._own_s(), time.monotonic()
        found = self._generator.ask({"name": name, "port": self.ports[side], "steps": steps, "wanted": wanted,
                                     "seconds": seconds, "warm_s": min(0.4, seconds / 4), **how})  # fmt: skip
        cpu_ms = (proxy.cpu_s() - cpu_s) / max(1, found["asked"]) * 1e3 if proxy else None
        busy = (self._own_s() - own_s) / (time.monotonic() - began)
        asked = {"side": side, "kind": kind, "for": note, "pieces": pieces, "every_ms": every_ms, **how}
        self.loads.append({**asked, **found, "cpu_ms": cpu_ms, "upstream_busy": round(busy, 3)})
        print(f"{side:8} {kind:8} {how} {found}", flush=True)
        return self.loads[-1]


MODELS: Mapping[tuple[str, str], Sequence[tuple[str, bool]]] = {
    **{("direct", kind): [("cloud", True)] for kind in KINDS},
    **{("gateway", kind): [("selfroute-cloud", True)] for kind in KINDS},
    **{("litellm", kind): [("cloud", True)] for kind in KINDS},
    ("direct", "handoff"): [("device", False), ("cloud", True)],
    ("gateway", "handoff"): [("selfroute", True)],
}
"""The calls of one request by side and kind: models, and whether the answer is the text alone (a device's has tags)."""


def new_key(store: Path) -> str:
    command = [sys.executable, "-m", "selfroute", "keys", "new", "benchmark", "--store", str(store)]
    limits = ["--share", "1", "--usd-per-day", "100000", "--calls-per-minute", "1000000"]
    return subprocess.run([*command, *limits], capture_output=True, text=True, check=True).stdout.split()[0]  # noqa: S603


def cores() -> tuple[set[int], set[int]]:
    """Those of the generator and the upstream, and that of a proxy; none where they cannot be told apart."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return ({known[0]}, {known[1]}) if len(known) > 1 else (set(), set())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(url: str, allowed_s: float = 120) -> None:
    by = time.monotonic() + allowed_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            if time.monotonic() > by:
                sys.exit(f"{url} does not answer within {allowed_s:g} s")
        time.sleep(0.2)


def litellm_venv() -> Path:
    """LiteLLM's environment, made where it is missing."""
    folder = ROOT / f"build/litellm-{LITELLM}"
    if not (folder / "bin/litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)  # noqa: S603
        subprocess.run([str(folder / "bin/pip"), "install", "-q", f"litellm[proxy]=={LITELLM}"], check=True)  # noqa: S603
    return folder


def at_half_load(sides: Sides, kind: str, every_ms: float, seconds: float, tries: int) -> dict[str, Any]:
    """Loads of the direct call and of the gateway at half of what the gateway can do, as far as that stayed the same.

    A shared machine is faster in one second than in the next. Where a full gateway does more than a tenth more or less
    afterwards than before, the load was not half, and is measured again; of all tries, the steadiest counts, whatever
    its latencies.
    """

    def capacity() -> dict[str, Any]:
        return sides.load("gateway", kind, seconds, note="capacity", connections=256, every_ms=every_ms)

    found: list[dict[str, Any]] = []
    before = capacity()
    while not found or (found[-1]["drift"] > STEADY and len(found) < tries):
        rate = max(10.0, before["per_second"] / 2)
        half = {side: sides.load(side, kind, 2.5 * seconds, note="half load", rate=rate, every_ms=every_ms)
                for side in ("direct", "gateway")}  # fmt: skip
        after = capacity()
        slow, fast = sorted(max(1.0, full["per_second"]) for full in (before, after))
        drift = fast / slow - 1
        found.append({**half, "drift": drift, "upstream_busy": before["upstream_busy"]})
        before = after
    return min(found, key=lambda half: half["drift"])


def turn(sides: Sides, seconds: float, connections: Sequence[int], tries: int) -> dict[str, float]:
    """One round; its figures."""
    found: dict[str, float] = {}
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for number in connections:
            done = {side: sides.load(side, kind, seconds, note="throughput", connections=number)["per_second"]
                    for side in sides.ports if (side, kind, number) != ("litellm", "stream", 256)}  # fmt: skip
            if "litellm" in done and number > 1:
                ratios[kind].append(done["gateway"] / done["litellm"])
    if "litellm" in sides.ports:
        found = {"rps_ratio_vs_litellm": min(ratios["plain"]), "stream_rps_ratio_vs_litellm": min(ratios["stream"])}
    busy, drifts = [], []
    for kind, every_ms, prefix in WORKLOADS:
        half = at_half_load(sides, kind, every_ms, seconds, tries)
        busy.append(half["upstream_busy"])
        drifts.append(half["drift"])
        name = prefix if kind == "plain" else f"{prefix}{kind}_"
        for q in ("p50", "p99"):
            found[f"{name}added_ms_{q}"] = half["gateway"]["ms"][q] - half["direct"]["ms"][q]
        if kind == "stream":
            found[f"{prefix}ttft_added_ms_p50"] = half["gateway"]["first_ms"]["p50"] - half["direct"]["first_ms"]["p50"]
    found["upstream_busy"], found["drift"] = max(busy), max(drifts)
    cpu = {pieces: sides.load("gateway", "stream", seconds, note="cpu", connections=16, pieces=pieces)["cpu_ms"]
           for pieces in (8, 128)}  # fmt: skip
    found["cpu_us_per_event"] = (cpu[128] - cpu[8]) / 120 * 1e3
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(f(values), 3) for name, f in (("median", median), ("min", min), ("max", max))}


def versions(litellm: Path | None) -> dict[str, str]:
    named = ("starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "sqlalchemy", "pydantic")
    return {"python": platform.python_version(), **{name: version(name) for name in named},
            **({"litellm": LITELLM} if litellm else {})}  # fmt: skip


def machine() -> dict[str, Any]:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "system": platform.platform()}


def commit() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)  # noqa: S603, S607
    return done.stdout.strip()


TARGETS: Mapping[str, Callable[[float], bool]] = {
    "added_ms_p50": lambda ms: ms <= 2,
    "added_ms_p99": lambda ms: ms <= 8,
    "ttft_added_ms_p50": lambda ms: ms <= 2,
    "rps_ratio_vs_litellm": lambda ratio: ratio >= 5,
}


def main() -> None:
    """Measure and write FILE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.2, help="of one load")
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one short round, without LiteLLM")
    options = parser.parse_args()
    rounds, seconds, connections, tries = options.rounds, options.seconds, CONNECTIONS, TRIES
    if options.tiny:
        rounds, seconds, connections, tries = 1, 0.3, (1, 16), 1
    litellm = None if options.no_litellm or options.tiny else litellm_venv()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = Sides(stack, folder, litellm)
        for side in sides.proxies:
            sides.load(side, "stream", seconds, note="warming up", connections=4)
        turns = [turn(sides, seconds, connections, tries) for _ in range(rounds)]
        others = sides.elsewhere()
        many = sides.load("gateway", "stream", 2 * seconds, note="256 streams", connections=256, every_ms=20, pieces=64)
    figures = {name: spread([t[name] for t in turns]) for name in turns[0]}
    result = {
        **figures,
        "targets": {name: met(figures[name]["median"]) for name, met in TARGETS.items() if name in figures},
        "steady": figures["drift"]["max"] <= STEADY,
        "faults": {side: sum(load["faults"] for load in sides.loads if load["side"] == side) for side in sides.ports},
        "streams_at_once": {name: many[name] for name in ("asked", "faults", "ms", "first_ms")},
        "loads": sides.loads,
        "work": {"rounds": rounds, "seconds": seconds, "pieces": PIECES, "pinned": bool(cores()[0]),
                 "cores_busy_elsewhere": round(others, 3),
                 "machine": machine(), "versions": versions(litellm), "commit": commit()},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "loads"}, indent=1))


if __name__ == "__main__":
    main()
