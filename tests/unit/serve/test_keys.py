"""Virtual keys: made, listed, checked, revoked."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import text

from selfroute.errors import StoreError
from selfroute.serve import keys
from selfroute.serve.account import Limits, Scope
from selfroute.serve.keys import Key, Keyring
from selfroute.serve.store import Store

LIMITS = Limits(share=0.3, usd_per_day=2.5, calls_per_minute=10, requests_per_minute=60)


def make(store: Store, name: str = "laptop", **settings: Any) -> tuple[str, Key]:
    with store.begin() as connection:
        return keys.new(connection, name, **settings)


def check(ring: Keyring, token: str | None) -> Key | None:
    return asyncio.run(ring.check(None if token is None else f"Bearer {token}"))


def test_a_key_lets_in_with_its_own_limits(store: Store) -> None:
    token, made = make(store, limits=LIMITS, policies=["auto", "device-only"], models=["pair"])
    key = check(Keyring(store), token)
    assert key == made
    assert (key.name, key.limits, key.policies, key.models) == ("laptop", LIMITS, {"auto", "device-only"}, {"pair"})
    assert key.scope == Scope(f"key:{key.id}", LIMITS)
    other, _ = make(store, "other")
    assert check(Keyring(store), other).limits == Limits()


def test_the_store_holds_a_hash_and_nothing_to_guess_the_key_from(store: Store) -> None:
    token, key = make(store)
    assert len(token) == 46
    assert token.startswith(key.prefix)
    with store.begin(write=False) as connection:
        kept = str(connection.execute(text("SELECT * FROM keys")).one())
    assert token[len(key.prefix) :] not in kept
    assert make(store)[0] != token


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_schemes_case_does_not_matter(store: Store, scheme: str) -> None:
    token, key = make(store)
    assert asyncio.run(Keyring(store).check(f"{scheme} {token}")) == key


def hostile(token: str) -> list[str | None]:
    return [
        None, "", "Bearer", "Bearer ", token, f"Basic {token}", f"Bearer  {token}", f"Bearer {token}x",
        f"Bearer {token[:-1]}", f"Bearer {token}\n", f"Bearer {token}\0", f"Bearer {token.upper()}",
        "Bearer sr-' OR '1'='1", "Bearer " + "\x00\xff\udcff" * 20, "Bearer sr-" + "é" * 43,
        "Bearer " + "x" * 10_000_000, "Bearer sr-" + "%" * 43, "Bearer sr-" + "A" * 43,
    ]  # fmt: skip


class Watched(Store):
    """Another store, with a count of who reads from it."""

    def __init__(self, store: Store) -> None:
        self.store, self.reads = store, 0

    async def read(self, work: Any) -> Any:
        self.reads += 1
        return await self.store.read(work)


def test_whatever_else_is_shown_lets_nobody_in_and_asks_the_database_nothing(store: Store) -> None:
    token, _ = make(store)
    watched = Watched(store)

    async def run() -> None:
        ring = Keyring(watched, fresh_s=60)
        assert await ring.check(f"Bearer {token}")
        for authorization in hostile(token):
            assert await ring.check(authorization) is None, authorization

    asyncio.run(run())
    assert watched.reads == 1


def test_a_revoked_key_is_refused_as_soon_as_the_ring_looks_again(store: Store) -> None:
    token, key = make(store)
    fresh, stale = Keyring(store, fresh_s=0), Keyring(store, fresh_s=60)
    assert check(fresh, token) == check(stale, token) == key
    with store.begin() as connection:
        assert keys.revoke(connection, key.id)
        assert not keys.revoke(connection, key.id)
        assert not keys.revoke(connection, "' OR 1=1 --")
    assert check(fresh, token) is None
    assert check(stale, token) == key
    with store.begin(write=False) as connection:
        (listed,) = keys.everything(connection)
    assert listed.revoked_at == pytest.approx(time.time(), abs=60)


def test_a_key_ends_on_time_whatever_the_ring_remembers(store: Store) -> None:
    token, _ = make(store, expires_at=1000.0)
    now = [999.9]
    ring = Keyring(store, fresh_s=60, clock=lambda: now[0])
    assert check(ring, token)
    now[0] = 1000.0
    assert check(ring, token) is None


def test_many_who_come_at_once_are_one_query(store: Store) -> None:
    token, key = make(store)
    watched = Watched(store)

    async def run() -> list[Key | None]:
        ring = Keyring(watched, fresh_s=60)
        return await asyncio.gather(*(ring.check(f"Bearer {token}") for _ in range(50)))

    assert asyncio.run(run()) == [key] * 50
    assert watched.reads == 1


class Slow(Watched):
    """A store whose answers wait until they may come; it fails then where it is `down`."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.may_answer, self.down = asyncio.Event(), False

    async def read(self, work: Any) -> Any:
        found = await super().read(work)
        await self.may_answer.wait()
        if self.down:
            raise StoreError("no answer")
        return found


async def asked(store: Watched, times: int) -> None:
    """Wait until the store was asked so many times."""
    while store.reads < times:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)


def test_many_who_wait_for_one_that_fails_hear_of_it_together(store: Store) -> None:
    token, key = make(store)

    async def run() -> None:
        slow = Slow(store)
        ring = Keyring(slow, fresh_s=0.5)
        waiting = [asyncio.create_task(ring.check(f"Bearer {token}")) for _ in range(50)]
        await asked(slow, 1)
        slow.down = True
        slow.may_answer.set()
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(error) for error in failed} == {StoreError}
        assert slow.reads == 1
        slow.down = False
        assert await ring.check(f"Bearer {token}") == key

    asyncio.run(run())


def test_one_who_goes_away_does_not_take_the_answer_from_the_others(store: Store) -> None:
    token, key = make(store)

    async def run() -> None:
        slow = Slow(store)
        ring = Keyring(slow, fresh_s=60)
        first, second = (asyncio.create_task(ring.check(f"Bearer {token}")) for _ in range(2))
        await asked(slow, 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        slow.may_answer.set()
        assert await second == key
        assert slow.reads == 1

    asyncio.run(run())


def test_an_answer_that_took_long_lets_in_nobody_who_was_revoked_before_he_came(store: Store) -> None:
    token, key = make(store)

    async def run() -> None:
        slow = Slow(store)
        ring = Keyring(slow, fresh_s=0.01)
        before = asyncio.create_task(ring.check(f"Bearer {token}"))
        await asked(slow, 1)
        with store.begin() as connection:
            assert keys.revoke(connection, key.id)
        after = asyncio.create_task(ring.check(f"Bearer {token}"))
        await asyncio.sleep(0.05)
        slow.may_answer.set()
        assert await before == key
        assert await after is None
        assert slow.reads == 2

    asyncio.run(run())


def test_nobody_is_let_in_while_the_store_fails(store: Store) -> None:
    token, _ = make(store)
    ring = Keyring(store, fresh_s=0)
    assert check(ring, token)
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TABLE keys")
    with pytest.raises(StoreError):
        check(ring, token)
