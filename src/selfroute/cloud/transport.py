"""HTTP to endpoints of models: requests, bodies in pieces, and the three ways in which a connection fails.

aiohttp, for what a piece costs: its parser is in C. Left out on purpose: what a status means, retries, and how long a
piece is waited for, which differ between clouds and engines.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from types import SimpleNamespace
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


class Transport:
    """Connections to one endpoint. It follows no redirect and keeps no cookie.

    Args:
        key: sent as a bearer token; "" for none.
        connect_timeout_s: seconds to connect.
        keep: whether connections are used again.
        trust_env: whether a proxy that the environment names is used.
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
        try:
            response = await self._session(url).request(
                method, url, data=body, headers=TRACE.get(), allow_redirects=False, trace_request_ctx=sent
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
        tell = aiohttp.TraceConfig()
        tell.on_request_chunk_sent.append(_sent)
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
            # Looked up once: aiohttp would ask the environment, and ~/.netrc, for each request, in a thread.
            proxy=_proxy_of(url) if self._trust_env else None,
            trace_configs=[tell],
        )
        return self._opened


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for a URL."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


async def _sent(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: object) -> None:
    if context.trace_request_ctx:
        context.trace_request_ctx()


def _broken(error: Exception) -> BrokenError:
    # Without its cause: aiohttp's errors hold the request's headers, and so the key.
    slow = isinstance(error, aiohttp.ConnectionTimeoutError)
    return BrokenError(f"{type(error).__name__} {error}".strip(), slow=slow)
