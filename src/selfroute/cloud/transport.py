"""HTTP to endpoints of models: requests, bodies in pieces, and the three ways in which a connection fails.

aiohttp, for what a piece costs: its parser is in C. Left out on purpose: what a status means, retries, and how long a
piece is waited for, which differ between clouds and engines.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import truststore

from selfroute.trace import TRACE

KEEP_S = 4.0
"""Seconds that an idle connection is kept: less than servers do (uvicorn 5 s), or one would be closed just as a request
takes it."""


class BrokenError(Exception):
    """No answer, or no more of it; `slow` is that connecting took too long. The message never holds the key."""

    def __init__(self, text: str, *, slow: bool = False) -> None:
        super().__init__(text)
        self.slow = slow


class Incoming:
    """An answer: its status, and its body as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    @property
    def ended(self) -> bool:
        """Whether the whole body was read; False where that is not known yet."""
        return self._response.content.at_eof()

    def at_hand(self) -> bytes:
        """All of the body that has come since the last piece, without waiting; empty where nothing has."""
        content = self._response.content
        return b"" if content.exception() else content.read_nowait()

    async def piece(self) -> bytes:
        """All of the body that has come since the last piece; empty at its end.

        Raises:
            BrokenError: it breaks off.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error) from None

    def close(self) -> None:
        """Let go of the connection; of one that has more to say, by closing it."""
        self._response.close()


class _Body(aiohttp.BytesPayload):
    """A request's body that says when it goes out. aiohttp's tracing would say so too, and costs several times as
    much."""

    def __init__(self, body: bytes, sent: Callable[[], None]) -> None:
        super().__init__(body)
        self._sent = sent

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        self._sent()
        await super().write_with_length(writer, content_length)


class Transport:
    """Connections to one endpoint. It follows no redirect and keeps no cookie.

    Args:
        key: sent as a bearer token; "" for none.
        connect_timeout_s: seconds to connect.
        keep: whether connections are used again.
        trust_env: whether a proxy that the environment names is used (HTTPS_PROXY, NO_PROXY); never what it has of keys
            (~/.netrc).
    """

    def __init__(self, key: str, connect_timeout_s: float, *, keep: bool, trust_env: bool) -> None:
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._keep, self._trust_env = keep, trust_env
        self._opened: aiohttp.ClientSession | None = None

    async def send(
        self, method: str, url: str, body: bytes | None = None, sent: Callable[[], None] | None = None
    ) -> Incoming:
        """An answer, its body yet to be read, in the caller's trace; `sent` is called just before the body goes out.

        Raises:
            BrokenError: there is none.
        """
        data = _Body(body, sent) if body and sent else body
        try:
            response = await self._session(url).request(
                method, url, data=data, headers=TRACE.get(), allow_redirects=False
            )
            return Incoming(response)
        except (aiohttp.ClientError, OSError) as error:
            raise _broken(error) from None

    async def aclose(self) -> None:
        """Close the connections, which stops what is under way."""
        if self._opened:
            await self._opened.close()

    def _session(self, url: str) -> aiohttp.ClientSession:
        if self._opened:
            return self._opened
        # It belongs to the event loop of the first request.
        self._opened = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                ssl=truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                force_close=not self._keep,
                keepalive_timeout=KEEP_S if self._keep else None,
            ),
            headers=self._headers,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            # aiohttp's `trust_env` would send ~/.netrc's password to an endpoint that has no key, fail at one that has,
            # and look both up in a thread for each request.
            proxy=_proxy(url) if self._trust_env else None,
        )
        return self._opened


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    place = urlsplit(url)
    return None if proxy_bypass(place.netloc) else getproxies().get(place.scheme)


def _broken(error: Exception) -> BrokenError:
    # Without its cause: aiohttp's errors hold the request's headers, and so the key.
    slow = isinstance(error, aiohttp.ConnectionTimeoutError)
    said = _unconnected(error) if isinstance(error, aiohttp.ClientConnectorError) else f"{type(error).__name__} {error}"
    # A proxy's address, as the environment gives it, may hold its password.
    return BrokenError(re.sub(r"//[^/\s]*@", "//", said.strip()), slow=slow)


def _unconnected(error: aiohttp.ClientConnectorError) -> str:
    """Why there is no connection, in the system's words: aiohttp's speak of TLS where there is none, and asyncio's of
    calls and tuples."""
    cause = error.os_error
    if cause.errno and not isinstance(cause, (ssl.SSLError, socket.gaierror)):
        said = os.strerror(cause.errno).lower()
    else:
        # These have numbers of their own.
        said = cause.strerror or str(cause) or str(error)
    proxy = isinstance(error, aiohttp.ClientProxyConnectionError)
    return f"the proxy at {error.host}:{error.port}: {said}" if proxy else said
