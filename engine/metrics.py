"""Prometheus metrics: every engine has its own, and one registry shows them all.

Labels are names of models, devices and causes; never ids, keys or contents.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from plinth.engine.devices.device import Device


_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0),
)


REMEMBERED = 256
"""Models removed last whose late answers are not shown either."""

_SLA_MISSES = (
    "plinth_sla_misses_total",
    "Promises not kept, by cause: deadline and queue_full were refused; slow_batch, late_start "
    "and postponed were answered late; door was in time at the device but not at the door.",
    ("model", "cause"),
)


def buckets_with(buckets: Sequence[float], promise: float | None) -> tuple[float, ...]:
    """Buckets of which one ends exactly at a promise, so that shares in time add up over replicas.

    Args:
        buckets: upper bounds in seconds, in order.
        promise: seconds; ``None``: there is none.
    """
    return tuple(sorted({*buckets, *(() if promise is None else (promise,))}))


def upper_bound(seconds: float) -> str:
    """The label ``le`` of a bucket, as Prometheus has it."""
    return str(floatToGoString(seconds))  # type: ignore[no-untyped-call]


class _ByModel(Collector):
    """A histogram of each model with buckets of its own, shown as one family.

    Args:
        name: of the family.
        documentation: of the family.
    """

    def __init__(self, name: str, documentation: str) -> None:
        self._about = (name, documentation)
        self._models: dict[str, tuple[tuple[float, ...], Histogram, Histogram]] = {}

    def of(self, model: str, promise: float | None = None) -> Histogram:
        """The histogram of a model; another promise begins it anew."""
        buckets = buckets_with(_SECONDS, promise)
        found = self._models.get(model)
        if found is None or (promise is not None and found[0] != buckets):
            whole = Histogram(*self._about, ("model",), buckets=buckets, registry=None)
            found = self._models[model] = (buckets, whole, whole.labels(model))
        return found[2]

    def forget(self, model: str) -> None:
        """Show a model no more."""
        self._models.pop(model, None)

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        shown = Metric(*self._about, "histogram")
        for _, whole, _ in list(self._models.values()):
            for family in whole.collect():
                shown.samples += family.samples
        yield shown


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """The histograms of one model, looked up once."""

    call_seconds: Histogram
    queue_seconds: Histogram
    batch_rows: Histogram
    batch_seconds: Histogram


class EngineMetrics:
    """The metrics of one engine, in a registry of its own.

    Args:
        device: the first that the engine runs on.
        waiting: rows that wait, by kind: urgent or background. Held weakly.

    Attributes:
        registry: this engine alone; :data:`REGISTRY` adds the engines of a process up.
    """

    def __init__(self, device: Device, waiting: Callable[[str], int]) -> None:
        registry = self.registry = CollectorRegistry()
        registry.register(_Sweep(self))
        self._removed: deque[str] = deque(maxlen=REMEMBERED)
        self._unswept: set[str] = set()
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.calls = counter(
            "plinth_calls_total",
            "Calls of a model by outcome: answered, late, or the reason of the error.",
            ("model", "outcome"),
        )
        self.sla_misses = Counter(*_SLA_MISSES, registry=registry)
        self.degraded = counter(
            "plinth_degraded_total", "Calls that a cheaper model answered.", ("model", "cheaper")
        )
        self.variant_switches = counter(
            "plinth_variant_switches_total",
            "Changes of a model's default in the store; outcome: taken, or refused.",
            ("model", "outcome"),
        )
        self.failed_batches = counter(
            "plinth_failed_batches_total",
            "Batches in which a model raised; they are run again in halves.",
            ("model",),
        )
        self.rerun_batches = counter(
            "plinth_rerun_batches_total",
            "Batches that ran again because their lane died.",
            ("model",),
        )
        self.lane_deaths = counter(
            "plinth_lane_deaths_total", "Lanes that died, by device.", ("device",)
        )
        self.lane_restarts = counter(
            "plinth_lane_restarts_total", "Lanes that died and were started again.", ("device",)
        )
        self.shared = counter(
            "plinth_shared_calls_total",
            "Calls that were given to several lanes in shares (mode sync, or hybrid and large).",
            ("model",),
        )
        self.halved = counter(
            "plinth_out_of_memory_total",
            "Batches that did not fit into memory and were run in halves.",
            ("model",),
        )
        self.steps = counter(
            "plinth_compute_steps_total",
            "Heavy steps in worker processes by outcome: done, raised, or why it was lost.",
            ("step", "outcome"),
        )
        self.step_seconds = counter(
            "plinth_compute_seconds_total", "Time of steps in worker processes.", ("step",)
        )
        self._busy_seconds = counter(
            "plinth_device_busy_seconds_total",
            "Time the lanes of a device worked; its rate over their number is the utilisation.",
            ("device",),
        )
        self._busy: dict[str, Counter] = {}
        self.busy(device)
        self._call_seconds = _ByModel(
            "plinth_call_seconds",
            "Time from a call's arrival to its answer; one bucket ends at the model's promise.",
        )
        self._queue_seconds = _ByModel(
            "plinth_queue_seconds",
            "The part of a call's time in which none of its rows was on the device.",
        )
        registry.register(self._call_seconds)
        registry.register(self._queue_seconds)
        self._families: tuple[Histogram, ...] = (
            histogram(
                "plinth_batch_rows",
                "Rows of the batches that ran.",
                ("model",),
                buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
            ),
            histogram(
                "plinth_batch_seconds", "Device time of one batch.", ("model",), buckets=_SECONDS
            ),
        )
        self._weights = Gauge(
            "plinth_model_weight_bytes",
            "Bytes of a model's weights; 0 while it has left memory for others.",
            ("model",),
            registry=registry,
        )
        self._models: dict[str, ModelMetrics] = {}
        self._outcomes: dict[tuple[str, str], Counter] = {}
        rows = Gauge(
            "plinth_queue_rows",
            "Rows that wait for the device, by kind: urgent or background.",
            ("kind",),
            registry=registry,
        )
        weak = weakref.WeakMethod(waiting)
        for kind in ("urgent", "background"):
            rows.labels(kind).set_function(partial(_ask, weak, kind))
        _ENGINES.watch(self)

    def busy(self, device: Device) -> Counter:
        """The seconds that lanes of a device worked."""
        name = str(device)
        found = self._busy.get(name)
        if found is None:
            found = self._busy[name] = self._busy_seconds.labels(name)
            _show_memory(device)
        return found

    def count(self, name: str, outcome: str) -> None:
        """Count a call of a model; see ``plinth_calls_total``."""
        found = self._outcomes.get((name, outcome))
        if found is None:
            found = self._outcomes[name, outcome] = self.calls.labels(name, outcome)
        found.inc()

    def count_step(self, name: str, outcome: str, seconds: float) -> None:
        """Count a step that a worker process had; see ``plinth_compute_steps_total``."""
        self.steps.labels(name, outcome).inc()
        self.step_seconds.labels(name).inc(seconds)

    def of_model(self, name: str) -> ModelMetrics:
        """The histograms of a model."""
        found = self._models.get(name)
        if found is None:
            seconds = (self._call_seconds.of(name), self._queue_seconds.of(name))
            rest = (family.labels(name) for family in self._families)
            found = self._models[name] = ModelMetrics(*seconds, *rest)
        return found

    def weights(self, name: str, ask: Callable[[], float] | None) -> None:
        """Show the bytes of a model's weights; ``None``: it has gone."""
        if ask is None:
            self._weights.remove(name)
        else:
            self._weights.labels(name).set_function(ask)

    def removed(self, name: str) -> None:
        """Show a model no more, from the next scrape on; nor what late answers of it count."""
        self.weights(name, None)
        self._removed.append(name)
        self._unswept.add(name)

    def sweep(self) -> None:
        """Let go of all series of models that were removed.

        Of one that was swept before there are new ones only if a late answer was counted.
        """
        late = {name for name, _ in list(self._outcomes)} | set(self._models)
        names = (self._unswept | late) & set(self._removed)
        self._unswept.clear()
        for name in names:
            for metric in self._of_models():
                metric.remove_by_labels({"model": name})
            self.degraded.remove_by_labels({"cheaper": name})
            self._call_seconds.forget(name)
            self._queue_seconds.forget(name)
            self._models.pop(name, None)
            for key in [key for key in list(self._outcomes) if key[0] == name]:
                self._outcomes.pop(key, None)

    def _of_models(self) -> tuple[MetricWrapperBase, ...]:
        return (
            *(self.calls, self.sla_misses, self.degraded, self.variant_switches),
            *(self.failed_batches, self.rerun_batches, self.shared, self.halved, *self._families),
        )

    def promise(self, name: str, seconds: float | None) -> None:
        """Let a bucket of a model's histograms end at its promise; one removed is shown again."""
        self.sweep()
        while name in self._removed:
            self._removed.remove(name)
        self._call_seconds.of(name, seconds)
        self._queue_seconds.of(name, seconds)
        self._models.pop(name, None)
        self.of_model(name)


class _Sweep(Collector):
    """Comes first at every scrape, and lets go of what models that were removed left.

    Args:
        metrics: of an engine; held weakly.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = weakref.ref(metrics)

    def collect(self) -> Iterator[Metric]:
        """See Collector; nothing is shown."""
        metrics = self._metrics()
        if metrics is not None:
            metrics.sweep()
        return iter(())


def _ask(waiting: weakref.WeakMethod[Callable[[str], int]], kind: str) -> float:
    method = waiting()
    return 0.0 if method is None else float(method(kind))


class _Engines(Collector):
    """The engines of this process, added up; what engines that are gone counted stays."""

    def __init__(self) -> None:
        self._live: weakref.WeakSet[EngineMetrics] = weakref.WeakSet()
        self._gone: deque[CollectorRegistry] = deque()
        self._past: list[Metric] = []
        self._lock = threading.Lock()

    def watch(self, metrics: EngineMetrics) -> None:
        """Show an engine as long as it lives."""
        with self._lock:
            self._live.add(metrics)
        # A finalizer runs wherever the collector of garbage does: it takes no lock.
        weakref.finalize(metrics, self._gone.append, metrics.registry).atexit = False

    def collect(self) -> Iterator[Metric]:
        """One family of each name."""
        with self._lock:
            while self._gone:
                counted = [f for f in self._gone.popleft().collect() if f.type != "gauge"]
                self._past = list(_added_up([*self._past, *counted]))
            registries = [_DOORS, *(metrics.registry for metrics in self._live)]
            past = list(self._past)
        return _added_up([*past, *(f for registry in registries for f in registry.collect())])


def _added_up(families: Iterable[Metric]) -> Iterator[Metric]:
    """Families of one name as one: samples with the same labels are summed."""
    whole: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for family in families:
        shown = Metric(family.name, family.documentation, family.type)
        _, values = whole.setdefault(family.name, (shown, {}))
        for sample in family.samples:
            key = (sample.name, tuple(sample.labels.items()))
            if sample.name.endswith("_created"):  # the time the first of them was made
                values[key] = min(sample.value, values.get(key, sample.value))
            else:
                values[key] = values.get(key, 0.0) + sample.value
    for shown, values in whole.values():
        shown.samples = [Sample(name, dict(of), value) for (name, of), value in values.items()]
        yield shown


_DOORS = CollectorRegistry()
SLA_MISSES = Counter(*_SLA_MISSES, registry=_DOORS)
"""Promises that a door did not keep; shown with those of the engines."""

_ENGINES = _Engines()
REGISTRY = CollectorRegistry()
"""What ``/metrics`` shows: all engines of the process, its devices, and what the doors count."""

ProcessCollector(registry=REGISTRY)
REGISTRY.register(_ENGINES)

_DEVICE_BYTES = Gauge(
    "plinth_device_bytes",
    "Memory of the device: allocated by this process, available to it, total.",
    ("device", "kind"),
    registry=REGISTRY,
)


def _show_memory(device: Device) -> None:
    """Let the gauges of a device's memory ask the device at each scrape."""

    def ask(kind: str) -> float:
        return float(getattr(device.memory(), kind))

    for kind in ("allocated", "available", "total"):
        _DEVICE_BYTES.labels(str(device), kind).set_function(partial(ask, kind))
