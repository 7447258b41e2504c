"""A model that is removed leaves no series behind; one that comes again begins anew."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from plinth.engine.devices.device import pick
from plinth.engine.metrics import REMEMBERED, EngineMetrics

pytestmark = pytest.mark.cpu


class Nothing:
    def waiting(self, kind: str) -> int:
        return 0


NOTHING = Nothing()


def shown(metrics: EngineMetrics) -> list[str]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line for line in lines if '="gone"' in line]


def count_all(metrics: EngineMetrics, name: str) -> None:
    metrics.count(name, "answered")
    metrics.sla_misses.labels(name, "deadline").inc()
    metrics.degraded.labels(name, "other").inc()
    metrics.degraded.labels("other", name).inc()
    for counter in (metrics.failed_batches, metrics.rerun_batches, metrics.shared, metrics.halved):
        counter.labels(name).inc()
    metrics.variant_switches.labels(name, "taken").inc()
    meters = metrics.of_model(name)
    for histogram in (meters.call_seconds, meters.batch_rows, meters.batch_seconds):
        histogram.observe(1)


def test_a_removed_model_leaves_no_series_nor_do_its_late_answers() -> None:
    metrics = EngineMetrics(pick("cpu"), NOTHING.waiting)
    for name in ("gone", "other"):
        metrics.promise(name, 0.02)
        metrics.weights(name, lambda: 1.0)
        count_all(metrics, name)
    assert len(shown(metrics)) > 90
    others = [
        line
        for line in generate_latest(metrics.registry).decode().splitlines()
        if 'model="other"' in line and "gone" not in line
    ]
    metrics.removed("gone")
    assert shown(metrics) == []
    count_all(metrics, "gone")  # calls that were accepted before
    assert shown(metrics) == []
    left = generate_latest(metrics.registry).decode().splitlines()
    assert set(others) <= set(left), "other models count on"


def test_a_model_that_comes_again_begins_at_nothing() -> None:
    metrics = EngineMetrics(pick("cpu"), NOTHING.waiting)
    metrics.promise("gone", None)
    metrics.weights("gone", lambda: 1.0)
    count_all(metrics, "gone")
    metrics.removed("gone")
    metrics.promise("gone", None)
    metrics.weights("gone", lambda: 2.0)
    metrics.count("gone", "answered")
    ask = metrics.registry.get_sample_value
    assert ask("plinth_calls_total", {"model": "gone", "outcome": "answered"}) == 1
    assert ask("plinth_model_weight_bytes", {"model": "gone"}) == 2
    assert ask("plinth_call_seconds_count", {"model": "gone"}) == 0


def test_what_is_remembered_of_removed_models_is_bounded() -> None:
    metrics = EngineMetrics(pick("cpu"), NOTHING.waiting)
    for number in range(2 * REMEMBERED):
        metrics.weights(f"m{number}", lambda: 1.0)
        metrics.count(f"m{number}", "answered")
        metrics.removed(f"m{number}")
        if number % 100 == 0:
            metrics.sweep()
    left = generate_latest(metrics.registry).decode()
    assert 'model="m' not in left
