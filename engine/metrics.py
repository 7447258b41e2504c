"""Prometheus metrics of the engine, and the registry that everything in Plinth shares.

Labels are names of models, devices and causes; never ids, keys or contents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from plinth.engine.devices.device import Device

REGISTRY = CollectorRegistry()
"""What ``/metrics`` shows."""

ProcessCollector(registry=REGISTRY)

_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)

CALLS = Counter(
    "plinth_calls_total",
    "Calls of a model by outcome: answered, late, or the reason of the error.",
    ("model", "outcome"),
    registry=REGISTRY,
)
CALL_SECONDS = Histogram(
    "plinth_call_seconds",
    "Time from a call's arrival to its answer.",
    ("model",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "plinth_queue_seconds",
    "The part of a call's time in which none of its rows was on the device.",
    ("model",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
QUEUE_ROWS = Gauge(
    "plinth_queue_rows",
    "Rows that wait for the device, by kind: urgent or background.",
    ("kind",),
    registry=REGISTRY,
)
BATCH_ROWS = Histogram(
    "plinth_batch_rows",
    "Rows of the batches that ran.",
    ("model",),
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    registry=REGISTRY,
)
BATCH_SECONDS = Histogram(
    "plinth_batch_seconds",
    "Device time of one batch.",
    ("model",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
DEVICE_SECONDS = Counter(
    "plinth_device_busy_seconds_total",
    "Time the device worked; its rate is the utilisation.",
    ("device",),
    registry=REGISTRY,
)
DEVICE_BYTES = Gauge(
    "plinth_device_bytes",
    "Memory of the device: allocated by this process, available to it, total.",
    ("device", "kind"),
    registry=REGISTRY,
)
SLA_MISSES = Counter(
    "plinth_sla_misses_total",
    "Promises not kept, by cause: deadline and queue_full were refused; slow_batch, late_start "
    "and postponed were answered late; door was in time at the device but not at the door.",
    ("model", "cause"),
    registry=REGISTRY,
)
DEGRADED = Counter(
    "plinth_degraded_total",
    "Calls that a cheaper model answered.",
    ("model", "cheaper"),
    registry=REGISTRY,
)
HALVED = Counter(
    "plinth_out_of_memory_total",
    "Batches that did not fit into memory and were run in halves.",
    ("model",),
    registry=REGISTRY,
)


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """The histograms of one model, looked up once."""

    call_seconds: Histogram
    queue_seconds: Histogram
    batch_rows: Histogram
    batch_seconds: Histogram


@cache
def of_model(name: str) -> ModelMetrics:
    """The histograms of a model."""
    families = (CALL_SECONDS, QUEUE_SECONDS, BATCH_ROWS, BATCH_SECONDS)
    return ModelMetrics(*(family.labels(name) for family in families))


def show_queue(rows: Callable[[str], int]) -> None:
    """Let the gauges of what waits ask at each scrape; ``rows`` takes urgent or background."""
    for kind in ("urgent", "background"):
        QUEUE_ROWS.labels(kind).set_function(partial(rows, kind))


def show_memory(device: Device) -> None:
    """Let the gauges of a device's memory ask the device at each scrape."""

    def ask(kind: str) -> float:
        return float(getattr(device.memory(), kind))

    for kind in ("allocated", "available", "total"):
        DEVICE_BYTES.labels(str(device), kind).set_function(partial(ask, kind))
