"""OpenTelemetry traces: a span a request, and below it one for each call of the device and of the cloud.

They are put around the application, the device, the cloud and the recorder, none of which knows of them; where traces
are off, nothing is put anywhere. Attributes are those of the HTTP and GenAI semantic conventions (1.44, where GenAI is
still "Development"), and `selfroute.*`: numbers and names, never content, keys, or an error's words.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfroute.config import Choice
from selfroute.serve.handoff import Recorder
from selfroute.serve.history import RequestRecord
from selfroute.trace import TRACE
from selfroute.types import (
    Bill,
    CloudChunk,
    CloudClient,
    CloudRequest,
    DeviceChunk,
    DeviceEngine,
    DeviceRequest,
)

Attributes = dict[str, AttributeValue]

T = TypeVar("T")

_W3C = TraceContextTextMapPropagator()

_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/models")

_OF_THE_RECORD = ("id", "model", "policy", "route", "score", "denied", "error", "cost_usd", "device_ms", "cloud_ms")


def exporting() -> TracerProvider:
    """Spans go by OTLP over HTTP, in batches and from a thread of their own, to where the OTEL_* variables say."""
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "selfroute"}
    provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """What is put around a gateway's parts so that `provider` gets its spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("selfroute")

    async def aclose(self) -> None:
        """Send what is left; a collector that does not answer is waited for as long as OTEL_EXPORTER_OTLP_TIMEOUT."""
        await asyncio.to_thread(self._provider.shutdown)

    def app(self, app: ASGIApp) -> ASGIApp:
        """The application, each request of the API a span below the client's own, if its `traceparent` names one."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] not in _PATHS:
                await app(scope, receive, send)
                return
            # Neither baggage nor tracestate is read: they hold the client's own words, which no border would have seen.
            parent = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
            method, path = str(scope["method"]), str(scope["path"])
            span = self._tracer.start_span(
                f"{method} {path}",
                context=_W3C.extract({"traceparent": parent}),
                kind=SpanKind.SERVER,
                attributes={"http.request.method": method, "http.route": path, "url.path": path},
            )

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = int(message["status"])
                    span.set_attribute("http.response.status_code", status)
                    if status >= 500:
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            token = attach(set_span_in_context(span))
            try:
                await app(scope, receive, sending)
            finally:
                detach(token)
                span.end()

        return traced

    def recorder(self, recorder: Recorder) -> Recorder:
        """The recorder; what it is told of a request becomes attributes of its span, too."""
        return _TracedRecorder(recorder)

    def device(self, device: DeviceEngine, choice: Choice) -> DeviceEngine:
        """The device, each of its responses a span."""
        return cast(DeviceEngine, _TracedDevice(device, _Calls(self._tracer.start_span, "device", choice)))

    def cloud(self, cloud: CloudClient, choice: Choice) -> CloudClient:
        """The cloud, each call of it a span."""
        return cast(CloudClient, _TracedCloud(cloud, _Calls(self._tracer.start_span, "cloud", choice)))


class _TracedRecorder:
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def record(self, record: RequestRecord) -> None:
        span = get_current_span()
        for name in _OF_THE_RECORD:
            if (value := getattr(record, name)) not in ("", None):
                span.set_attribute("selfroute.request_id" if name == "id" else f"selfroute.{name}", value)
        if record.error and record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        self._recorder.record(record)


class _Calls:
    """Spans of the calls of one upstream."""

    def __init__(self, start: Callable[..., Span], part: str, choice: Choice) -> None:
        model = str(choice.settings.get("model") or choice.name)
        url = urlsplit(str(choice.settings.get("base_url") or ""))
        self._start, self._name = start, f"chat {model}"
        self._kind = SpanKind.CLIENT if url.hostname else SpanKind.INTERNAL
        self._attributes: Attributes = {
            "selfroute.part": part,
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": choice.name,
            "gen_ai.request.model": model,
        }
        if url.hostname:
            self._attributes["server.address"] = url.hostname
            self._attributes["server.port"] = url.port or (443 if url.scheme == "https" else 80)

    async def follow(
        self, chunks: AsyncGenerator[T], asked: Mapping[str, Any], end: Callable[[T], Attributes]
    ) -> AsyncGenerator[T]:
        """The same chunks, inside a span; `end` has what the last one says of the call.

        Of an answer that is asked for whole there is no first chunk to speak of.
        """
        began, first = time.monotonic(), True
        with self._span(asked) as span:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if first and asked["stream"]:
                        span.set_attribute("gen_ai.response.time_to_first_chunk", time.monotonic() - began)
                        first = False
                    span.set_attributes(end(chunk))
                    yield chunk

    @contextmanager
    def _span(self, asked: Mapping[str, Any]) -> Iterator[Span]:
        given = {f"gen_ai.request.{name}": value for name, value in asked.items() if isinstance(value, (int, float))}
        span = self._start(self._name, kind=self._kind, attributes={**self._attributes, **given})
        headers: dict[str, str] = {}
        _W3C.inject(headers, set_span_in_context(span))
        before = TRACE.get()
        TRACE.set(headers)
        try:
            yield span
        except (GeneratorExit, asyncio.CancelledError):
            span.set_attribute("selfroute.stopped", True)
            raise
        except Exception as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            TRACE.set(before)
            span.end()


class _TracedDevice:
    def __init__(self, device: DeviceEngine, calls: _Calls) -> None:
        self._device, self._calls = device, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def stream(self, request: DeviceRequest) -> AsyncGenerator[DeviceChunk]:
        asked = {"stream": True, "max_tokens": request.max_tokens, "temperature": request.temperature}
        return self._calls.follow(self._device.stream(request), asked, _device_end)


class _TracedCloud:
    def __init__(self, cloud: CloudClient, calls: _Calls) -> None:
        self._cloud, self._calls = cloud, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cloud, name)

    def stream(
        self, request: CloudRequest, bill: Bill | None = None, *, whole: bool = False
    ) -> AsyncGenerator[CloudChunk]:
        asked = {name: request.extra.get(name) for name in ("max_tokens", "temperature", "top_p")}
        asked["stream"] = not whole
        return self._calls.follow(self._cloud.stream(request, bill, whole=whole), asked, _cloud_end)


def _device_end(chunk: DeviceChunk) -> Attributes:
    if not chunk.finish:
        return {}
    score: Attributes = {} if chunk.score is None else {"selfroute.score": chunk.score}
    return _usage(chunk.finish, chunk.prompt_tokens, chunk.completion_tokens) | score


def _cloud_end(chunk: CloudChunk) -> Attributes:
    if chunk.final is None:
        return {}
    usage = _usage(chunk.finish_reason, chunk.final.prompt_tokens, chunk.final.completion_tokens)
    return usage | {"selfroute.cost_usd": chunk.final.cost_usd}


def _usage(finish_reason: str, prompt_tokens: int, completion_tokens: int) -> Attributes:
    return {
        "gen_ai.response.finish_reasons": (finish_reason,),
        "gen_ai.usage.input_tokens": prompt_tokens,
        "gen_ai.usage.output_tokens": completion_tokens,
    }
