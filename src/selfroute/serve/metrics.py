"""What Prometheus is told: counts and times of this gateway's requests, and its budget as the store has it.

Labels are words of ours (policies, routes, limits, statuses, codes of refusals) and ids of keys; nothing that a client
or a model writes becomes one. Several workers count together: each writes what it counts into the folder that the
environment names when this is imported (`workers` makes it, for prometheus_client), and whichever is asked sums up. The
budget comes from the store and is the same whoever is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from selfroute.serve.account import Scope
from selfroute.serve.budget import Usage
from selfroute.serve.handoff import Recorder
from selfroute.serve.history import RequestRecord
from selfroute.serve.refusal import RefusedError
from selfroute.types import CloudClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper edges of the latencies' buckets."""


class Metrics:
    """The metrics of one process. Counting takes no lock that anything waits for, and never fails a request."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"selfroute_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"selfroute_{name}_seconds", text, labels, registry=registry, buckets=SECONDS)

        # Finding a label's counter takes longer than counting, and there are few of them.
        self._requests = cache(
            counter(
                "requests", "Requests that were answered or failed, by who answered.", "policy", "route", "status"
            ).labels
        )
        self._refused = counter("refused", "Requests that were refused before anybody was asked.", "status", "code")
        self._decisions = cache(counter("decisions", "What the device decided.", "decision").labels)
        self._denials = counter("denials", "Calls to the cloud that were denied or failed, by why.", "reason")
        self._cost = counter("cloud_cost_usd", "What the cloud charged, in USD.")
        tokens = counter("tokens", "Tokens read (prompt) and written (completion).", "side", "kind")
        self._tokens = [tokens.labels(side, kind) for side in ("device", "cloud") for kind in ("prompt", "completion")]
        self._device_s = seconds("device", "Time that the device worked on a request.")
        self._cloud_s = seconds("cloud", "Time that the cloud worked on a request.")
        self._first_s = seconds("first_token", "Time to the first piece of an answer, reasoning included.")
        self._request_s = cache(seconds("request", "Time of a whole request.", "route").labels)
        self.dropped = counter("records_dropped", "Request records that the store never got.")
        self.in_flight = Gauge(
            "selfroute_requests_in_flight",
            "Requests under way.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._resting = Gauge(
            "selfroute_cloud_resting",
            "1 where the cloud has failed so often that it is left alone for a while (the circuit breaker is open).",
            registry=registry,
            multiprocess_mode="livemax",
        )

    def observe(self, record: RequestRecord) -> None:
        """Count a request that is over."""
        route = record.route or "none"
        self._requests(record.policy, route, str(record.status)).inc()
        if record.decision:
            self._decisions(record.decision).inc()
        if record.denied:
            self._denials.labels(record.denied).inc()
        self._cost.inc(record.cost_usd)
        device = record.device_prompt_tokens, record.device_completion_tokens
        cloud = record.cloud_prompt_tokens, record.cloud_completion_tokens
        for counter, tokens in zip(self._tokens, (*device, *cloud), strict=True):
            # An upstream may say anything of its tokens.
            if tokens > 0:
                counter.inc(tokens)
        for histogram, ms in (
            (self._device_s, record.device_ms),
            (self._cloud_s, record.cloud_ms),
            (self._first_s, record.first_ms),
            (self._request_s(route), record.total_ms),
        ):
            if ms is not None:
                histogram.observe(ms / 1e3)

    def refuse(self, refusal: RefusedError) -> None:
        """Count a request that was refused before anybody was asked."""
        self._refused.labels(str(refusal.status), refusal.code).inc()

    def watch(self, cloud: CloudClient) -> None:
        """Note whether the cloud is left alone."""
        self._resting.set(resting(cloud))

    def page(self, usage: Iterable[tuple[Scope, Usage]] = ()) -> bytes:
        """The metrics in Prometheus's text form."""
        told = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            told = CollectorRegistry()
            MultiProcessCollector(told)  # type: ignore[no-untyped-call]
        budget = CollectorRegistry()
        budget.register(_Budget(list(usage)))
        return generate_latest(told) + generate_latest(budget)


def resting(cloud: CloudClient) -> bool:
    """Whether a cloud is left alone for a while; one that has no circuit breaker never is."""
    return bool(getattr(cloud, "resting", False))


class Counted:
    """A recorder that counts what it passes on; implements `handoff.Recorder`."""

    def __init__(self, recorder: Recorder, metrics: Metrics, cloud: CloudClient) -> None:
        self._recorder, self._metrics, self._cloud = recorder, metrics, cloud

    def record(self, record: RequestRecord) -> None:
        self._metrics.observe(record)
        self._metrics.watch(self._cloud)
        self._recorder.record(record)


class _Budget:
    """What scopes have used of their limits, as gauges; implements prometheus_client's `Collector`."""

    def __init__(self, usage: Sequence[tuple[Scope, Usage]]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        used = GaugeMetricFamily(
            "selfroute_budget_used", "What is used of a limit: a share, USD, or a count.", labels=("scope", "limit")
        )
        limits = GaugeMetricFamily(
            "selfroute_budget_limit", "The limit, where there is one.", labels=("scope", "limit")
        )
        for scope, usage in self._usage:
            for name, (value, limit) in usage.meters(scope.limits).items():
                used.add_metric((scope.name, name), value)
                if limit is not None:
                    limits.add_metric((scope.name, name), limit)
        yield used
        yield limits
