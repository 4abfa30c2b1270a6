"""Geometry by hand: what stands where on a canvas of 1000 by 160."""

from __future__ import annotations

import pytest

from selfroute.serve import charts
from selfroute.serve.history import Percentiles, Totals


def test_bars_stack_from_the_bottom_and_never_pass_the_top() -> None:
    steps = [(0.0, Totals()), (60.0, Totals(requests=10, calls=4, denied=2, errors=2, failed_calls=1))]
    chart = charts.routes(steps)
    assert chart.top == 10
    empty, bar = chart.bars
    assert empty.parts == ()
    assert bar.parts == (("device", 112.0, 48.0), ("denied", 80.0, 32.0), ("cloud", 32.0, 48.0), ("failed", 0.0, 32.0))
    assert (bar.x, bar.width) == (545.0, 410.0)


def test_money_has_a_scale_of_its_own() -> None:
    chart = charts.costs([(0.0, Totals(cost_usd=0.0003)), (60.0, Totals(cost_usd=0.0001))])
    assert chart.top == pytest.approx(0.0003)
    assert [bar.parts[0][2] for bar in chart.bars] == pytest.approx([160.0, 53.33])
    assert charts.costs([(0.0, Totals())]).top == 1


def test_the_rates_line_is_stepped_and_breaks_where_nothing_was_asked() -> None:
    steps = [
        (float(i), Totals(requests=requests, calls=calls))
        for i, (requests, calls) in enumerate([(4, 1), (4, 2), (0, 0), (2, 2), (0, 0)])
    ]
    line = charts.rate(steps, 0.5)
    assert line.path == "M0.0 120.0H200.0V80.0H400.0M600.0 0.0H800.0"
    assert (line.top, line.limit) == (1.0, 80.0)
    line = charts.rate([(0.0, Totals(requests=10, calls=1))], None)
    assert line == charts.Line(pytest.approx(0.12), "M0.0 26.7H1000.0", None)
    assert charts.rate([(0.0, Totals())], 0.0).path == ""


def test_latencies_share_a_logarithmic_scale() -> None:
    never = Percentiles(0, None, None, None)
    found = charts.reaches({"device_ms": Percentiles(9, 1.0, 10.0, 100.0), "total_ms": Percentiles(9, 10.0, 100.0, 1e4),
                            "cloud_ms": never})  # fmt: skip
    assert set(found) == {"device_ms", "total_ms"}
    assert (found["device_ms"].p50, found["device_ms"].p90, found["device_ms"].p99) == (0.0, 25.0, 50.0)
    assert found["total_ms"].p99 == 100.0
