"""What the page of the engine shows, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from plinth.engine import Engine, PlinthError
from plinth.engine.metrics import SLA_MISSES

_CAUSES = {
    "deadline": "refused: it could not be in time",
    "queue_full": "refused: the queue was full",
    "slow_batch": "late: its batch took longer than planned",
    "late_start": "late: the device was busy for longer than planned",
    "postponed": "late: taken later, as its promise allows",
    "door": "late: in time at the device, not at the door",
}
REFERENCE = "reference"
"""Word for a model as it is, without a variant."""


def view(engine: Engine, reasons: Mapping[str, str]) -> dict[str, Any]:
    """State, promises, batches, costs and models of an engine."""
    status = engine.status()
    families = {family.name: family for family in engine.metrics.registry.collect()}
    costs = engine.costs()
    return {
        "status": status,
        "reasons": dict(reasons),
        "draining": "draining" in reasons,
        "promises": _promises(families, sorted(status["models"])),
        "batches": _batches(families),
        "costs": {name: _curve(points) for name, points in sorted(costs.items()) if points},
        "models": [_model(engine, name, told) for name, told in sorted(status["models"].items())],
    }


def point(engine: Engine) -> dict[str, float]:
    """One moment for the chart: totals, from which the page makes rates."""
    status = engine.status()
    families = {family.name: family for family in engine.metrics.registry.collect()}
    calls = list(_samples(families, "plinth_calls", "_total"))
    kept = sum(one.value for one in calls if one.labels["outcome"] == "answered")
    busy = sum(one.value for one in _samples(families, "plinth_device_busy_seconds", "_total"))
    busy /= len(status["lanes"])
    return {
        "calls": sum(one.value for one in calls),
        "kept": kept,
        "busy": busy,
        "urgent": status["urgent_rows"],
        "background": status["background_rows"],
    }


def _samples(families: dict[str, Metric], family: str, suffix: str) -> Iterator[Sample]:
    found = families.get(family)
    for one in () if found is None else found.samples:
        if one.name == family + suffix:
            yield one


def _promises(families: dict[str, Metric], names: list[str]) -> list[dict[str, Any]]:
    """Calls of each model by how they ended, and promises not kept by cause."""
    found: dict[str, dict[str, Any]] = {
        name: {"model": name, "kept": 0, "asked": 0, "ends": {}, "missed": {}} for name in names
    }
    for one in _samples(families, "plinth_calls", "_total"):
        row = found.get(one.labels["model"])
        if row is None:
            continue
        row["ends"][one.labels["outcome"]] = int(one.value)
        row["asked"] += int(one.value) if one.labels["outcome"] != "cancelled" else 0
        row["kept"] += int(one.value) if one.labels["outcome"] == "answered" else 0
    doors = {family.name: family for family in SLA_MISSES.collect()}
    for source in (families, doors):
        for one in _samples(source, "plinth_sla_misses", "_total"):
            row = found.get(one.labels["model"])
            if row is not None and one.value:
                cause = one.labels["cause"]
                known = row["missed"].setdefault(cause, [_CAUSES.get(cause, cause), 0])
                known[1] += int(one.value)
    return list(found.values())


def _batches(families: dict[str, Metric]) -> dict[str, list[tuple[str, int]]]:
    """Batches by how many rows they had: ``("9 to 16", 12)`` and so on, of each model."""
    bounds: dict[str, list[tuple[float, float]]] = {}
    for one in _samples(families, "plinth_batch_rows", "_bucket"):
        bounds.setdefault(one.labels["model"], []).append((float(one.labels["le"]), one.value))
    found = {}
    for model, buckets in sorted(bounds.items()):
        below, counts, last = 0.0, [], 0.0
        for bound, total in sorted(buckets):
            count = int(total - below)
            if count:
                counts.append((_range(last, bound), count))
            below, last = total, bound
        if counts:
            found[model] = counts
    return found


def _range(last: float, bound: float) -> str:
    if bound == float("inf"):
        return f"over {last:g}"
    return f"{bound:g}" if bound - last <= 1 else f"{last + 1:g} to {bound:g}"


def _curve(points: dict[int, float]) -> list[tuple[int, float, float]]:
    """Rows, milliseconds of a batch and milliseconds of one of its rows; eight of them at most."""
    rows = sorted(points)
    kept = rows if len(rows) <= 8 else [rows[len(rows) * n // 8] for n in range(7)] + rows[-1:]
    return [(n, points[n] * 1e3, points[n] * 1e3 / n) for n in kept]


def _model(engine: Engine, name: str, told: dict[str, Any]) -> dict[str, Any]:
    """A model, and the variants that it could be switched to."""
    choices: list[dict[str, Any]] = []
    now = before = None
    broken = None
    try:
        variants = engine.variants(name)
        if variants is not None:
            now, before = variants.default, variants.before
            choices = [
                {"name": v.name, "speed": v.evidence.speed, "loss": v.evidence.loss}
                for v in variants.list()
            ]
    except PlinthError as error:
        broken = error.message
    return {
        "name": name,
        **told,
        "choices": choices,
        "now": now or REFERENCE,
        "before": before or REFERENCE,
        "broken": broken,
    }
