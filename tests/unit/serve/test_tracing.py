"""Traces, as a real OTLP collector on loopback gets them from a whole gateway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tests.servers import Exchange, Fault, Server, event
from tests.serving import said

from selfroute.config import Choice
from selfroute.device.wire import Patience, Wire
from selfroute.serve.account import Limits
from selfroute.serve.app import make_app
from selfroute.serve.config import GatewayConfig
from selfroute.serve.server import opened
from selfroute.trace import TRACE

TRACE_ID, CLIENTS_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CANARY = "canary"


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """The URL of one, and what it got."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    return [value(v) for v in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)


def spans(got: Sequence[ExportTraceServiceRequest]) -> list[tuple[Any, dict[str, Any]]]:
    """Each with its attributes, in the order in which they began."""
    found = [s for request in got for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
    return [
        (s, {a.key: value(a.value) for a in s.attributes}) for s in sorted(found, key=lambda s: s.start_time_unix_nano)
    ]


async def answers(exchange: Exchange) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    await exchange.answer(event(f"four {CANARY}", "stop"), usage)


async def fails(exchange: Exchange) -> None:
    await exchange.status(400, {"error": {"message": f"no, {CANARY}"}})


def ask(tmp_path: Path, fault: Fault, **body: Any) -> tuple[httpx2.Response, Server]:
    """A traced client's request to a whole gateway, whose device asks the cloud."""
    server = Server(otherwise=fault)
    with server:
        settings = {"base_url": server.url, "model": "gpt-4.1", "api_key_var": "TEST_CLOUD_KEY", "max_retries": 0}
        config = GatewayConfig(
            device=Choice(name="tests.serving:NamedDevice", asks=True),
            cloud=Choice(name="openai", **settings),
            budget=Limits(calls_per_minute=9),
            store=str(tmp_path / "gateway.sqlite"),
        )

        async def main() -> httpx2.Response:
            async with opened(config) as gateway:
                http = httpx2.ASGITransport(app=make_app(gateway))
                async with httpx2.AsyncClient(transport=http, base_url="http://localhost") as client:
                    await client.get("/healthz")
                    headers = {
                        "traceparent": f"00-{TRACE_ID}-{CLIENTS_SPAN}-01", "tracestate": f"theirs={CANARY}",
                        "baggage": "user=canary", "authorization": f"Bearer {CANARY}",
                    }  # fmt: skip
                    asked = {"model": "selfroute", "messages": [{"role": "user", "content": CANARY}], **body}
                    return await client.post("/v1/chat/completions", json=asked, headers=headers)

        return asyncio.run(main()), server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CLOUD_KEY", f"sk-{CANARY}")


def test_a_request_is_three_spans_in_the_clients_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        response, server = ask(tmp_path, answers)
        assert response.json()["choices"][0]["message"]["content"] == f"four {CANARY}"
    (request, of_request), (device, of_device), (cloud, of_cloud) = spans(got)
    assert [s.name for s in (request, device, cloud)] == [
        "POST /v1/chat/completions",
        "chat tests.serving:NamedDevice",
        "chat gpt-4.1",
    ]
    assert {s.trace_id.hex() for s in (request, device, cloud)} == {TRACE_ID}
    assert request.parent_span_id.hex() == CLIENTS_SPAN
    assert device.parent_span_id == cloud.parent_span_id == request.span_id
    assert request.end_time_unix_nano >= cloud.end_time_unix_nano > device.start_time_unix_nano
    assert of_request["http.response.status_code"] == 200
    assert of_request["selfroute.route"] == "cloud"
    assert of_request["selfroute.request_id"] == response.headers["x-selfroute-request-id"]
    assert of_request["selfroute.cost_usd"] == pytest.approx(280e-6)
    # The help call stops the device before its last chunk.
    assert of_device["selfroute.part"] == "device"
    assert of_device["selfroute.stopped"] is True
    assert of_cloud["gen_ai.usage.input_tokens"] == 100
    assert of_cloud["gen_ai.usage.output_tokens"] == 10
    assert of_cloud["gen_ai.response.finish_reasons"] == ["stop"]
    assert of_cloud["server.address"] == "127.0.0.1"
    # The provider's own spans would hang below the cloud's.
    assert server.requests[0].headers["traceparent"] == f"00-{TRACE_ID}-{cloud.span_id.hex()}-01"
    # Words of the client's own leave by the border alone.
    assert not {"baggage", "tracestate"} & set(server.requests[0].headers)
    assert not any(CANARY.encode() in request.SerializeToString() for request in got)
    assert {a.key: value(a.value) for a in got[0].resource_spans[0].resource.attributes}["service.name"] == "selfroute"


def test_what_fails_is_marked_without_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{url}/v1/traces")
        assert ask(tmp_path, fails)[0].status_code == 200
    found = spans(got)
    assert [a.get("selfroute.part") for _, a in found] == [None, "device", "cloud", "device"]
    assert [s.status.code for s, _ in found] == [0, 0, 2, 0]
    assert found[2][1]["error.type"] == "CloudError"
    assert found[0][1]["selfroute.denied"] == "cloud"
    assert found[3][1]["selfroute.score"] == 1.5
    assert found[3][1]["gen_ai.usage.output_tokens"] == len(said("2+3=5", "<answer>", "5", "</answer>")) - 1
    assert not any(CANARY.encode() in request.SerializeToString() for request in got)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "URL", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "URL", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=["unasked", "disabled", "none"],
)
def test_nothing_is_traced_unless_the_environment_asks(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, got):
        for name, text in environment.items():
            monkeypatch.setenv(name, text.replace("URL", url))
        _, server = ask(tmp_path, answers)
    assert not got
    assert not {"traceparent", "tracestate"} & set(server.requests[0].headers)


def test_a_collector_that_is_down_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert ask(tmp_path, answers)[0].status_code == 200


def test_an_engine_by_url_is_told_the_trace() -> None:
    async def main() -> None:
        wire = Wire(server.url, "", Patience(5, 5, 5))
        TRACE.set({"traceparent": "00-1-2-01"})
        await wire.get("/models")
        await wire.aclose()

    with Server() as server:
        asyncio.run(main())
    assert server.requests[0].headers["traceparent"] == "00-1-2-01"
