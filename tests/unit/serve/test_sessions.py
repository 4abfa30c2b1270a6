"""Sessions of browsers: begun with a key, known by a hash, over with their time, their key, or at a word."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text

from selfroute.serve import keys
from selfroute.serve.keys import Key, Keyring
from selfroute.serve.sessions import LASTS_S, Sessions
from selfroute.serve.store import Store


def make(store: Store) -> tuple[str, Key]:
    with store.begin() as connection:
        return keys.new(connection, "laptop", admin=True)


def begun(store: Store, shown: str) -> str | None:
    return asyncio.run(Sessions(store, Keyring(store)).begin(shown))


def whose(store: Store, token: str, now: float | None = None) -> Key | None:
    clock = {} if now is None else {"clock": lambda: now}
    return asyncio.run(Sessions(store, Keyring(store), **clock).key(token))


def test_any_worker_knows_a_session_by_its_token_alone(store: Store) -> None:
    token, key = make(store)
    session = begun(store, f" {token}\n")
    assert session
    assert whose(store, session) == key
    for wrong in ("", token, session[:-1], key.id, f"{session}x"):
        assert whose(store, wrong) is None
    with store.begin(write=False) as connection:
        row = connection.execute(text("SELECT * FROM sessions")).one()
    assert session not in str(row)
    assert whose(store, row.hash) is None


def test_what_is_no_key_begins_none(store: Store) -> None:
    token, key = make(store)
    for wrong in ("", key.id, f"{token}x", "sr-' OR 1=1 --", "\0" * 46, "é" * 46):
        assert begun(store, wrong) is None
    with store.begin(write=False) as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM sessions")).scalar() == 0


def test_a_session_ends_with_its_time_and_is_forgotten(store: Store) -> None:
    token, key = make(store)
    session = begun(store, token)
    assert session
    with store.begin(write=False) as connection:
        until = connection.execute(text("SELECT expires_at FROM sessions")).scalar()
    assert until
    assert whose(store, session, until - 1) == key
    assert whose(store, session, until) is None
    later = Sessions(store, Keyring(store), clock=lambda: until + LASTS_S)
    asyncio.run(later.end(session))
    with store.begin(write=False) as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM sessions")).scalar() == 0


def test_what_is_no_session_costs_next_to_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(store, Keyring(store))
    asked: list[str] = []
    for name in ("read", "write"):
        does = getattr(store, name)
        monkeypatch.setattr(
            store, name, lambda *args, name=name, does=does, **more: asked.append(name) or does(*args, **more)
        )

    async def garbage(*tokens: str) -> None:
        assert await asyncio.gather(*map(sessions.key, tokens)) == [None] * len(tokens)
        await asyncio.gather(*map(sessions.end, tokens))

    asyncio.run(garbage("garbage", "'" * 43, ""))
    assert asked == []
    # What could be one is looked up, for all who ask at a time at once, and nothing is written.
    asyncio.run(garbage(*(f"{n:043}" for n in range(50))))
    assert 1 <= len(asked) <= 4
    assert "write" not in asked


def test_a_session_ends_with_its_key_and_at_a_word(store: Store) -> None:
    token, key = make(store)
    one, other = begun(store, token), begun(store, token)
    assert one
    assert other
    asyncio.run(Sessions(store, Keyring(store)).end(one))
    assert whose(store, one) is None
    assert whose(store, other) == key
    with store.begin() as connection:
        keys.revoke(connection, key.id)
    assert whose(store, other) is None
