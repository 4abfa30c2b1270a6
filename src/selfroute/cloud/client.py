"""The cloud over HTTP: any OpenAI-compatible endpoint (DeepSeek, OpenAI, OpenRouter, vLLM, llama.cpp).

One transport for `complete` and `stream`: what is retried, how long is waited, and what may be spent are the same for
training, evaluation and serving. Left out on purpose: the cache and the ledger, which `cloud.memory` keeps.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from selfroute.cloud.breaker import Breaker
from selfroute.cloud.endpoint import OpenAIConfig, read_key
from selfroute.cloud.exchange import Exchange, Line, TransientError, UnreadableError
from selfroute.cloud.prices import price_of
from selfroute.cloud.spending import LimitError, Spending
from selfroute.cloud.thinking import Thinking
from selfroute.cloud.transport import Transport
from selfroute.cloud.wire import Collected, Event, Reply, Usage, chunks_of
from selfroute.errors import CloudError
from selfroute.protocol import text_of
from selfroute.types import Bill, CloudAnswer, CloudChunk, CloudRequest

T = TypeVar("T")

MAX_PART_TOKENS = 50_000
"""Most tokens of an image that stands in the request by its address: gpt-4o-mini takes 2,833 and 5,667 more for each of
up to eight tiles."""

_LIMITS = ("max_tokens", "max_completion_tokens")
_TIMES = {"connect_timeout_s", "first_byte_timeout_s", "whole_timeout_s", "idle_timeout_s", "total_timeout_s"}
_CUT = frozenset({"length", "max_tokens", "model_length", "content_filter", "tool_calls", "function_call"})
"""Reasons to finish of an answer that is not whole; those of a whole one are `stop`, `eos` and what providers like."""
_PRICES = {"usd_per_million_prompt_tokens", "usd_per_million_completion_tokens"}


class OpenAICloud:
    """The provider; implements `types.CloudClient`."""

    Config = OpenAIConfig
    FREE = frozenset(
        {
            "api_key_var",
            "concurrency",
            "max_retries",
            "backoff_s",
            "breaker_failures",
            "breaker_cooldown_s",
            "breaker_waits",
            # No conversation of training or evaluation holds any.
            "send_reasoning",
        }
        | {"spend_limit_usd", *_TIMES, *_PRICES}
    )
    """Settings that change no answer: they are no part of the cache's key, and a run may go on with others."""

    def __init__(self, config: OpenAIConfig) -> None:
        self.config = config
        self._price = price_of(
            config.model, config.usd_per_million_prompt_tokens, config.usd_per_million_completion_tokens
        )
        key = read_key(config.api_key_var)
        http = Transport(key, config.connect_timeout_s, keep=True, trust_env=True)
        self._line = Line(config, key, http, Spending(config.spend_limit_usd))
        self._gate = asyncio.Semaphore(config.concurrency)
        patience = config.max_retries + 1 if config.breaker_waits else 0
        self._breaker = Breaker(config.breaker_failures, config.breaker_cooldown_s, patience)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"provider": "openai", **self.config.model_dump(exclude=set(self.FREE))}

    @property
    def concurrency(self) -> int:
        return self.config.concurrency

    def carry(self, spent_usd: float) -> None:
        self._line.spending.carry(spent_usd)

    def abandoned_usd(self) -> float:
        return self._line.spending.abandoned_usd()

    @property
    def resting(self) -> bool:
        """Whether it has failed so often that it is left alone for a while."""
        return self._breaker.open

    async def aclose(self) -> None:
        await self._line.http.aclose()

    async def complete(self, request: CloudRequest) -> CloudAnswer:
        """The whole answer.

        Raises:
            CloudError: it could not be had, after the retries that make sense; the message says why, and never holds
                the key.
        """

        async with self._gate:
            _, answer = await self._retrying(lambda: self._whole(request, self.worst_usd(request)))
            return answer

    async def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        """The answer as it comes. What fails before the first piece is tried again; after it nothing is.

        Under a `bill`, that is as long as one more attempt cannot pass its limit. Of a `whole` answer, the first piece
        is all there is, and a provider that need not stream is quicker about it.

        Raises:
            CloudError: as from `complete`, or the connection broke in mid-answer.
        """
        async with self._gate:
            started = time.monotonic()
            worst_usd = bill.worst_usd if bill else self.worst_usd(request)

            def affordable() -> bool:
                return bill is None or bill.usd + worst_usd <= bill.limit_usd

            if whole:
                reply, answer = await self._retrying(lambda: self._whole(request, worst_usd, bill), affordable)
                for chunk in chunks_of(reply):
                    yield chunk
                yield CloudChunk(final=answer, finish_reason=reply.choices[0].finish_reason or "")
                return
            exchange, first = await self._retrying(lambda: self._begin(request, worst_usd, bill), affordable)
            try:
                collected = Collected()
                events: list[Event] | None = first
                while events is not None:
                    for chunk in collected.add(events):
                        yield chunk
                    events = await anext(exchange.events, None)
                for chunk in collected.rest():
                    yield chunk
                reply = collected.reply()
                answer = self._answer(reply, request, time.monotonic() - started)
                exchange.bill(answer.cost_usd)
            except TransientError as error:
                raise CloudError(f"{error}, in the middle of an answer") from error
            finally:
                await exchange.close()
            yield CloudChunk(final=answer, finish_reason=reply.choices[0].finish_reason or "")

    async def _whole(
        self, request: CloudRequest, worst_usd: float, bill: Bill | None = None
    ) -> tuple[Reply, CloudAnswer]:
        """An answer in one, as it came and read."""
        started = time.monotonic()
        async with Exchange(self._line, self._body(request, stream=False), worst_usd, bill) as exchange:
            reply = await exchange.whole()
            answer = self._answer(reply, request, time.monotonic() - started)
            exchange.bill(answer.cost_usd)
            return reply, answer

    async def _begin(self, request: CloudRequest, worst_usd: float, bill: Bill | None) -> tuple[Exchange, list[Event]]:
        """An open stream, and its first events."""
        exchange = Exchange(self._line, self._body(request, stream=True), worst_usd, bill)
        try:
            await exchange.open()
            first = await anext(exchange.events, None)
            if first is None:
                raise TransientError(f"{self.config.where} sent an empty stream")
            return exchange, first
        except BaseException:
            await exchange.close()
            raise

    def _body(self, request: CloudRequest, *, stream: bool) -> dict[str, Any]:
        c = self.config
        ours = {"model", "messages", "stream", "stream_options", *_LIMITS}
        body = {name: value for name, value in request.extra.items() if name not in ours}
        unsent = () if c.send_reasoning else ("reasoning_content",)
        messages = [{name: value for name, value in m.items() if name not in unsent} for m in request.messages]
        body |= {"model": c.model, "messages": messages}
        body[c.max_tokens_field] = self._max_tokens(request)
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if not c.send_temperature:
            body.pop("temperature", None)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body | c.extra

    def _max_tokens(self, request: CloudRequest) -> int:
        asked = [limit for name in _LIMITS if isinstance(limit := request.extra.get(name), int)]
        return min([self.config.max_tokens or request.max_tokens, *asked])

    def worst_usd(self, request: CloudRequest) -> float:
        """The most that an attempt may cost: no token is shorter than a byte of the request, and a part of a message
        that is no text has at most so many more."""
        sent = [*map(dict, request.messages), *([request.extra] if request.extra else [])]
        parts = [part for m in request.messages if isinstance(m.get("content"), list) for part in m["content"]]
        others = sum(part.get("type") != "text" for part in parts)
        prompt = sum(len(json.dumps(fields)) for fields in sent) + others * MAX_PART_TOKENS
        return self._price.of(prompt, self._max_tokens(request))

    def _answer(self, reply: Reply, request: CloudRequest, latency_s: float) -> CloudAnswer:
        if not reply.choices or reply.choices[0].message is None:
            raise UnreadableError("the cloud answered without a choice")
        choice = reply.choices[0]
        message = choice.message
        assert message is not None
        if choice.finish_reason in (None, "error", "insufficient_system_resource"):
            raise UnreadableError(f"the cloud's answer breaks off (its finish_reason is {choice.finish_reason})")
        split = Thinking()
        parts = [split.feed(message.content or ""), split.end()]
        reasoning = (message.thoughts + "".join(r for r, _ in parts)).strip()
        text = "".join(a for _, a in parts)
        finished = choice.finish_reason.lower() not in _CUT
        if not (text or reasoning or message.more) and finished:
            raise UnreadableError("the cloud's answer is empty")
        usage = reply.usage or Usage()
        # Where a server does not tell: about four characters make a token.
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        if prompt_tokens is None:
            prompt_tokens = sum(len(text_of(m.get("content"))) for m in request.messages) // 4 + 1
        if completion_tokens is None:
            completion_tokens = (len(text) + len(reasoning)) // 4 + 1
        return CloudAnswer(
            text=text,
            reasoning=reasoning,
            finished=finished,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_usd=self._price.of(prompt_tokens, completion_tokens, usage.cached_tokens),
            latency_s=latency_s,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
        )

    async def _retrying(self, attempt: Callable[[], Awaitable[T]], affordable: Callable[[], bool] = lambda: True) -> T:
        """An attempt's result, after as many attempts as its failures are worth, and can be paid."""
        c = self.config
        unreadable, since = 0, self._breaker.failed_tries
        for number in range(c.max_retries + 1):
            try:
                return await self._guarded(attempt, since)
            except TransientError as error:
                unreadable += isinstance(error, UnreadableError)
                # What cannot be read was paid for, and is likely to come the same again.
                if number == c.max_retries or unreadable > 1 or not affordable():
                    attempts = f"{number + 1} attempt{'s' if number else ''}"
                    raise CloudError(
                        f"{error} ({attempts})", status=error.status, retry_after_s=error.retry_after_s
                    ) from error
                # Random, so that those who wait for the same moment do not all come at once.
                pause_s = min(30.0, c.backoff_s * 2**number) if error.retry_after_s is None else error.retry_after_s
                await asyncio.sleep(pause_s + random.uniform(0, c.backoff_s))
        raise AssertionError

    async def _guarded(self, attempt: Callable[[], Awaitable[T]], since: int) -> T:
        try:
            async with self._breaker.attempt(since) as seen:
                try:
                    result = await attempt()
                except TransientError as error:
                    seen.outcome, seen.cause = "down" if error.down else "up", str(error)
                    raise
                except LimitError:
                    raise
                except CloudError:
                    # It answered, if only to refuse.
                    seen.outcome = "up"
                    raise
                seen.outcome = "up"
                return result
        except TimeoutError:
            raise CloudError(f"{self._breaker.cause} (it stays down: no request got an answer for a while)") from None
