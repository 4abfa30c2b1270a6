"""The connection to an engine by URL: requests, events of a stream, what each wait may take, what a failure means."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from selfroute.cloud.transport import BrokenError, Incoming, Transport
from selfroute.cloud.wire import message_of
from selfroute.errors import ContextError, DeviceError, RejectedError

T = TypeVar("T")

MAX_EVENT_BYTES = 2**20
"""A longer event of a stream is a fault."""

LOOK_TIMEOUT_S = 10.0
"""Seconds for an answer that is not generated."""

_TOO_LONG = (b"exceed_context_size", b"context_length_exceeded", b"maximum context length", b"context length")
"""What engines say of a conversation that is longer than their context."""

_NO_MODEL = re.compile(rb"(?i)no models? (is |are )?loaded|model[^.]{0,100} not (found|loaded|exist)|does not exist")
"""What engines say, with a status of 400, that have not the model: no fault of the request."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds for each kind of waiting, as the engine's config has them."""

    connect_s: float
    first_byte_s: float
    idle_s: float


class Wire:
    """An engine's HTTP side; it follows no redirect, and nothing that it raises holds the key.

    Args:
        base_url: what paths are added to.
        key: the engine's key; "" for none.
        patience: how long it is waited for.
    """

    def __init__(self, base_url: str, key: str, patience: Patience) -> None:
        self.where = f"the engine at {base_url}"
        self._base_url, self._key, self._patience = base_url, key, patience
        # An engine may close a connection that is kept just as the next request takes it; and a proxy that the
        # environment names would see what is not to leave the device.
        self._http = Transport(key, patience.connect_s, keep=False, trust_env=False)

    async def aclose(self) -> None:
        """Close the connections, which stops what is under way."""
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """An answer's JSON.

        Raises:
            DeviceError: there is none.
        """
        response = await self._send("GET", path, min(LOOK_TIMEOUT_S, self._patience.first_byte_s))
        try:
            async with aclosing(self._lines(response)) as lines:
                return self._json(b"".join([line async for line in lines]))
        finally:
            response.close()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any]:
        """The events of a streamed answer; closing the generator closes the connection.

        Comments keep a stream alive and are no events; its end without `[DONE]` is an end.

        Raises:
            ContextError: the conversation does not fit the engine's context.
            RejectedError: the engine refuses the request as it is.
            DeviceError: the engine failed.
        """
        response = await self._send("POST", path, self._patience.first_byte_s, body)
        try:
            async with aclosing(self._lines(response)) as lines:
                async for line in lines:
                    field, _, data = line.partition(b":")
                    if field not in (b"data", b"error") or data.strip() in (b"", b"[DONE]"):
                        continue
                    event = self._json(data)
                    if field == b"error" or (isinstance(event, dict) and event.get("error")):
                        raise self._refusal(500, data)
                    yield event
        finally:
            response.close()

    async def _send(self, method: str, path: str, allowed_s: float, body: Mapping[str, Any] | None = None) -> Incoming:
        """An answer of status 200, its body yet to be read."""
        sent = None if body is None else json.dumps(body).encode()
        response = await self._wait(
            self._http.send(method, self._base_url + path, sent), allowed_s, "for the first byte"
        )
        if response.status == 200:
            return response
        said = b""
        try:
            async with aclosing(self._lines(response)) as lines:
                async for line in lines:
                    said += line
                    if len(said) > 4096:
                        break
        finally:
            response.close()
        raise self._refusal(response.status, said)

    async def _lines(self, response: Incoming) -> AsyncGenerator[bytes]:
        rest = b""
        while piece := await self._wait(response.piece(), self._patience.idle_s, "between two pieces"):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line
            if len(rest) > MAX_EVENT_BYTES:
                raise DeviceError(f"{self.where} sent an event of more than {MAX_EVENT_BYTES // 2**20} MiB")
        yield rest

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise DeviceError(f"{self.where} sent what is no JSON: {data[:80]!r}") from None

    def _refusal(self, status: int, body: bytes) -> DeviceError:
        """What a status other than 200, or an error in a stream, means."""
        said = message_of(body.replace(self._key.encode(), b"***") if self._key else body)
        if 300 <= status < 400:
            return DeviceError(f"{self.where} sends elsewhere ({status}), which is not followed: give its own URL")
        if status in (401, 403):
            return DeviceError(f"{self.where} refuses the key, or wants one by api_key_var ({status}): {said}")
        # Both are told to the client, whom the engine's address is no business of.
        if any(sign in body for sign in _TOO_LONG):
            return ContextError(f"the engine says: {said}")
        if status in (400, 422) and not _NO_MODEL.search(body):
            return RejectedError(f"the engine refuses the request: {said}")
        return DeviceError(f"{self.where} answers {status}: {said}")

    async def _wait(self, what: Awaitable[T], allowed_s: float, name: str) -> T:
        try:
            async with asyncio.timeout(allowed_s):
                return await what
        except TimeoutError:
            raise DeviceError(f"{self.where} took longer than {allowed_s:g} s {name}") from None
        except BrokenError as error:
            if error.slow:
                raise DeviceError(f"{self.where} took longer than {self._patience.connect_s:g} s to connect") from None
            raise DeviceError(f"{self.where} cannot be reached: {error}") from error
