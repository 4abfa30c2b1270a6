from __future__ import annotations

from selfroute.cloud.breaker import Breaker


def test_it_opens_lets_one_try_and_closes_again() -> None:
    now = [0.0]
    breaker = Breaker(failures=2, cooldown_s=10, clock=lambda: now[0])
    breaker.failed()
    assert breaker.wait_s() == 0
    breaker.succeeded()
    breaker.failed()
    assert breaker.wait_s() == 0
    breaker.failed()
    assert breaker.wait_s() == 10
    now[0] = 4
    assert breaker.wait_s() == 6
    now[0] = 10
    # One tries; the others wait for how it goes.
    assert breaker.wait_s() == 0
    assert breaker.wait_s() == 10
    breaker.failed()
    now[0] = 15
    assert breaker.wait_s() == 5
    now[0] = 20
    assert breaker.wait_s() == 0
    breaker.succeeded()
    assert breaker.wait_s() == 0
    breaker.failed()
    assert breaker.wait_s() == 0
