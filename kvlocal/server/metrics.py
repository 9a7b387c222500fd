"""Metrics: what a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, fields

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvlocal.serving.stats import EngineStats, Totals

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server.

    Args:
        stats: gives the engine in numbers.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(stats))
        self._requests = Counter("kvlocal_requests", "Requests, by what they asked for and the HTTP status of the answer.", ("path", "status"),
                                 registry=self._registry)  # fmt: skip
        self.first_token = Histogram("kvlocal_first_token_seconds", "From a request to the first piece of its answer.", buckets=_SECONDS,
                                     registry=self._registry)  # fmt: skip

    def count_request(self, path: str, status: int) -> None:
        """A request that was answered. path: of the endpoint, not what a client has sent, of which there could be any number."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """The numbers of the engine, read when somebody asks: what requests took is counted, the rest is as it is at that moment."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        counted = {field.name for field in fields(Totals)}
        for name, value in asdict(self._stats()).items():
            words = name.replace("_", " ").capitalize()
            if name in counted:
                yield CounterMetricFamily(f"kvlocal_{name}", f"{words}, of all requests so far.", value)
            else:
                yield GaugeMetricFamily(f"kvlocal_{name}", f"{words}, at this moment.", value)
