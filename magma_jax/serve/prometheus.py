"""Prometheus metrics."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from magma_jax.runtime.compilations import compilations_of_process

# Seconds; answers take from hundredths of a second on an accelerator to minutes on a CPU.
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROUTES = frozenset(
    {
        *("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/attention"),
        *("/v1/images/generations", "/v1/images/edits"),
    }
)

_NOW = {
    "waiting": "Requests that wait",
    "running": "Requests that are being answered",
}
_SINCE_THE_START = {
    "finished": "Requests that have ended",
    "prompt_tokens": "Prompt positions",
    "reused_tokens": "Prompt positions found in a cache",
    "new_tokens": "Tokens sampled",
    "images_encoded": "Images encoded",
    "images_drawn": "Images drawn",
}


class ServerMetrics:
    """Metrics of one server, in a separate registry.

    Args:
        stats: returns the counters of the engine or queue by name; called on every scrape.
    """

    def __init__(self, stats: Callable[[], Mapping[str, int]]):
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("magma_requests", "Requests by route and status", ["route", "status"], **options)
        self.first_token = Histogram(
            "magma_first_token_seconds", "Time to the first token", buckets=_BUCKETS, **options
        )
        self.duration = Histogram("magma_request_seconds", "Time to the end", buckets=_BUCKETS, **options)
        ProcessCollector(registry=self._registry)  # process_resident_memory_bytes and others
        self._registry.register(_StatsCollector(stats))

    def count(self, path: str, status: int) -> None:
        """Counts a request; unknown routes share one label, so that clients cannot create any number of labels."""
        self._requests.labels(path if path in _ROUTES else "other", str(status)).inc()

    def expose(self) -> tuple[bytes, str]:
        """Metrics in Prometheus's text format, and the content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _StatsCollector(Collector):
    """Counters of the engine or queue: running totals as counters named ``*_total``, the others as gauges."""

    def __init__(self, stats: Callable[[], Mapping[str, int]]):
        self._stats, self._programs = stats, compilations_of_process()

    def collect(self) -> Iterator[Metric]:
        stats, programs = self._stats(), self._programs
        for name, text in _NOW.items():
            yield GaugeMetricFamily(f"magma_{name}", text, stats.get(name, 0))
        for name, text in _SINCE_THE_START.items():
            if name in stats:
                yield CounterMetricFamily(f"magma_{name}", text, stats[name])
        ready = "Programs made ready, compiled or cached; none after the start"
        yield CounterMetricFamily("magma_programs", ready, programs.count)
        compiled = "Of these, programs that were compiled"
        yield CounterMetricFamily("magma_compilations", compiled, programs.count - programs.cached)
