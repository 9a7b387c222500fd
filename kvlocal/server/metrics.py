"""Metrics: what a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvlocal.serving.request import Usage

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server.

    Args:
        stats: the numbers of the engine at this moment, by name.
    """

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(stats))
        self._requests = Counter("kvlocal_requests", "Requests, by what they asked for and the HTTP status of the answer.", ("path", "status"),
                                 registry=self._registry)  # fmt: skip
        self._prompt = Counter("kvlocal_prompt_tokens", "Tokens of the conversations that were answered.", registry=self._registry)
        self._cached = Counter("kvlocal_cached_tokens", "Those of them that were not read again.", registry=self._registry)
        self._completion = Counter("kvlocal_completion_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token = Histogram("kvlocal_first_token_seconds", "From a request to the first piece of its answer.", buckets=_SECONDS,
                                     registry=self._registry)  # fmt: skip

    def count(self, usage: Usage) -> None:
        """An answer that took so many tokens."""
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._completion.inc(usage.completion_tokens)

    def count_request(self, path: str, status: int) -> None:
        """A request that was answered. path: of the endpoint, not what a client has sent, of which there could be any number."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self._stats().items():
            yield GaugeMetricFamily(f"kvlocal_{name}", f"{name.replace('_', ' ').capitalize()}, at this moment.", value)
