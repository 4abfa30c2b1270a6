"""The cloud over HTTP: any OpenAI-compatible endpoint (DeepSeek, OpenAI, OpenRouter, vLLM, llama.cpp).

One transport for `complete` and `stream`: what is retried, how long is waited, and what may be spent are the same for
training, evaluation and serving. Left out on purpose: the cache and the ledger, which `cloud.memory` keeps.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

import httpx2
from pydantic import Field, ValidationError, field_validator

from selfroute.cloud.breaker import Breaker
from selfroute.cloud.prices import price_of
from selfroute.cloud.thinking import Thinking
from selfroute.cloud.wire import Collected, Reply, Usage, message_of, parse_retry_after
from selfroute.config import Config
from selfroute.errors import CloudError, ConfigError
from selfroute.types import CloudAnswer, CloudChunk, CloudRequest

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 2**20
"""An answer longer than this is a fault."""

MAX_RETRY_AFTER_S = 120.0
"""A provider that asks to be left alone for longer is an error at once."""


_NOT_EXTRA = {
    *("model", "models", "route", "messages", "temperature", "max_tokens", "max_completion_tokens", "n", "stream"),
    *("stream_options", "service_tier", "tools", "plugins", "web_search_options"),
}
"""Fields that selfroute sets itself, or that would change the price."""


class OpenAIConfig(Config):
    """An OpenAI-compatible endpoint, and how patient to be with it."""

    base_url: str
    """Such as `https://api.deepseek.com/v1`; `/chat/completions` is added."""
    model: str = Field(min_length=1)
    """The model's name there."""
    api_key_var: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key; None for a server that wants none."""
    extra: dict[str, Any] = Field({})
    """More fields of the request, such as `{reasoning_effort = "low"}`."""
    max_tokens: int | None = Field(8192, ge=1)
    """Tokens of an answer, its reasoning included; None: what each request says."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it; OpenAI's reasoning models want the second."""
    send_temperature: bool = True
    """Whether to send a temperature; OpenAI's reasoning models refuse one."""
    concurrency: int = Field(16, ge=1)
    """Requests at a time."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds to connect."""
    first_byte_timeout_s: float = Field(300.0, gt=0)
    """Seconds from the request to the first byte of the answer; without streaming, that is all of its thinking."""
    idle_timeout_s: float = Field(60.0, gt=0)
    """Seconds between two pieces of an answer."""
    total_timeout_s: float = Field(900.0, gt=0)
    """Seconds for an attempt in all."""
    max_retries: int = Field(5, ge=0)
    """Further attempts after a time-out, a broken connection, or a status of 408, 409, 429 or 5xx."""
    backoff_s: float = Field(0.5, gt=0)
    """Seconds before the first further attempt; each one doubles it, and a random part of it is added."""
    breaker_failures: int = Field(8, ge=1)
    """Failures in a row after which the provider is left alone."""
    breaker_cooldown_s: float = Field(20.0, gt=0)
    """Seconds for which it is."""
    spend_limit_usd: float | None = Field(None, ge=0)
    """USD that a run may spend in all, by its ledger; a call that could pass it is not made."""
    usd_per_million_prompt_tokens: float | None = Field(None, ge=0)
    """Price of prompt tokens; None: as in the package's price file."""
    usd_per_million_completion_tokens: float | None = Field(None, ge=0)
    """Price of completion tokens, reasoning included; None: as in the package's price file."""

    @field_validator("base_url")
    @classmethod
    def _plain(cls, base_url: str) -> str:
        try:
            url = httpx2.URL(base_url)
        except httpx2.InvalidURL as error:
            raise ValueError(str(error)) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("must begin with https:// or http:// and name a host")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("must hold no user, password, query or fragment; a key goes by api_key_var")
        return base_url.rstrip("/")

    @field_validator("extra")
    @classmethod
    def _beside(cls, extra: dict[str, Any]) -> dict[str, Any]:
        ours = sorted(_NOT_EXTRA & set(extra))
        if ours:
            raise ValueError(f"{', '.join(ours)}: not here, so that what is asked, and what it may cost, is known")
        return extra


_TIMES = {"connect_timeout_s", "first_byte_timeout_s", "idle_timeout_s", "total_timeout_s"}
_PRICES = {"usd_per_million_prompt_tokens", "usd_per_million_completion_tokens"}


class OpenAICloud:
    """The provider; implements `types.CloudClient`."""

    Config = OpenAIConfig
    FREE = frozenset(
        {"api_key_var", "concurrency", "max_retries", "backoff_s", "breaker_failures", "breaker_cooldown_s"}
        | {"spend_limit_usd", *_TIMES, *_PRICES}
    )
    """Settings that change no answer: they are no part of the cache's key, and a run may go on with others."""

    def __init__(self, config: OpenAIConfig) -> None:
        self.config = config
        self._price = price_of(
            config.model, config.usd_per_million_prompt_tokens, config.usd_per_million_completion_tokens
        )
        self._key = _read_key(config.api_key_var)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(None, connect=config.connect_timeout_s),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )
        self._gate = asyncio.Semaphore(config.concurrency)
        self._breaker = Breaker(config.breaker_failures, config.breaker_cooldown_s, config.max_retries + 1)
        # What was paid, a call that broke off counted at its worst; and the worst of the calls under way.
        self._spent_usd = self._reserved_usd = self._abandoned_usd = 0.0
        self._settled = asyncio.Condition()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"provider": "openai", **self.config.model_dump(exclude=set(self.FREE))}

    @property
    def concurrency(self) -> int:
        return self.config.concurrency

    def carry(self, spent_usd: float) -> None:
        self._spent_usd += spent_usd

    def abandoned_usd(self) -> float:
        abandoned, self._abandoned_usd = self._abandoned_usd, 0.0
        return abandoned

    async def aclose(self) -> None:
        await self._client.aclose()

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        """The whole answer.

        Raises:
            CloudError: it could not be had, after the retries that make sense; the message says why, and never holds
                the key.
        """

        async def attempt() -> CloudAnswer:
            started = time.monotonic()
            async with _Exchange(self, request, stream=False) as exchange:
                body = b"".join([piece async for piece in exchange.pieces()])
                answer = self._answer(exchange.read(body), request, time.monotonic() - started)
                exchange.bill(answer.cost_usd)
                return answer

        async with self._gate:
            return await self._retrying(attempt)

    async def stream(self, request: CloudRequest) -> AsyncIterator[CloudChunk]:
        """The answer as it comes. What fails before the first piece is tried again; after it nothing is.

        Raises:
            CloudError: as from `complete`, or the connection broke in mid-answer.
        """
        async with self._gate:
            started = time.monotonic()
            exchange, first = await self._retrying(lambda: self._begin(request))
            try:
                collected = Collected()
                event: Reply | None = first
                while event is not None:
                    for chunk in collected.add(event):
                        yield chunk
                    event = await anext(exchange.events, None)
                for chunk in collected.rest():
                    yield chunk
                answer = self._answer(collected.reply(), request, time.monotonic() - started)
                exchange.bill(answer.cost_usd)
            except _TransientError as error:
                raise CloudError(f"{error}, in the middle of an answer") from error
            finally:
                await exchange.close()
            yield CloudChunk(final=answer)

    async def _begin(self, request: CloudRequest) -> tuple[_Exchange, Reply]:
        """An open stream, and its first event."""
        exchange = _Exchange(self, request, stream=True)
        try:
            await exchange.open()
            first = await anext(exchange.events, None)
            if first is None:
                raise _TransientError(f"{self._where} sent an empty stream")
            return exchange, first
        except BaseException:
            await exchange.close()
            raise

    def _body(self, request: CloudRequest, *, stream: bool) -> dict[str, Any]:
        c = self.config
        body: dict[str, Any] = {"model": c.model, "messages": [dict(m) for m in request.messages]}
        body[c.max_tokens_field] = self._max_tokens(request)
        if c.send_temperature:
            body["temperature"] = request.temperature
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | c.extra

    def _max_tokens(self, request: CloudRequest) -> int:
        return self.config.max_tokens or request.max_tokens

    def _worst_usd(self, request: CloudRequest) -> float:
        """The most that a call may cost: no token is shorter than a byte, and a message's frame is a few tokens."""
        prompt = sum(len(m["content"].encode()) + 32 for m in request.messages)
        return self._price.of(prompt, self._max_tokens(request))

    async def reserve(self, request: CloudRequest) -> float:
        """Hold back the worst case of a call, in USD, and return it; where others hold back too much, wait for them.

        Raises:
            CloudError: with it the limit might be passed.
        """
        worst_usd, limit = self._worst_usd(request), self.config.spend_limit_usd
        async with self._settled:
            while limit is not None and self._spent_usd + self._reserved_usd + worst_usd > limit:
                if self._spent_usd + worst_usd > limit:
                    raise _LimitError(
                        f"the spend limit of {limit:g} USD is reached: {self._spent_usd:.4f} are spent, and a call may "
                        f"cost {worst_usd:.4f} (raise spend_limit_usd, or lower max_tokens)"
                    )
                await self._settled.wait()
            self._reserved_usd += worst_usd
        return worst_usd

    async def settle(self, worst_usd: float, cost_usd: float, *, abandoned: bool) -> None:
        """Put what a call cost in place of what was held back for it."""
        async with self._settled:
            self._reserved_usd -= worst_usd
            self._spent_usd += cost_usd
            self._abandoned_usd += cost_usd if abandoned else 0.0
            self._settled.notify_all()

    def _answer(self, reply: Reply, request: CloudRequest, latency_s: float) -> CloudAnswer:
        if not reply.choices or reply.choices[0].message is None:
            raise _UnreadableError("the cloud answered without a choice")
        choice = reply.choices[0]
        message = choice.message
        assert message is not None
        if choice.finish_reason in (None, "error", "insufficient_system_resource"):
            raise _UnreadableError(f"the cloud's answer breaks off (its finish_reason is {choice.finish_reason})")
        split = Thinking()
        parts = [split.feed(message.content or ""), split.end()]
        reasoning = (message.thoughts + "".join(r for r, _ in parts)).strip()
        text = "".join(a for _, a in parts)
        if not text and not reasoning and choice.finish_reason == "stop":
            raise _UnreadableError("the cloud's answer is empty")
        usage = reply.usage or Usage()
        # Where a server does not tell: about four characters make a token.
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        if prompt_tokens is None:
            prompt_tokens = sum(len(m["content"]) for m in request.messages) // 4 + 1
        if completion_tokens is None:
            completion_tokens = (len(text) + len(reasoning)) // 4 + 1
        return CloudAnswer(
            text=text,
            reasoning=reasoning,
            finished=choice.finish_reason == "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=self._price.of(prompt_tokens, completion_tokens, usage.cached_tokens),
            latency_s=latency_s,
        )

    async def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """An attempt's result, after as many attempts as its failures are worth."""
        c = self.config
        unreadable = 0
        for number in range(c.max_retries + 1):
            try:
                return await self._guarded(attempt)
            except _TransientError as error:
                unreadable += isinstance(error, _UnreadableError)
                # What cannot be read was paid for, and is likely to come the same again.
                if number == c.max_retries or unreadable > 1:
                    raise CloudError(f"{error} ({number + 1} attempts)") from error
                # Random, so that those who wait for the same moment do not all come at once.
                pause_s = min(30.0, c.backoff_s * 2**number) if error.retry_after_s is None else error.retry_after_s
                await asyncio.sleep(pause_s + random.uniform(0, c.backoff_s))
        raise AssertionError

    async def _guarded(self, attempt: Callable[[], Awaitable[T]]) -> T:
        try:
            async with self._breaker.attempt() as seen:
                try:
                    result = await attempt()
                except _TransientError as error:
                    seen.outcome = "down" if error.down else "up"
                    raise
                except _LimitError:
                    raise
                except CloudError:
                    # It answered, if only to refuse.
                    seen.outcome = "up"
                    raise
                seen.outcome = "up"
                return result
        except TimeoutError:
            raise CloudError(f"{self._where} stays down; other requests got no answer for a while") from None

    @property
    def _where(self) -> str:
        return f"the cloud at {self.config.base_url}"

    def _refusal(self, status: int, body: bytes, retry_after: str | None = None) -> CloudError:
        """What a status other than 200 means, and the way out; some send it in the body of a 200."""
        c = self.config
        said = message_of(self._masked(body))
        if status in (401, 403):
            key = f"the key in ${c.api_key_var}" if c.api_key_var else "a request without a key (set api_key_var)"
            return CloudError(f"{self._where} refuses {key} ({status}): {said}")
        if status == 404:
            return CloudError(f"{self._where} knows no model {c.model!r}, or no such path (404): {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            wait_s = parse_retry_after(retry_after)
            if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
                return CloudError(f"{self._where} asks to wait for {wait_s:.0f} s ({status}): {said}")
            return _TransientError(f"{self._where} answers {status}: {said}", wait_s, down=status >= 500)
        return CloudError(f"{self._where} rejects the request ({status}): {said}")

    def _masked(self, body: bytes) -> bytes:
        """What the provider said, without the key, which some repeat."""
        return body.replace(self._key.encode(), b"***") if self._key else body


class _LimitError(CloudError):
    """The spend limit is reached."""


class _TransientError(CloudError):
    """A failure that another attempt may mend: `retry_after_s` is what the provider asks to wait, `down` that it is
    a failure of the provider, not its asking for patience."""

    def __init__(self, text: str, retry_after_s: float | None = None, *, down: bool = True) -> None:
        super().__init__(text)
        self.retry_after_s, self.down = retry_after_s, down


class _UnreadableError(_TransientError):
    """An answer came, and is none."""

    def __init__(self, text: str) -> None:
        super().__init__(text, down=False)


class _Exchange:
    """One HTTP request and its answer, each piece waited for no longer than it may take."""

    def __init__(self, cloud: OpenAICloud, request: CloudRequest, *, stream: bool) -> None:
        self._cloud = cloud
        self._body = json.dumps(cloud._body(request, stream=stream)).encode()
        self._response: httpx2.Response | None = None
        self._deadline = self._first_byte_by = 0.0
        self._started = False
        self.events = self._events()
        self._request = request
        self._worst_usd: float | None = None
        self.cost_usd = 0.0
        """What it costs, as far as is known: the worst, nothing where the provider did not take it on, or its bill."""
        self.billed = False

    async def __aenter__(self) -> _Exchange:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Send the request and read the status.

        Raises:
            CloudError: it is not 200, or none came.
        """
        cloud, c = self._cloud, self._cloud.config
        self.cost_usd = self._worst_usd = await cloud.reserve(self._request)
        now = time.monotonic()
        self._deadline, self._first_byte_by = now + c.total_timeout_s, now + c.first_byte_timeout_s
        request = cloud._client.build_request(
            "POST", f"{c.base_url}/chat/completions", content=self._body,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        self._response = await self._wait(cloud._client.send(request, stream=True))
        status = self._response.status_code
        if status != 200:
            # A gateway's time-out or its bad upstream may come after the model has run.
            if (status < 500 and status != 408) or status == 503:
                self.cost_usd = 0.0
            said = b""
            async for piece in self.pieces():
                said += piece
                if len(said) > 4096:
                    break
            raise cloud._refusal(status, said, self._response.headers.get("Retry-After"))

    def bill(self, cost_usd: float) -> None:
        """The whole answer came, and this is what it costs."""
        self.cost_usd, self.billed = cost_usd, True

    async def close(self) -> None:
        """Let go of the connection, which cancels an answer that is still coming, and settle the bill."""
        if self._worst_usd is not None:
            worst_usd, self._worst_usd = self._worst_usd, None
            await self._cloud.settle(worst_usd, self.cost_usd, abandoned=not self.billed)
        await self.events.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            CloudError: it stalls, breaks off, or is too long.
        """
        assert self._response is not None
        pieces, size = self._response.aiter_bytes(), 0
        while True:
            try:
                piece = await self._wait(anext(pieces))
            except StopAsyncIteration:
                return
            self._started = True
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise CloudError(f"{self._cloud._where} sent more than {MAX_BODY_BYTES // 2**20} MiB in one answer")
            yield piece

    async def _events(self) -> AsyncGenerator[Reply]:
        """The stream's events. Comments keep it alive and are no events; an end without `[DONE]` is one too.

        Raises:
            CloudError: as from `pieces`, or the provider sends an error in the stream.
        """
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield self.read(data)
        if rest.startswith(b"data:") and (data := rest.removeprefix(b"data:").strip()) != b"[DONE]":
            yield self.read(data)

    def read(self, data: bytes) -> Reply:
        """An answer, or a piece of one.

        Raises:
            CloudError: it is an error, or cannot be read.
        """
        try:
            read = Reply.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise _UnreadableError(f"the cloud's answer cannot be read: {first['msg']}") from None
        if read.error is not None:
            code = read.error.get("code") if isinstance(read.error, dict) else None
            raise self._cloud._refusal(code if isinstance(code, int) else 500, data)
        return read

    async def _wait(self, what: Awaitable[T]) -> T:
        c, where = self._cloud.config, self._cloud._where
        now = time.monotonic()
        by, name, allowed_s = self._first_byte_by, "for the first byte", c.first_byte_timeout_s
        if self._started:
            by, name, allowed_s = now + c.idle_timeout_s, "between two pieces", c.idle_timeout_s
        if self._deadline < by:
            by, name, allowed_s = self._deadline, "in all", c.total_timeout_s
        try:
            async with asyncio.timeout(max(0.0, by - now)):
                return await what
        except TimeoutError:
            raise _TransientError(f"{where} took longer than {allowed_s:g} s {name}") from None
        except httpx2.ConnectTimeout:
            self.cost_usd = 0.0
            raise _TransientError(f"{where} took longer than {c.connect_timeout_s:g} s to connect") from None
        except httpx2.HTTPError as error:
            if isinstance(error, httpx2.ConnectError):
                self.cost_usd = 0.0
            raise _TransientError(f"{where} cannot be reached: {type(error).__name__} {error}".rstrip()) from error


def _read_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable}, which api_key_var names, holds no key")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {variable} holds characters that no key has")
    return key
