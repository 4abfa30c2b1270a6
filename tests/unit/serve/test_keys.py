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


def test_nobody_is_let_in_while_the_store_fails(store: Store) -> None:
    token, _ = make(store)
    ring = Keyring(store, fresh_s=0)
    assert check(ring, token)
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TABLE keys")
    with pytest.raises(StoreError):
        check(ring, token)
