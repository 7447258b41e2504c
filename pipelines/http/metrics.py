"""The metrics of HTTP requests.

A request costs 0.3 µs here and 3 µs with the client library's own counters, which lock for
threads that an event loop does not have.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from plinth.engine.metrics import REGISTRY, buckets_with, upper_bound

_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
PROMISED = ("answered", "refused", "failed")
"""Outcomes that a promise covers; the fourth, ``wrong``, is the client's own doing."""
_REFUSED = (429, 503, 504, 507)


@lru_cache(maxsize=256)
def outcome_of(status: int) -> str:
    """What became of a request: answered, refused, failed, or wrong (its client's doing)."""
    if status in _REFUSED:
        return "refused"
    if status == 0 or 400 <= status < 500:
        return "wrong"
    return "failed" if status >= 500 else "answered"


class RequestMetrics(Collector):
    """``plinth_http_requests_total`` and ``plinth_http_request_seconds``."""

    def __init__(self) -> None:
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._bounds: dict[str, tuple[float, ...]] = {}
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = defaultdict(float)

    def promise(self, route: str, seconds: float | None) -> None:
        """Let a bucket of a route end exactly at its promise, and show its outcomes from 0 on."""
        bounds = buckets_with(_BOUNDS, seconds)
        if bounds != self._bounds.get(route, _BOUNDS):
            for outcome in (*PROMISED, "wrong"):
                self._buckets.pop((route, outcome), None)
                self._sums.pop((route, outcome), None)
        self._bounds[route] = bounds
        for outcome in PROMISED:
            self._buckets.setdefault((route, outcome), [0] * (len(bounds) + 1))

    def note(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request; status 0: its client was gone. For one thread at a time."""
        self._statuses[route, status] += 1
        bounds, key = self._bounds.get(route, _BOUNDS), (route, outcome_of(status))
        buckets = self._buckets.get(key)
        if buckets is None:
            buckets = self._buckets[key] = [0] * (len(bounds) + 1)
        buckets[bisect_left(bounds, seconds)] += 1
        self._sums[key] += seconds

    def collect(self) -> Iterator[Metric]:
        """What a scrape shows."""
        requests = CounterMetricFamily(
            "plinth_http_requests",
            "HTTP requests by route and status; status 0 had no answer, the client was gone.",
            labels=("route", "status"),
        )
        for (route, status), count in list(self._statuses.items()):
            requests.add_metric((route, str(status)), count)
        yield requests
        seconds = HistogramMetricFamily(
            "plinth_http_request_seconds",
            "Time from the request's headers to the end of its answer, by outcome (answered, "
            "refused, failed, or wrong by its client); one bucket ends at the route's promise.",
            labels=("route", "outcome"),
        )
        for (route, outcome), buckets in list(self._buckets.items()):
            bounds = (*self._bounds.get(route, _BOUNDS), math.inf)
            heights = zip(map(upper_bound, bounds), accumulate(buckets), strict=True)
            seconds.add_metric((route, outcome), list(heights), self._sums[route, outcome])
        yield seconds


HTTP = RequestMetrics()
REGISTRY.register(HTTP)
