"""The load generator finds a lost, a doubled and a foreign piece, and counts what was answered."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("loopback")


def asked(loopback: ModuleType, protocol: Any, *, stream: bool, **how: Any) -> dict[str, Any]:
    """What comes of a short load on an upstream."""

    async def run() -> dict[str, Any]:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        steps = [{"model": "cloud", "key": "k", "stream": stream, "exact": True}]
        load = {"name": "a", "port": port, "steps": steps, "seconds": 0.2, "warm_s": 0.0}
        wanted = {"pieces": 3, "every_ms": 0, "device": "answer"}
        found: dict[str, Any] = await loopback.Generator({**load, "wanted": wanted, **how}).run()
        server.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [{"connections": 4}, {"rate": 200}], ids=["closed", "paced"])
def test_an_upstream_that_answers_well(loopback: ModuleType, stream: bool, how: dict[str, Any]) -> None:
    found = asked(loopback, loopback.Upstream, stream=stream, **how)
    assert found["faults"] == 0
    assert 0 < found["requests"] <= found["asked"]
    assert 0 < found["first_ms"]["p50"] <= found["ms"]["p50"] <= found["ms"]["p99"]


@pytest.mark.parametrize("fault", ["lost", "doubled", "swapped"])
def test_an_upstream_that_garbles(loopback: ModuleType, fault: str) -> None:
    class Garbling(loopback.Upstream):  # type: ignore[name-defined, misc]
        def _events(self, body: Any, pieces: list[str]) -> Iterator[bytes]:
            a, b, c = pieces
            changed = {"lost": [a, c], "doubled": [a, b, b, c], "swapped": [b, a, c]}[fault]
            return super()._events(body, changed)  # type: ignore[no-any-return]

    found = asked(loopback, Garbling, stream=True, connections=2)
    assert found["faults"] == found["asked"] > 0
    assert "a.1-0 a.1-1 a.1-2" in found["fault"]
