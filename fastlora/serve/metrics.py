"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastlora.serve.adapters import ServedAdapters
from fastlora.serve.engine import Engine


class PrometheusMetrics(Collector):
    """The metrics of a server for Prometheus.

    The metrics of the engine and its adapter pool are collected on every scrape. `count_response`
    counts the responses.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, adapters: ServedAdapters) -> None:
        self._engine, self._adapters = engine, adapters
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "fastlora_http_responses",
            "Responses, by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self._registry.register(self)

    def count_response(self, scope: MutableMapping[str, Any], status: int) -> None:
        """Count a response.

        All paths without a route are counted together.
        """
        route = scope.get("route")
        self._answers.labels(getattr(route, "path", "other"), str(status)).inc()

    def to_prometheus_text(self) -> bytes:
        """Return the metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Collect the current metrics of the server for Prometheus.

        Yields the metrics of the engine and of its adapter pool. The number of responses is not
        included, because a separate collector counts the responses.
        """
        done, pool = self._engine.stats, self._adapters.pool.stats()
        for name, what, value in (
            *((own.name, own.metadata["what"], getattr(done, own.name)) for own in fields(done)),
            ("adapter_loads", "Adapters read from disk.", pool.loads),
            ("adapter_evictions", "Adapters removed from the device.", pool.evictions),
        ):
            yield CounterMetricFamily(f"fastlora_{name}", what, value=float(value))
        for name, what, value in (
            ("requests_running", "Running requests.", self._engine.running),
            ("requests_waiting", "Waiting requests.", self._engine.waiting),
            ("adapters", "Available adapters.", len(self._adapters.usable_names)),
            ("adapters_on_device", "Adapters on the device.", pool.on_device),
            ("adapter_device_bytes", "Bytes of adapters on the device.", pool.device_bytes),
            ("adapter_cpu_bytes", "Bytes of adapters in CPU memory.", pool.cpu_bytes),
        ):
            yield GaugeMetricFamily(f"fastlora_{name}", what, value=float(value))
