"""Numbers and words of ours as the dashboard says them to people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from selfroute.serve.history import CLIENT_GONE, Health, RequestRecord

NONE = "–"

LIMITS: Mapping[str, str] = {
    "share": "share of requests",
    "usd_per_day": "USD a day",
    "calls_per_minute": "calls a minute",
    "requests_per_minute": "requests a minute",
    "store": "the store could not be asked",
    "cloud": "the cloud failed",
    "rule": "a rule: it must not leave",
    "privacy": "it could not be checked",
}
"""What kept a help call from being answered."""

DECISIONS: Mapping[str, str] = {"answer": "answers", "help": "asks", "undecided": "none", "": NONE}


def usd(value: float) -> str:
    """Money, with as many digits as it takes to see it: two where a third would not fit a phone's table.

    >>> [usd(v) for v in (0, 0.0000123, 0.000123, 0.0456, 0.5, 12.3)]
    ['0', '0.000012', '0.000123', '0.0456', '0.500', '12.30']
    """
    # Nothing is counted below a nano-USD.
    if value < 1e-9:
        return "0"
    more = 2 if value >= 1e-4 else 1
    return f"{value:,.{2 if value >= 1 else min(9, more - math.floor(math.log10(value)))}f}"


def mark(value: float) -> str:
    """A number on an axis.

    >>> [mark(v) for v in (0.00006, 1.2, 1200)]
    ['0.00006', '1.2', '1,200']
    """
    return f"{value:,.9f}".rstrip("0").rstrip(".")


def ms(value: float | None) -> str:
    """A time.

    >>> [ms(v) for v in (None, 0.84, 45.2, 812, 2345, 75000)]
    ['–', '0.8 ms', '45 ms', '812 ms', '2.3 s', '75 s']
    """
    if value is None:
        return NONE
    if value < 1000:
        return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"
    return f"{value / 1e3:.1f} s" if value < 60_000 else f"{value / 1e3:.0f} s"


def percent(share: float | None) -> str:
    """A share.

    >>> [percent(v) for v in (None, 0, 0.304, 1)]
    ['–', '0 %', '30.4 %', '100 %']
    """
    return NONE if share is None else f"{100 * share:.1f}".removesuffix(".0") + " %"


def count(value: float) -> str:
    """A number of things.

    >>> [count(v) for v in (0, 12, 1234, 1234567)]
    ['0', '12', '1,234', '1.23 M']
    """
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value:,.0f}"


def score(value: float | None) -> str:
    """l at the decision point, in nats.

    >>> [score(v) for v in (None, 1.5, -0.25)]
    ['–', '+1.50', '−0.25']
    """
    return NONE if value is None else f"{value:+.2f}".replace("-", "−")


def ago(seconds: float) -> str:
    """How long ago something was.

    >>> [ago(v) for v in (0.2, 42, 600)]
    ['just now', '42 s ago', '10 min ago']
    """
    if seconds < 2:
        return "just now"
    return f"{seconds:.0f} s ago" if seconds < 100 else f"{seconds / 60:.0f} min ago"


def clock(at: float, form: str = "%H:%M:%S") -> str:
    """A moment, by UTC as the budget's days are."""
    return datetime.fromtimestamp(at, UTC).strftime(form)


def cloud(health: Health, resting: bool) -> tuple[str, str]:
    """How the cloud is, in a word or two, and how that is to be taken.

    >>> [cloud(Health(10, failed, None), False) for failed in (0, 1, 5)]
    [('Answering', 'good'), ('Unsteady', 'warn'), ('Failing', 'bad')]
    >>> cloud(Health(0, 0, None), False), cloud(Health(10, 0, None), True)
    (('Not asked', 'idle'), ('Left alone', 'bad'))
    """
    if resting:
        return "Left alone", "bad"
    if not health.asked:
        return "Not asked", "idle"
    if not health.failed:
        return "Answering", "good"
    return ("Unsteady", "warn") if 2 * health.failed < health.asked else ("Failing", "bad")


def outcome(record: RequestRecord) -> tuple[str, str]:
    """Who answered a request, in a word or two, and which kind that is."""
    if record.status == CLIENT_GONE:
        return "stopped", "stopped"
    if record.status >= 400:
        return f"failed {record.status}", "failed"
    if record.denied:
        return "denied", "denied"
    return {
        "device": ("device", "device"),
        "cloud": ("cloud", "cloud"),
        "undecided": ("undecided", "stopped"),
        "": (NONE, "stopped"),
    }[record.route]


def hidden(redacted: str) -> str:
    """What the cloud did not see of a request, as its record has it.

    >>> hidden('{"EMAIL_ADDRESS": 2, "PERSON": 1}')
    'EMAIL_ADDRESS 2, PERSON 1'
    """
    return ", ".join(f"{kind} {number}" for kind, number in json.loads(redacted).items())


FILTERS: Mapping[str, Callable[..., Any]] = {
    "usd": usd,
    "mark": mark,
    "ms": ms,
    "percent": percent,
    "count": count,
    "score": score,
    "ago": ago,
    "clock": clock,
    "outcome": outcome,
    "hidden": hidden,
}
"""What the pages' templates may call."""
