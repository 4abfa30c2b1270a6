"""Browsers that signed in: an opaque token in a cookie, which stands for a key for a while.

The token is 256 random bits and the store has its hash, as of keys, so that any worker knows it, whoever reads the
store can sign in with nothing that is there, and revoking a key ends its sessions. Left out on purpose: the cookie.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from sqlalchemy import Connection, delete, insert, or_, select

from selfroute.serve.keys import Key, Keyring, hashed
from selfroute.serve.latest import Latest
from selfroute.serve.store import Store
from selfroute.serve.tables import SESSIONS

LASTS_S = 8 * 3600
"""A working day; then the key has to be shown again."""

_FORM = re.compile(r"[A-Za-z0-9_-]{43}")


class Sessions:
    """The sessions of a store, of the keys on a ring."""

    def __init__(self, store: Store, ring: Keyring, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._ring, self._clock = store, ring, clock
        self._sessions = Latest(lambda: store.read(_all))

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
        key_id, expires_at = await self._found(token)
        return await self._ring.find(key_id) if expires_at > self._clock() else None

    async def end(self, token: str) -> None:
        """Forget a session, and those whose time is up.

        Raises:
            StoreError: the store failed.
        """
        key_id, _ = await self._found(token)
        if not key_id:
            # Nobody can make the store write without a session.
            return
        over = or_(SESSIONS.c.hash == hashed(token), SESSIONS.c.expires_at <= self._clock())
        await self._store.write(lambda c: c.execute(delete(SESSIONS).where(over)))

    async def _found(self, token: str) -> tuple[str, float]:
        """Whose session it is, and until when; ("", 0) of none."""
        if not _FORM.fullmatch(token):
            return "", 0.0
        sessions = await self._sessions.since(time.monotonic())
        return sessions.get(hashed(token), ("", 0.0))


def _all(connection: Connection) -> dict[str, tuple[str, float]]:
    rows = connection.execute(select(SESSIONS.c.hash, SESSIONS.c.key_id, SESSIONS.c.expires_at))
    return {row.hash: (row.key_id, row.expires_at) for row in rows}
