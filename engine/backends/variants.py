"""Loading a variant of a stored model: the best one that this machine can run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from plinth.engine.backends import registry
from plinth.engine.backends.base import Executable
from plinth.engine.backends.choice import TOLERANCE, compiled, difference
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError
from plinth.engine.models.store import Model
from plinth.engine.models.variants import Variant, Variants
from plinth.engine.precision.onnx_graph import saturates
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy

CHECKED_ROWS = 8
_log = logging.getLogger(__name__)


def why_not(variant: Variant, device: Device) -> str | None:
    """Why a variant cannot run on a device; ``None`` if it can."""
    if variant.device != device.kind:
        return f"it is for {variant.device}, not {device.kind}"
    try:
        registry.find(variant.backend)
    except ConfigError as error:
        return error.message
    if "int8-exact" in variant.needs and saturates():
        return "its int8 products would overflow on this CPU"
    return None


def load_variant(model: Model, device: Device, threads: int | None, name: str) -> Executable:
    """One variant, checked: its files by digest, its answers against the reference's.

    Raises:
        ConfigError: this machine cannot run it; says why.
        ModelError: there is none of that name, a file is damaged, or its answers are off.
    """
    variants = _variants(model)
    variant = variants.get(name)
    reason = why_not(variant, device)
    if reason is not None:
        raise ConfigError(f"variant {name} of {model.spec.name} cannot run here: {reason}")
    policy = replace(PrecisionPolicy.from_table(variant.precision), name=variant.name)
    backend = registry.find(variant.backend)
    if variant.files:
        path = variants.path(variant, next(iter(variant.files)))
        # A backend whose variants have files reads them: see ``load`` of those here.
        executable: Executable = backend.load(model, path, device, threads, variant.name)  # type: ignore[attr-defined]
    else:
        executable = compiled(backend, model, device, policy, threads)
    _hold_against_reference(model, executable, policy)
    executable.precision = variant.name
    executable.report |= {
        "variant": variant.name,
        "reason": f"variant {variant.name}: {variant.evidence.speed:.2f} times as fast as fp32, "
        f"loses {variant.evidence.loss:.2g} by {variant.evidence.metric}",
    }
    return executable


def best_variant(model: Model, device: Device, threads: int | None) -> Executable | None:
    """The default variant, else the fastest within its allowed loss, of those that run here.

    ``None`` where the model has none, the reference is the default, or none runs here.

    Raises:
        ModelError: a file of the one that would be taken is damaged.
    """
    if model.variants is None or model.variants.default is None:
        return None
    for variant in _in_order(model.variants):
        if (reason := why_not(variant, device)) is None:
            try:
                return load_variant(model, device, threads, variant.name)
            except ConfigError as error:
                reason = error.message
        _log.warning("model %s: variant %s: %s", model.spec.name, variant.name, reason)
    return None


def degraded_variant(model: Model, device: Device, beside: str | None) -> str | None:
    """Name of the fastest variant that runs here, if it is faster than what usually answers.

    Args:
        model: of a store.
        device: where.
        beside: the variant that usually answers; ``None``: the reference.
    """
    if model.variants is None:
        return None
    speeds = {v.name: v.evidence.speed for v in model.variants.list() if not why_not(v, device)}
    name = max(speeds, key=lambda name: speeds[name], default=None)
    usual = speeds.get(beside, 1.0) if beside else 1.0
    return name if name is not None and speeds[name] > usual else None


def _hold_against_reference(model: Model, executable: Executable, policy: PrecisionPolicy) -> None:
    kind = registry.find("onnxruntime" if model.onnx else "eager")
    rows = model.rows(CHECKED_ROWS)
    reference = compiled(kind, model, executable.device, PRESETS["exact"], None)
    try:
        want = reference.run(rows)
    except Exception as error:
        if model.example is not None:
            raise
        _log.warning(
            "model %s: variant %s is not checked: made-up rows raise %s",
            *(model.spec.name, policy.name, type(error).__name__),
        )
        return
    got = executable.probe(rows)
    worst = max(difference(got[name], tensor) for name, tensor in want.items())
    allowed = max(TOLERANCE[each] for each in policy.used | {"fp32"})
    executable.report["difference"] = worst
    if not worst <= allowed:
        raise ModelError(
            f"variant {policy.name} of {model.spec.name} is off the reference by {worst:.3g}, "
            f"allowed is {allowed:g}",
            hint="make it again on this machine: plinth optimize",
        )


def _in_order(variants: Variants) -> Iterator[Variant]:
    every = variants.list()
    yield from (variant for variant in every if variant.name == variants.default)
    others = [v for v in every if v.name != variants.default]
    fit = [v for v in others if v.evidence.loss <= v.evidence.max_loss]
    yield from sorted(fit, key=lambda v: -v.evidence.speed)


def _variants(model: Model) -> Variants:
    if model.variants is None:
        raise ModelError(
            f"model {model.spec.name} has no variants", hint="load it from a store that has some"
        )
    return model.variants
