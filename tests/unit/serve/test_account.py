"""The arithmetic of limits, against lists of everything that ever happened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfroute.config import validate
from selfroute.errors import ConfigError
from selfroute.serve.account import DAY_S, MOST_NANO, Account, Denied, Limits, Scope, Window, nano

events = st.lists(
    st.tuples(st.floats(0, 40), st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=60
)  # seconds later, requests, calls


@given(events, st.sampled_from([60, 90, 3600]))
def test_a_window_holds_what_happened_within_its_length_and_at_most_a_slot_more(
    steps: list[tuple[float, int, int]], length_s: int
) -> None:
    window, now, happened = Window(length_s), 1e9, []
    for later_s, requests, calls in steps:
        now += later_s
        window = window.add(now, requests, calls)
        happened.append((now, requests, calls))
        found = window.totals(now)
        for i in (0, 1):
            within = sum(e[i + 1] for e in happened if now - e[0] < length_s)
            with_a_slot_more = sum(e[i + 1] for e in happened if now - e[0] <= length_s * 21 / 20)
            assert within <= found[i] <= with_a_slot_more
        assert len(window.slots) <= 21


def test_a_window_is_empty_when_all_has_left_and_says_when_the_oldest_call_will() -> None:
    window = Window(60).add(1200.5, requests=2).add(1210.2, requests=1, calls=1)
    assert window.totals(1210.2) == (3, 1)
    # Slots are of 3 s: those from 1200 and from 1209 on.
    assert window.moves_on_in_s(1211.0, calls=True) == pytest.approx(1209 + 63 - 1211)
    assert window.moves_on_in_s(1211.0, calls=False) == pytest.approx(1200 + 63 - 1211)
    assert [window.totals(t) for t in (1262.9, 1263.0, 1271.9, 1272.0)] == [(3, 1), (1, 1), (1, 1), (0, 0)]
    assert window.moves_on_in_s(1272.0, calls=True) is None


def test_a_clock_that_is_behind_counts_at_the_newest_slot() -> None:
    window = Window(60).add(1000, calls=1).add(100, calls=1)
    assert window.totals(1000) == (0, 2)


def test_a_call_is_taken_back_once_and_only_while_it_is_there() -> None:
    window = Window(60).add(1200, requests=1, calls=1).add(1203, calls=1)
    assert window.take_back(1202.9).totals(1203) == (1, 1)
    assert window.take_back(1202.9).take_back(1200).totals(1203) == (1, 1)
    assert window.take_back(900) == window


NOW = 1e9
KEY = "key:a"


def refuses(account: Account, worst: int = 0, now: float = NOW, **limits: float) -> Denied | None:
    return account.refuses_call(Scope(KEY, validate(Limits, limits, "test")), now, worst)


def account(requests: int = 0, calls: int = 0) -> Account:
    made = Account().on(int(NOW // DAY_S), 3600, NOW).arrive(NOW, requests)
    for _ in range(calls):
        made = made.hold(NOW, 0)
    return made


@pytest.mark.parametrize(
    ("requests", "calls", "granted"),
    [(1, 5, True), (1, 6, False), (20, 6, False), (23, 6, False), (24, 6, True), (100, 29, True), (100, 30, False)],
)
def test_a_share_is_of_the_requests_in_the_window_and_of_a_least_number(
    requests: int, calls: int, granted: bool
) -> None:
    refused = refuses(account(requests, calls), share=0.3, min_requests=20)
    assert (refused is None) == granted
    if not granted:
        assert refused == Denied("share", KEY, pytest.approx(3600 + 180 - NOW % 180))


def test_a_share_of_none_and_of_all() -> None:
    assert refuses(account(100), share=0) == Denied("share", KEY, None)
    assert refuses(account(100, 99), share=1) is None
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert refuses(account(100, 28), share=0.29, min_requests=1) is None


def test_calls_a_minute() -> None:
    assert refuses(account(calls=2), calls_per_minute=3) is None
    refused = refuses(account(calls=3), calls_per_minute=3)
    assert refused == Denied("calls_per_minute", KEY, pytest.approx(63 - NOW % 3))


def test_money_of_a_day_counts_what_is_held_back_and_begins_anew_at_midnight() -> None:
    midnight = (NOW // DAY_S + 1) * DAY_S
    held = account().hold(NOW, nano(0.6))
    assert refuses(held, nano(0.4), usd_per_day=1) is None
    assert refuses(held, nano(0.4) + 1, usd_per_day=1) == Denied("usd_per_day", KEY, midnight - NOW)
    settled = held.pay(held.day, nano(0.6), nano(0.1))
    assert (settled.held, settled.spent) == (0, nano(0.1))
    assert refuses(settled, nano(0.9), usd_per_day=1) is None
    assert refuses(settled, nano(0.9) + 1, usd_per_day=1) is not None
    tomorrow = held.on(held.day + 1, 3600, midnight)
    assert tomorrow.pay(held.day, nano(0.6), nano(0.1)) == tomorrow
    assert refuses(tomorrow, nano(1), now=midnight, usd_per_day=1) is None
    assert refuses(tomorrow, nano(1) + 1, now=midnight, usd_per_day=1) == Denied("usd_per_day", KEY, None)


def test_a_call_is_taken_back_from_both_windows() -> None:
    assert account(5, 2).take_back(NOW) == account(5, 1)


def test_requests_a_minute() -> None:
    scope = Scope(KEY, Limits(requests_per_minute=2))
    assert account(1).refuses_request(scope, NOW) is None
    assert account(2).refuses_request(scope, NOW) == Denied("requests_per_minute", KEY, pytest.approx(63 - NOW % 3))
    assert account(2).refuses_request(scope, NOW + 63) is None


def test_a_window_of_another_length_forgets_no_call() -> None:
    changed = account(5, 2).on(account().day, 600, NOW)
    assert changed.window.length_s == 600
    assert changed.minute == account(5, 2).minute
    # Replicas with both lengths, in turn.
    for n in range(10):
        changed = changed.on(changed.day, 3600 if n % 2 else 600, NOW + n)
        assert changed.window.totals(NOW + n) == (5, 2)
    assert changed.window.totals(NOW + 10 * 3600) == (0, 0)
    assert account().on(account().day, 600, NOW).window == Window(600)


def test_amounts_are_rounded_to_the_nearest_nano_usd_and_bounded() -> None:
    assert nano(0.1 + 0.2) == 300_000_000
    assert nano(float("inf")) == nano(1e300) == MOST_NANO
    for bad in (-1e-9, float("nan")):
        with pytest.raises(ValueError, match="0 or more"):
            nano(bad)


@pytest.mark.parametrize("bad", [{"share": 1.1}, {"share": -0.1}, {"usd_per_day": -1}, {"window_s": 59}, {"shares": 1}])
def test_limits_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        validate(Limits, bad, "test")
