"""Who may ask: a key in the Authorization header, or the session of a browser that signed in with one."""

from __future__ import annotations

import logging
from typing import Protocol

from starlette.requests import Request

from selfroute.errors import StoreError
from selfroute.serve.account import Scope
from selfroute.serve.refusal import RefusedError

COOKIE = "selfroute_session"

_log = logging.getLogger(__name__)


class Key(Protocol):
    """What the gateway must know of a key; see `keys.Key`."""

    @property
    def policies(self) -> frozenset[str]:
        """What may be asked for with it."""
        ...

    @property
    def models(self) -> frozenset[str] | None:
        """Models that it may name; None: all."""
        ...

    @property
    def scope(self) -> Scope:
        """Under which its use is counted."""
        ...

    @property
    def admin(self) -> bool:
        """Whether it may see what others do."""
        ...


class Keys(Protocol):
    """Who may ask; see `keys.Keyring`."""

    async def check(self, authorization: str | None) -> Key | None:
        """The key of an Authorization header, or None when it is not valid."""
        ...


class Sessions(Protocol):
    """Browsers that signed in; see `sessions.Sessions`."""

    async def begin(self, shown: str) -> str | None:
        """A new session's token for a valid key."""
        ...

    async def key(self, token: str) -> Key | None:
        """Whose session it is."""
        ...

    async def end(self, token: str) -> None:
        """Forget a session."""
        ...


async def key_of(request: Request, keys: Keys | None, sessions: Sessions | None) -> Key | None:
    """The key under which a request comes; None where none are asked for.

    A header goes before a cookie, which browsers send by themselves.

    Raises:
        RefusedError: it shows none that is valid, or that cannot be known now.
    """
    if keys is None:
        return None
    authorization = request.headers.get("authorization")
    try:
        if authorization is None and sessions and (cookie := request.cookies.get(COOKIE)):
            key = await sessions.key(cookie)
        else:
            key = await keys.check(authorization)
    except StoreError as error:
        _log.error("keys cannot be checked: %s", error)
        raise RefusedError(503, "keys cannot be checked now", code="store_unavailable", retry_after_s=5) from error
    if key is None:
        why = "the key is not known, is revoked or has expired" if authorization else "a key is needed"
        raise RefusedError(401, f"{why}: Authorization: Bearer sr-...", code="invalid_api_key")
    return key
