"""Virtual keys: what a client of the gateway shows, what it may use with it, and until when.

A key is 256 random bits, shown once. The store has its SHA-256 alone: a slow, salted hash protects what people think
up and an attacker can guess; 256 random bits cannot be guessed, so a fast one gives nothing away and costs a request
a microsecond.

All valid keys are kept in memory for `FRESH_S`, so a key that does not exist costs no query, and one that was revoked
is refused after that time at the latest. Nothing that a client sends reaches the database: what has not the form of a
key is refused before it is hashed, and of the rest there is only a hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from selfroute.serve.account import Limits, Scope
from selfroute.serve.latest import Latest
from selfroute.serve.store import Store
from selfroute.serve.tables import KEYS
from selfroute.types import POLICIES, Policy

FRESH_S = 1.0
"""How long a worker may not have heard of a new or a revoked key."""

_FORM = re.compile(r"sr-[A-Za-z0-9_-]{43}")
_SHOWN = 10
"""Characters of a key that are kept for people: "sr-" and 42 of its 256 bits."""


@dataclass(frozen=True, slots=True)
class Key:
    """A valid key: its id and name, its limits, and what may be asked for with it (`models` None: all).

    An `admin`'s shows the metrics, and on the dashboard everybody's requests; any other its own alone.
    """

    id: str
    prefix: str
    name: str
    limits: Limits
    policies: frozenset[str]
    models: frozenset[str] | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    admin: bool = False

    @property
    def scope(self) -> Scope:
        """Under which its use is counted."""
        return Scope(f"key:{self.id}", self.limits)

    def valid(self, now: float) -> bool:
        """Whether it is neither revoked nor past its time."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new(
    connection: Connection,
    name: str,
    limits: Limits | None = None,
    *,
    policies: Collection[Policy] = tuple(POLICIES.values()),
    models: Collection[str] | None = None,
    admin: bool = False,
    expires_at: float | None = None,
) -> tuple[str, Key]:
    """Make a key; the token is nowhere kept, so this is the one time that it can be shown."""
    token = f"sr-{secrets.token_urlsafe(32)}"
    row = {
        "id": secrets.token_hex(4),
        "hash": hashed(token),
        "prefix": token[:_SHOWN],
        "name": name,
        "limits": (limits or Limits()).model_dump_json(exclude_defaults=True),
        "policies": json.dumps(sorted(policies)),
        "models": json.dumps(None if models is None else sorted(models)),
        "created_at": time.time(),
        "expires_at": expires_at,
        "revoked_at": None,
        "admin": int(admin),
    }
    connection.execute(insert(KEYS), row)
    return token, _key(connection.execute(select(KEYS).where(KEYS.c.id == row["id"])).one())


def everything(connection: Connection) -> list[Key]:
    """All keys that ever were, the oldest first."""
    return [_key(row) for row in connection.execute(select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id))]


def revoke(connection: Connection, key_id: str) -> bool:
    """Make a key invalid for ever; False when there is none of that id that is not revoked."""
    valid = KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None)
    return connection.execute(update(KEYS).where(*valid).values(revoked_at=time.time())).rowcount == 1


class Keyring:
    """The keys of a store, as a worker asks for them."""

    def __init__(self, store: Store, *, fresh_s: float = FRESH_S, clock: Callable[[], float] = time.time) -> None:
        self._fresh_s, self._clock = fresh_s, clock
        self._keys = Latest(lambda: store.read(_valid))

    async def check(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header (`Bearer sr-...`), or None when it is not valid.

        What it takes does not depend on how much of the token is right: it is looked up, and compared, by its hash.

        Raises:
            StoreError: the store failed and what is known is too old; nobody is let in then.
        """
        token = bearer(authorization)
        keys = await self._fresh()
        if token is None:
            return None
        key = keys.get(hashed(token))
        return key if key and key.valid(self._clock()) else None

    async def anybody(self) -> bool:
        """Whether any key is valid.

        Raises:
            StoreError: as from `check`.
        """
        return any(key.valid(self._clock()) for key in (await self._fresh()).values())

    async def find(self, key_id: str) -> Key | None:
        """The valid key of an id, as a session has it; never of anything that shows the right to it.

        Raises:
            StoreError: as from `check`.
        """
        keys = await self._fresh()
        return next((k for k in keys.values() if k.id == key_id and k.valid(self._clock())), None)

    async def _fresh(self) -> Mapping[str, Key]:
        """The keys by their hash, as they were `fresh_s` ago or later."""
        return await self._keys.since(time.monotonic() - self._fresh_s)


def bearer(authorization: str | None) -> str | None:
    """The token of an Authorization header, if it has the form of one of ours.

    >>> bearer("Bearer sr-' OR 1=1 --") is None
    True
    """
    scheme, _, token = (authorization or "").partition(" ")
    return token if scheme.lower() == "bearer" and _FORM.fullmatch(token) else None


def hashed(token: str) -> str:
    """A token as the store keeps it; tokens are long and random, so that a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


def _valid(connection: Connection) -> dict[str, Key]:
    rows = connection.execute(select(KEYS).where(KEYS.c.revoked_at.is_(None)))
    return {row.hash: _key(row) for row in rows}


def _key(row: Row[Any]) -> Key:
    models = json.loads(row.models)
    return Key(
        row.id,
        row.prefix,
        row.name,
        Limits.model_validate_json(row.limits),
        frozenset(json.loads(row.policies)),
        None if models is None else frozenset(models),
        row.created_at,
        row.expires_at,
        row.revoked_at,
        bool(row.admin),
    )
