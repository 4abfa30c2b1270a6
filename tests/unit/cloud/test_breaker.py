from __future__ import annotations

import asyncio
import logging
import time

import pytest

from selfroute.cloud.breaker import Breaker, Outcome


async def ask(breaker: Breaker, outcome: Outcome, takes_s: float = 0.0) -> float:
    """One request that ends in an outcome; returns how long it waited to be admitted."""
    started = time.monotonic()
    async with breaker.attempt() as attempt:
        waited = time.monotonic() - started
        await asyncio.sleep(takes_s)
        attempt.outcome = outcome
    return waited


def test_it_opens_after_failures_in_a_row_and_closes_after_a_try() -> None:
    async def run() -> None:
        breaker = Breaker(failures=2, cooldown_s=0.2, patience=3)
        for outcome in ("down", "up", "down", "unknown"):
            assert await ask(breaker, outcome) < 0.1  # type: ignore[arg-type]
        assert await ask(breaker, "down") < 0.1
        # Open: the next waits, tries, and is answered; then nobody waits.
        assert await ask(breaker, "up") >= 0.19
        assert await ask(breaker, "up") < 0.1

    asyncio.run(run())


def test_one_tries_and_the_others_wait_for_it() -> None:
    async def run() -> None:
        breaker = Breaker(failures=1, cooldown_s=0.1, patience=2)
        await ask(breaker, "down")
        waits = await asyncio.gather(*(ask(breaker, "up", takes_s=0.5) for _ in range(4)))
        first, *others = sorted(waits)
        assert 0.09 <= first < 0.4
        assert all(wait >= 0.55 for wait in others)

    asyncio.run(run())


def test_waiting_ends_when_tries_fail_and_when_a_try_is_cancelled_another_begins() -> None:
    async def run() -> None:
        breaker = Breaker(failures=1, cooldown_s=0.05, patience=2)
        await ask(breaker, "down")
        tries = [asyncio.create_task(ask(breaker, "down")) for _ in range(4)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(r, TimeoutError) for r in results) == 2
        cancelled = asyncio.create_task(ask(breaker, "up", takes_s=60))
        await asyncio.sleep(0.2)
        cancelled.cancel()
        assert await asyncio.wait_for(ask(breaker, "up"), 5) < 1

    asyncio.run(run())


def test_patience_is_counted_from_when_a_request_came() -> None:
    async def run() -> None:
        breaker = Breaker(failures=1, cooldown_s=0.01, patience=1)
        for _ in range(5):
            await ask(breaker, "down")
        with pytest.raises(TimeoutError):
            await asyncio.gather(*(ask(breaker, "down") for _ in range(2)))

    asyncio.run(run())


def test_patience_is_counted_over_all_attempts_of_a_request() -> None:
    async def run() -> None:
        breaker = Breaker(failures=1, cooldown_s=0.01, patience=2)
        came = breaker.failed_tries
        for _ in range(3):
            async with breaker.attempt(came) as attempt:
                attempt.outcome = "down"
        with pytest.raises(TimeoutError):
            async with breaker.attempt(came):
                pass

    asyncio.run(run())


@pytest.mark.parametrize(("patience", "then"), [(6, "a request gives up after about 0.3 s"), (0, "no request waits")])
def test_each_opening_is_told_once_with_its_cause(patience: int, then: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        breaker = Breaker(failures=2, cooldown_s=0.05, patience=patience)

        async def fail() -> None:
            async with breaker.attempt() as attempt:
                attempt.outcome, attempt.cause = "down", "connection refused"

        for _ in range(2):
            # Two failures open it, and a try that fails opens nothing that was closed.
            await fail()
            await fail()
            await asyncio.sleep(0.06)
            await fail()
            await asyncio.sleep(0.06)
            await ask(breaker, "up")
        assert breaker.cause == "connection refused"

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second
    assert first.startswith("connection refused; after 2 failures in a row it is asked again every 0.05 s, and " + then)
