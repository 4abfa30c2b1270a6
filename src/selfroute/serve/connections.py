"""A connection as the gateway takes it: what a request begins with comes in time, and is not too long.

uvicorn bounds neither, so that anybody, without a key, could hold connections open for ever, or the memory that their
headers take. Left out on purpose: the body, which has bounds of its own (`app`), and answers that nobody reads
(`server`).
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from selfroute.serve.refusal import RefusedError

HEAD_S = 30.0
"""Seconds from the first moment of a connection, or from a further request's first byte, to the end of the headers."""

MAX_HEAD = 64 * 2**10
"""Bytes of a request's line and headers together; one read from the socket may go beyond it."""


class Connection(HttpToolsProtocol):
    """Closed where a request's line and headers do not come within `HEAD_S`, or are longer than `MAX_HEAD`."""

    _late: asyncio.TimerHandle | None = None
    """While a head is waited for: ends that."""
    _begun = False
    """Whether some of it has come."""
    _head = 0
    """Bytes of it so far, without those of the first read where another request's were in it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and count what is not the end of a head."""
        waited = self._late
        super().data_received(data)
        if waited and self._late is waited and not self.transport.is_closing():
            self._head += len(data)
            if self._head > MAX_HEAD:
                message = f"the request's headers are longer than {MAX_HEAD} bytes"
                self._refuse(RefusedError(431, message, code="headers_too_large"))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        if not self._late:
            self._wait()
        self._begun = True

    def on_headers_complete(self) -> None:
        """A head's end."""
        self._wait_no_more()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self._give_up)

    def _wait_no_more(self) -> None:
        if self._late:
            self._late.cancel()
        self._late, self._begun, self._head = None, False, 0

    def _give_up(self) -> None:
        if self.cycle and not self.cycle.response_complete:
            # The answer to the request before it is still under way.
            self._wait()
        elif self._begun:
            message = f"the request's headers did not come within {HEAD_S:g} s"
            self._refuse(RefusedError(408, message, code="timeout"))
        else:
            self.transport.close()

    def _refuse(self, refusal: RefusedError) -> None:
        self._wait_no_more()
        body = json.dumps(refusal.body()).encode()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[refusal.status] + head.encode() + body)
        self.transport.close()
