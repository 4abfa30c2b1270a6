"""A connection as the gateway takes it: what a request begins with comes in time, and is not too long.

uvicorn bounds neither, so that anybody, without a key, could hold connections open for ever, or the memory that their
headers take. Left out on purpose: the body, which has bounds of its own (`app`), and answers that nobody reads
(`server`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from selfroute.serve.refusal import RefusedError, too_many

HEAD_S = 30.0
"""Seconds from the first moment of a connection, or from whatever comes after an answer, to the end of the headers."""

MAX_HEAD = 64 * 2**10
"""Bytes of a request's line and headers, beyond those of the read that they begin in."""

MAX_WAITING = 16
"""Requests of one connection that wait for the answers to those before them."""

_log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """Closed where a request's line and headers do not come within `HEAD_S`, or are longer than `MAX_HEAD`, or more
    than `MAX_WAITING` come at once; `refused` is told of those that had begun one."""

    _late: asyncio.TimerHandle | None = None
    """While a head is waited for: ends that."""
    _begun = False
    """Whether some of it has come."""
    _understood = False
    """Whether the last read brought the beginning or the end of a head, or some of a body."""
    _useless = 0
    """Bytes of the reads since then that brought none of these: of a head, of what stands between two chunks of a body
    or behind them, or of empty lines."""

    def __init__(self, *args: Any, refused: Callable[[RefusedError], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refused = refused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self._understood = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        self._useless = 0 if self._understood else self._useless + len(data)
        if self._useless > MAX_HEAD:
            message = f"the request's headers are longer than {MAX_HEAD} bytes"
            self._refuse(RefusedError(431, message, code="headers_too_large"))
        elif not self._late and not self._answering:
            # Any byte ends uvicorn's wait for a further request: also one that begins none.
            self._wait()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if len(self.pipeline) >= MAX_WAITING:
            self._refused(too_many(f"{MAX_WAITING} requests of one connection wait for their answers"))
            # What is left of the read may be thousands of them, and only an error ends it.
            self.transport.abort()
            raise ValueError
        super().on_message_begin()
        if not self._late:
            self._wait()
        self._begun = self._understood = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; what stands behind a body in chunks is none, and nobody reads it."""
        if self._begun:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head's end."""
        self._wait_no_more()
        self._understood = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._understood = True
        super().on_body(body)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self._give_up)

    def _wait_no_more(self) -> None:
        if self._late:
            self._late.cancel()
        self._late, self._begun = None, False

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        if self._answering:
            # To the request before it.
            self._wait()
        elif self._begun:
            self._refuse(RefusedError(408, f"the request's headers did not come within {HEAD_S:g} s", code="timeout"))
        else:
            self.transport.close()

    def _refuse(self, refusal: RefusedError) -> None:
        _log.warning("a connection is closed: %s", refusal)
        if self._begun:
            self._refused(refusal)
        self._wait_no_more()
        # An answer under way breaks off; in the middle of it, this would be read as its text.
        if not self._answering:
            body = json.dumps(refusal.body()).encode()
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[refusal.status] + head.encode() + body)
        self.transport.close()
