"""Which trace a call upstream belongs to (W3C Trace Context), for whoever sends it.

Left out on purpose: spans, which `serve.tracing` makes, and a client's baggage and tracestate, which never go upstream.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

TRACE: ContextVar[Mapping[str, str]] = ContextVar("selfroute_trace", default={})  # noqa: B039 (nobody writes to it)
"""The header `traceparent` of the call that a task makes; empty where nothing is traced."""


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's environment variables ask for traces.

    >>> wanted({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}), wanted({})
    (True, False)
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    places = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return exporter == "otlp" or (not exporter and any(environ.get(name) for name in places))
