"""What Prometheus is told."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from magma_jax.inference.compilations import compilations_of_process
from magma_jax.inference.engine import EngineStats

# Seconds; answers take from hundredths on an accelerator to minutes on a CPU.
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROUTES = frozenset(
    {"/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/attention"}
)


class ServerMetrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        options = {"registry": self._registry}
        self._requests = Counter("magma_requests", "Requests by route and status", ["route", "status"], **options)
        self.first_token = Histogram(
            "magma_first_token_seconds", "Time to the first token", buckets=_BUCKETS, **options
        )
        self.duration = Histogram("magma_request_seconds", "Time to the end", buckets=_BUCKETS, **options)
        gauges = {
            "waiting": "Requests that wait for a slot",
            "running": "Requests that have a slot",
            "finished": "Requests that have ended, since the start",
            "prompt_tokens": "Prompt positions, since the start",
            "reused_tokens": "Prompt positions found in a cache, since the start",
            "new_tokens": "Tokens drawn, since the start",
            "pictures_encoded": "Pictures encoded, since the start",
        }
        ProcessCollector(registry=self._registry)  # process_resident_memory_bytes and others
        counter = compilations_of_process()
        programs = Gauge("magma_programs", "Programs made ready, compiled or cached; none after the start", **options)
        programs.set_function(lambda: counter.count)
        compilations = Gauge("magma_compilations", "Of these, programs that were compiled", **options)
        compilations.set_function(lambda: counter.count - counter.cached)
        self._engine = {name: Gauge(f"magma_{name}", text, **options) for name, text in gauges.items()}

    def count(self, path: str, status: int) -> None:
        """Counts a request; routes that do not exist share one name, or anybody could fill the memory."""
        self._requests.labels(path if path in _ROUTES else "other", str(status)).inc()

    def expose(self, stats: EngineStats) -> tuple[bytes, str]:
        """The text for Prometheus and its content type."""
        for name, gauge in self._engine.items():
            gauge.set(getattr(stats, name))
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
