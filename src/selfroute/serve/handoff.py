"""The story of one request: the device begins, and the cloud goes on where the device asks for it.

    device  ->  an answer                                   device
            ->  a help call, or no decision  ->  budget     cloud
                                             ->  denied, or the cloud fails before its answer begins: the device goes
                                                 on from the same prefix, and may not ask
            ->  fails                        ->  budget     cloud

What the client may see is told as it comes, and money that was held back is settled once, whatever happens: an
answer, a failure, or a client that goes away, which is the cancelling of the task. Left out on purpose: HTTP, and which
engine, cloud or store it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from selfroute.errors import CloudError, ContextError, DeviceError, RejectedError, StoreError
from selfroute.protocol import handed_over, offered, reasoning_of, without_reasoning
from selfroute.serve.account import Denied, Scope
from selfroute.serve.asking import Ask
from selfroute.serve.border import Border, Crossing, HeldBackError
from selfroute.serve.events import DECISIONS, Content, Course, Done, Event, Other, Reasoning, Tell, Turn
from selfroute.serve.history import CLIENT_GONE, RequestRecord
from selfroute.serve.recorder import record_of
from selfroute.serve.refusal import RefusedError, cloud_failed, device_unavailable
from selfroute.serve.stream import Ending, Reader, resumed, without_tags
from selfroute.types import (
    Answer,
    Bill,
    CloudChunk,
    CloudClient,
    CloudRequest,
    DeviceChunk,
    DeviceEngine,
    DeviceRequest,
)

ATTEMPTS = 2
"""Calls whose worst case is held back: one that breaks off may have been charged, and is made once more."""

_log = logging.getLogger(__name__)


class Budget(Protocol):
    """Who may call the cloud; see `budget.Budget`."""

    async def reserve(self, worst_usd: float, key: Scope | None = None) -> Any | Denied:
        """Hold back the most that a call may cost; a task that is cancelled here has reserved nothing."""
        ...

    def settle_later(self, reservation: Any, cost_usd: float | None) -> None:
        """Put the cost in the place of the worst case, soon; None: give back what was held, no call was made."""
        ...


class Recorder(Protocol):
    """Where records go; see `recorder.Recorder`."""

    def record(self, record: RequestRecord) -> None:
        """Take a record; never waits, never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Pair:
    """The device and the cloud, and what every request of theirs has in common.

    Args:
        max_tokens: limit of a device response, and a client's where it gives none.
        decide: how the device decides, see `types.DeviceRequest`.
        idle_s: seconds that the device may take for its next piece, the first one too.
        log_content: whether records hold what was asked and answered.
        border: the way to the cloud.
    """

    device: DeviceEngine
    cloud: CloudClient
    budget: Budget
    recorder: Recorder
    max_tokens: int = 1024
    decide: Literal["sample", "threshold"] = "sample"
    idle_s: float = 60.0
    log_content: bool = False
    border: Border = field(default_factory=Border)


async def answer(ask: Ask, pair: Pair, tell: Tell, course: Course | None = None) -> None:
    """Answer one request, telling what comes of it, `Done` at the end; then record it.

    Cancelling the task stops the device or the cloud, settles, and records that the client is gone, unless the course
    has another cause.

    Raises:
        RefusedError: there is no answer, or no more of it.
    """
    course = course or Course()
    try:
        await _Story(ask, pair, tell, course).run()
    except RefusedError as refusal:
        course.status, course.error = refusal.status, refusal.code
        raise
    except asyncio.CancelledError:
        if not course.error:
            course.status, course.error = CLIENT_GONE, "client_gone"
        raise
    except Exception as error:
        course.status, course.error = 500, "internal_error"
        _log.exception("request %s failed", ask.id)
        raise RefusedError(500, f"selfroute failed; its log knows more of {ask.id}", code="internal_error") from error
    finally:
        course.total_ms = course.ms()
        pair.recorder.record(record_of(ask, course, content=pair.log_content))


@dataclass(frozen=True, slots=True)
class _Denial:
    """Why the cloud may not be asked: a limit, `store` where the budget cannot be read, or the border's reason."""

    limit: str
    retry_after_s: float | None = None
    held_back: HeldBackError | None = None


class _Story:
    def __init__(self, ask: Ask, pair: Pair, tell: Tell, course: Course) -> None:
        self.ask, self.pair, self._tell, self.course = ask, pair, tell, course
        # Whether some of the answer was told, and whose reasoning was last.
        self._answering = False
        self._reasoned = ""

    async def run(self) -> None:
        ask = self.ask
        if ask.policy == "cloud-only" or ask.beyond:
            return await self._without_device(ask.beyond)
        try:
            ending, finished = await self._device("", forbid_help=ask.policy == "device-only")
        except RejectedError as error:
            _log.warning("request %s: the device does not take it: %s", ask.id, error)
            if isinstance(error, ContextError):
                return await self._without_device("messages", str(error), "context_length_exceeded")
            return await self._without_device("this request", str(error), "device_refuses")
        except DeviceError as error:
            _log.warning("request %s: %s", ask.id, error)
            return await self._without_device("", str(error))
        self.course.decision = decision = DECISIONS[type(ending.decision)]
        stays = decision == "answer" or (decision == "undecided" and ask.undecided == "device")
        if stays or ask.policy == "device-only":
            return await self._conclude(ending, finished)
        self.course.denied = await self._hand_over(ending, decision)
        if not self.course.denied:
            return None
        await self._say(Turn("device", self.course.denied))
        if decision == "help":
            ending, finished = await self._without_help(ending)
        return await self._conclude(ending, finished)

    async def _without_device(self, beyond: str, why: str = "", code: str = "unsupported_value") -> None:
        """The cloud alone: as asked, or because the device cannot (`beyond` names the field), or failed (`why`)."""
        ask = self.ask
        # An engine that refuses does not say in one way which field it minds.
        param = None if code == "device_refuses" else beyond
        if ask.policy == "device-only":
            if beyond:
                message = why or f"the device cannot serve {beyond}, and this request may not leave it"
                raise RefusedError(400, message, code=code, param=param)
            raise device_unavailable()
        if why:
            await self._say(Turn("cloud", "beyond" if beyond else "device"))
        try:
            denied = await self._cloud(ask.messages)
        except CloudError as error:
            _log.warning("request %s: %s", ask.id, error)
            raise cloud_failed(error) from error
        if denied is None:
            return
        self.course.denied = denied.limit
        if denied.held_back and (beyond or ask.policy == "cloud-only"):
            raise denied.held_back
        if denied.limit == "store":
            raise RefusedError(503, "the budget cannot be asked now", code="store_unavailable", retry_after_s=5)
        message = f"the budget of cloud calls is used up ({denied.limit})"
        if ask.policy == "cloud-only":
            raise RefusedError(429, message, code="budget_exceeded", retry_after_s=denied.retry_after_s)
        if beyond:
            message = f"{why or f'the device cannot serve {beyond}'}, and {message}"
            raise RefusedError(400, message, code="budget_exceeded", param=param)
        raise device_unavailable()

    async def _hand_over(self, ending: Ending, why: str) -> str:
        """Let the cloud answer; what kept it from that, or ""."""
        if ending.passed_over:
            await self._reason("device", ending.passed_over)
        await self._say(Turn("cloud", why))
        reasoning = reasoning_of(ending.text) if self.ask.handoff == "reasoning" else ""
        try:
            denied = await self._cloud(handed_over(self.ask.messages, reasoning))
        except CloudError as error:
            _log.warning("request %s goes on on the device: %s", self.ask.id, error)
            self.course.route = ""
            return "cloud"
        return denied.limit if denied else ""

    async def _without_help(self, ending: Ending) -> tuple[Ending, bool]:
        """The same response, going on where it asked for help."""
        try:
            return await self._device(ending.prefix, forbid_help=True)
        except DeviceError as error:
            _log.warning("request %s: %s", self.ask.id, error)
            raise device_unavailable() from error

    async def _conclude(self, ending: Ending, finished: bool) -> None:
        """The device's answer, or what it has in place of one."""
        self.course.route = "device" if isinstance(ending.decision, Answer) else "undecided"
        content = ending.content or without_tags(ending.text).strip()
        cuts = [at for stop in self.ask.stop if (at := content.find(stop)) >= 0]
        if content := content[: min(cuts, default=len(content))]:
            await self._content(content)
        await self._done("stop" if finished or cuts else "length")

    async def _device(self, prefix: str, *, forbid_help: bool) -> tuple[Ending, bool]:
        """One response of the device, told while it comes; and whether it ended by itself.

        Raises:
            DeviceError: there is none, or no more of it.
        """
        ask, pair, course = self.ask, self.pair, self.course
        limit = min(ask.max_tokens or pair.max_tokens, pair.max_tokens) - course.device_completion_tokens
        request = DeviceRequest(
            messages=offered(ask.messages),
            max_tokens=max(1, limit),
            temperature=1.0 if ask.temperature is None else ask.temperature,
            # Going on is not drawing the same numbers again.
            seed=ask.seed or ask.id,
            decide=pair.decide,
            bias=ask.bias,
            prefix=prefix,
            forbid_help=forbid_help,
            extra=ask.device_fields,
        )
        reader = resumed(prefix) if prefix else Reader()
        began = time.monotonic()
        finish = ""
        try:
            async with aclosing(_pieces(pair.device.stream(request), pair.idle_s)) as chunks:
                async for chunk in chunks:
                    if shown := reader.feed(chunk.text, chunk.reasoning):
                        await self._reason("device", shown)
                    if chunk.finish:
                        finish = chunk.finish
                        course.score = chunk.score if course.score is None else course.score
                        course.device_prompt_tokens += chunk.prompt_tokens
                        course.device_completion_tokens += chunk.completion_tokens
                    if finish or reader.called:
                        break
        finally:
            course.device_ms = (course.device_ms or 0.0) + course.ms(began)
        if not finish and not reader.called:
            raise DeviceError("the device broke off in the middle of its response")
        ending = reader.end(finished=finish != "length")
        if ending.reasoning:
            await self._reason("device", ending.reasoning)
        return ending, finish != "length"

    async def _cloud(self, messages: tuple[Mapping[str, Any], ...]) -> _Denial | None:
        """The cloud's answer, told as it comes, unless the budget denies it.

        Raises:
            CloudError: there is no answer.
            RefusedError: there is no more of it.
        """
        ask, pair, course = self.ask, self.pair, self.course
        if ask.handoff != "reasoning":
            messages = without_reasoning(messages)
        try:
            crossing = await pair.border.cross(ask, CloudRequest(messages, temperature=None, extra=ask.fields))
        except HeldBackError as error:
            course.rule = error.rule
            return _Denial(error.reason, held_back=error)
        bill = Bill(pair.cloud.worst_usd(crossing.request), ATTEMPTS)
        try:
            held = await pair.budget.reserve(bill.limit_usd, ask.key)
        except StoreError as error:
            _log.error("request %s: the budget cannot be asked: %s", ask.id, error)
            return _Denial("store", 5.0)
        if isinstance(held, Denied):
            return _Denial(held.limit, held.retry_after_s)
        course.redacted = crossing.counts
        began = time.monotonic()
        try:
            finish_reason = await self._relay(crossing, bill)
        except CloudError as error:
            if not self._answering:
                raise
            _log.warning("request %s: %s", ask.id, error)
            raise RefusedError(502, "the cloud's answer broke off", code="cloud_broke_off") from error
        finally:
            course.cloud_ms = course.ms(began)
            course.cost_usd += bill.usd
            # A client of the user's own may tell the cost alone.
            called = bill.called or bill.usd > 0 or self._answering
            pair.budget.settle_later(held, bill.usd if called else None)
        await self._done(finish_reason)
        return None

    async def _relay(self, crossing: Crossing, bill: Bill) -> str:
        """Tell the cloud's answer; its finish_reason."""
        course = self.course
        course.route = "cloud"
        finish_reason = "stop"
        chunks = self.pair.cloud.stream(crossing.request, bill, whole=self.ask.whole)
        async with aclosing(chunks):
            async for chunk in chunks:
                for piece in crossing.restoring.feed(chunk) if crossing.restoring else (chunk,):
                    await self._pass_on(piece)
                if chunk.final:
                    finish_reason = chunk.finish_reason
                    course.cloud_prompt_tokens = chunk.final.prompt_tokens
                    course.cloud_completion_tokens = chunk.final.completion_tokens
                    course.cached_tokens = chunk.final.cached_tokens
                    course.reasoning_tokens = chunk.final.reasoning_tokens
        return finish_reason

    async def _pass_on(self, chunk: CloudChunk) -> None:
        """Tell a piece of the cloud's answer."""
        if chunk.reasoning:
            await self._reason("cloud", chunk.reasoning)
        if chunk.text:
            await self._content(chunk.text)
        if chunk.other:
            self._answering = True
            await self._say(Other(chunk.other))

    async def _reason(self, who: str, text: str) -> None:
        if self._reasoned not in ("", who):
            text = f"\n\n{text}"
        self._reasoned = who
        await self._say(Reasoning(text))

    async def _content(self, text: str) -> None:
        self._answering = True
        if self.pair.log_content:
            self.course.said.append(text)
        await self._say(Content(text))

    async def _done(self, finish_reason: str) -> None:
        self.course.total_ms = self.course.ms()
        await self._say(Done(finish_reason, self.course))

    async def _say(self, event: Event) -> None:
        if self.course.first_ms is None and not isinstance(event, Turn):
            self.course.first_ms = self.course.ms()
        await self._tell(event)


async def _pieces(stream: AsyncGenerator[DeviceChunk], idle_s: float) -> AsyncGenerator[DeviceChunk]:
    """A device's chunks, each waited for no longer than that."""
    async with aclosing(stream) as chunks:
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeviceError(f"the device wrote nothing for {idle_s:g} s") from None
            yield chunk
