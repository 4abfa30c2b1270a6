"""The dashboard's charts as geometry: what stands where on a canvas that is stretched to the page's width.

Shapes alone are drawn in SVG; words and numbers stand beside them in HTML, so that they keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfroute.serve.history import Percentiles, Totals

WIDTH, HEIGHT = 1000.0, 160.0
"""The canvas, in units of its own."""

_GAP = 0.18
"""Of a step's width, what is left free between bars."""

_ROUND = (1.0, 1.2, 1.4, 1.6, 2.0, 2.4, 3.0, 4.0, 6.0, 8.0, 10.0)

Steps = Sequence[tuple[float, Totals]]


@dataclass(frozen=True, slots=True)
class Bar:
    """One step: where it stands, and its parts from the bottom up as (kind, y, height)."""

    at: float
    x: float
    width: float
    parts: tuple[tuple[str, float, float], ...]
    totals: Totals


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars under a scale that ends at `top`."""

    top: float
    bars: tuple[Bar, ...]


def routes(steps: Steps) -> Bars:
    """Requests by where they went: to the device, whose call was denied, to the cloud, nowhere."""
    kinds = {"device": on_device, "denied": lambda t: t.denied, "cloud": by_cloud, "failed": lambda t: t.errors}
    return _bars(steps, kinds)


def costs(steps: Steps) -> Bars:
    """What the cloud charged."""
    return _bars(steps, {"cost": lambda t: t.cost_usd}, least=0.0)


def on_device(totals: Totals) -> int:
    """Requests that the device answered as it decided, or whose client went away."""
    return max(0, totals.requests - by_cloud(totals) - totals.denied - totals.errors)


def by_cloud(totals: Totals) -> int:
    """Requests that the cloud answered."""
    return totals.calls - totals.failed_calls


@dataclass(frozen=True, slots=True)
class Line:
    """A stepped line as an SVG path, and the height of a limit (None: there is none), under a scale that ends at
    `top`."""

    top: float
    path: str
    limit: float | None


def rate(steps: Steps, limit: float | None) -> Line:
    """The call rate, and its budget; the line breaks where nothing was asked."""
    rates = [totals.calls / totals.requests if totals.requests else None for _, totals in steps]
    highest = max([0.1, limit or 0.0, *(share for share in rates if share)])
    top = min(1.0, nice(1.05 * highest))
    width = WIDTH / max(1, len(steps))
    path, joined = [], False
    for i, share in enumerate(rates):
        if share is not None:
            y = HEIGHT * (1 - min(1.0, share / top))
            path.append(f"{'V' if joined else f'M{i * width:.1f} '}{y:.1f}H{(i + 1) * width:.1f}")
        joined = share is not None
    return Line(top, "".join(path), None if limit is None else round(HEIGHT * (1 - limit / top), 1))


def _bars(steps: Steps, kinds: Mapping[str, Callable[[Totals], float]], least: float = 4.0) -> Bars:
    values = [[(kind, of(totals)) for kind, of in kinds.items()] for _, totals in steps]
    top = nice(max([least, *(sum(value for _, value in parts) for parts in values)]))
    step = WIDTH / max(1, len(steps))
    bars = []
    for i, ((at, totals), parts) in enumerate(zip(steps, values, strict=True)):
        y, drawn = HEIGHT, []
        for kind, value in parts:
            tall = HEIGHT * value / top
            y -= tall
            if value:
                drawn.append((kind, round(y, 2), round(tall, 2)))
        bars.append(Bar(at, round((i + _GAP / 2) * step, 2), round((1 - _GAP) * step, 2), tuple(drawn), totals))
    return Bars(top, tuple(bars))


def nice(value: float) -> float:
    """The next round number whose half is round too.

    >>> [nice(v) for v in (0, 4, 51, 120)]
    [1.0, 4.0, 60.0, 120.0]
    """
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(m * unit for m in _ROUND if m * unit >= value * (1 - 1e-9))


@dataclass(frozen=True, slots=True)
class Reach:
    """From the median to the 99th percentile, on a scale of 100 that all latencies share; `p90` lies between."""

    p50: float
    p90: float
    p99: float


def reaches(latencies: Mapping[str, Percentiles]) -> dict[str, Reach]:
    """Where latencies lie on a logarithmic scale, from a millisecond to the longest; those that were never measured
    are left out."""
    longest = max([10.0, *(p.p99 for p in latencies.values() if p.p99)])

    def at(ms: float | None) -> float:
        return round(100 * math.log10(max(1.0, ms or 1.0)) / math.log10(longest), 1)

    return {name: Reach(at(p.p50), at(p.p90), at(p.p99)) for name, p in latencies.items() if p.count}
