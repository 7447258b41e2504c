"""From what a search found to variants in a store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from plinth.engine.models.variants import Evidence, Variant, VariantExists, Variants
from plinth.engine.models.weights import PACKED
from plinth.engine.optimize.recipes import Frontier, Goal, Small
from plinth.engine.optimize.search import Found, Point, Task
from plinth.engine.precision.onnx_graph import saturates
from plinth.engine.precision.policy import PRESETS

MAX_VARIANTS = 4
_TRIES = 8  # to find a name beside other searches
_LIBRARIES = ("torch", "onnxruntime", "openvino", "nncf")


def keep(found: Found, task: Task, variants: Variants, *, metric: str, data: str) -> list[Variant]:
    """Write the points that nothing beats as variants; the best becomes the default.

    Those that lose more than is allowed are there for ``Sla(on_overload="degrade")``.

    Args:
        found: what a search found.
        task: what was searched.
        variants: of the model's version.
        metric: name of the measure.
        data: where the rows are from.

    Returns:
        The variants that were written or were there already, the default first.
    """
    best = [found.best] if found.best else []
    others = [point for point in found.front if point is not found.best]
    written = []
    if not best:
        variants.set_default(None)
    for point in [*best, *others][:MAX_VARIANTS]:
        written.append(_write(point, found, task, variants, {"metric": metric, "data": data}))
        if point is found.best:  # before others find the disk full
            variants.set_default(written[0].name)
    return written


def keep_small(
    found: Frontier, goal: Goal, variants: Variants, *, metric: str, data: str
) -> list[Variant]:
    """Write the smaller models that nothing beats as variants; the best becomes the default.

    Where none is within loss and target, what is the default stays.

    Args:
        found: what a search found; ``goal``: what was searched.
        variants: of the model's version.
        metric: name of the measure.
        data: where the rows are from.

    Returns:
        The variants that were written, the default first.
    """
    best = [found.best] if found.best else []
    others = [point for point in found.front if point is not found.best]
    within = sorted(others, key=lambda point: (point.loss > goal.max_loss, point.bytes))
    facts = {"metric": metric, "data": data}
    written = []
    for point in [*best, *within][:MAX_VARIANTS]:
        written.append(_write_small(point, found, goal, variants, facts))
        if point is found.best:  # before others find the disk full
            variants.set_default(written[0].name)
    return written


def _write_small(
    point: Small, found: Frontier, goal: Goal, variants: Variants, facts: Mapping[str, Any]
) -> Variant:
    evidence = Evidence(
        speed=point.speed,
        seconds=point.run_seconds,
        memory=point.memory,
        loss=point.loss,
        **_circumstances(found, goal),
        reference_bytes=goal.reference_bytes,
        bits_per_weight=point.bits_per_weight,
        sparsity=point.sparsity,
        difference=point.difference,
        **facts,
    )
    words = re.sub(r"[^a-z0-9]+", "-", point.label.replace("%", "").lower()).strip("-")
    variant = Variant(
        name=f"packed-{words}",
        backend=goal.backend,
        precision=PRESETS["fp32"].as_dict(),
        compression=point.label,
        device=goal.device.kind,
        reference=variants.reference,
        evidence=evidence,
    )
    return _add(variant, {PACKED.name: point.path}, variants)


def _add(variant: Variant, files: Mapping[str, Path], variants: Variants) -> Variant:
    """Write a variant under its name, or with a number where somebody was there before."""
    for _ in range(_TRIES):
        name = _free(variant.name, variants)
        try:
            return variants.add(variant.model_copy(update={"name": name}), files)
        except VariantExists as error:  # another search ended just now
            taken = error
    raise taken


def _circumstances(found: Found | Frontier, asked: Task | Goal) -> dict[str, Any]:
    """What the evidence of all variants of one search has in common."""
    return {
        "reference_seconds": found.reference_seconds,
        "rows": asked.batch,
        "threads": asked.threads,
        "reference_memory": found.reference_memory,
        "max_loss": asked.max_loss,
        "data_digest": found.data_digest,
        "held_out": found.held_out,
        "machine": asked.device.name or str(asked.device),
        "versions": dict(_versions(_LIBRARIES)),
    }


def _write(
    point: Point, found: Found, task: Task, variants: Variants, facts: Mapping[str, Any]
) -> Variant:
    files = point.files
    evidence = Evidence(
        speed=point.speed,
        seconds=point.seconds,
        memory=point.memory,
        loss=point.loss,
        **_circumstances(found, task),
        kernels=point.report.get("kernels") or {},
        flops=point.report.get("flops") or {},
        **facts,
    )
    exact = bool(files) and "int8" in "".join(point.policy.used) and not saturates()
    variant = Variant(
        name=_name(point),
        backend=point.backend,
        precision=point.policy.as_dict(),
        device=task.device.kind,
        needs=("int8-exact",) if exact else (),
        reference=variants.reference,
        evidence=evidence,
    )
    return _add(variant, files, variants)


def _name(point: Point) -> str:
    used = "-".join(sorted(point.policy.used)) or "fp32"
    base = f"{point.backend}-{used}".replace("_", "-")
    return base + (f"-keep{point.kept}" if point.kept else "")


def _free(base: str, variants: Variants) -> str:
    taken = {variant.name for variant in variants.list()}
    names = (base, *(f"{base}.{number}" for number in range(2, 1000)))
    return next(name for name in names if name not in taken)


def _versions(libraries: Iterable[str]) -> Iterable[tuple[str, str]]:
    for library in libraries:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
