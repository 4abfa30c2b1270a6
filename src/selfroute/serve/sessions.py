"""Browsers that signed in: an opaque token in a cookie, which stands for a key for a while.

The token is 256 random bits and the store has its hash, as of keys, so that any worker knows it, whoever reads the
store can sign in with nothing that is there, and revoking a key ends its sessions. Left out on purpose: the cookie.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from sqlalchemy import Connection, delete, insert, or_, select

from selfroute.serve.keys import Key, Keyring, hashed
from selfroute.serve.store import Store
from selfroute.serve.tables import SESSIONS

LASTS_S = 8 * 3600
"""A working day; then the key has to be shown again."""


class Sessions:
    """The sessions of a store, of the keys on a ring."""

    def __init__(self, store: Store, ring: Keyring, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._ring, self._clock = store, ring, clock

    async def begin(self, shown: str) -> str | None:
        """A new session's token for somebody who shows a key, or None when it is not valid.

        Raises:
            StoreError: the store failed.
        """
        key = await self._ring.check(f"Bearer {shown.strip()}")
        if key is None:
            return None
        token, now = secrets.token_urlsafe(32), self._clock()
        row = {"hash": hashed(token), "key_id": key.id, "expires_at": now + LASTS_S}

        def work(connection: Connection) -> None:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.expires_at <= now))
            connection.execute(insert(SESSIONS), row)

        await self._store.write(work)
        return token

    async def key(self, token: str) -> Key | None:
        """Whose session it is, while both it and the key are valid.

        Raises:
            StoreError: the store failed.
        """
        query = select(SESSIONS.c.key_id).where(SESSIONS.c.hash == hashed(token), SESSIONS.c.expires_at > self._clock())
        key_id = await self._store.read(lambda c: c.execute(query).scalar())
        return None if key_id is None else await self._ring.find(key_id)

    async def end(self, token: str) -> None:
        """Forget a session, and those whose time is up.

        Raises:
            StoreError: the store failed.
        """
        over = or_(SESSIONS.c.hash == hashed(token), SESSIONS.c.expires_at <= self._clock())
        await self._store.write(lambda c: c.execute(delete(SESSIONS).where(over)))
