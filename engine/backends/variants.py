"""Loading a variant of a stored model: the best one that this machine can run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from plinth.engine.backends import registry
from plinth.engine.backends.base import Executable
from plinth.engine.backends.choice import TOLERANCE, compiled, difference
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError
from plinth.engine.models import weights
from plinth.engine.models.store import Model
from plinth.engine.models.variants import Variant, Variants
from plinth.engine.models.weights import PACKED
from plinth.engine.precision.onnx_graph import saturates
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy
from plinth.engine.precision.transforms import sharing_copy

CHECKED_ROWS = 8
DRIFT = 3.0  # times as far off on recent rows as on those it was measured on
RECENT_SECONDS = 5.0  # of the check on rows of recent calls
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
    if PACKED.name in variant.files:
        model = unpacked(model, variants.path(variant, PACKED.name))
        executable: Executable = compiled(backend, model, device, policy, threads)
    elif variant.files:
        path = variants.path(variant, next(iter(variant.files)))
        # A backend whose variants have files reads them: see ``load`` of those here.
        executable = backend.load(model, path, device, threads, variant.name)  # type: ignore[attr-defined]
    else:
        executable = compiled(backend, model, device, policy, threads)
    # What is packed is held against its own weights in eager torch, bit for bit as they are read.
    _hold_against_reference(model, executable, policy)
    if variant.evidence.difference is not None:
        executable.report["allowed"] = max(0.1, DRIFT * variant.evidence.difference)
    executable.precision = variant.name
    executable.report |= {
        "variant": variant.name,
        "reason": f"variant {variant.name}: {variant.evidence.speed:.2f} times as fast as fp32, "
        f"loses {variant.evidence.loss:.2g} by {variant.evidence.metric}",
    }
    return executable


def unpacked(model: Model, path: Path) -> Model:
    """A model with packed weights in the place of its own.

    Raises:
        ModelError: the file is damaged or not of this model, or the model is an ONNX file.
    """
    if model.onnx is not None:
        raise ModelError(f"{path} holds weights of a module; {model.spec.name} is an ONNX file")
    module = sharing_copy(model.module)  # whose tensors are replaced, not written to
    weights.fill(module, path, model.spec.name, {})
    return replace(model, module=module, made_from=None, variants=None)


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
    rows = model.rows(CHECKED_ROWS)
    reference = _reference(model, executable)
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
    executable.report |= {"difference": worst, "allowed": allowed}
    if not worst <= allowed:
        raise _off(model, policy.name, worst, allowed, "")


def check_on(model: Model, executable: Executable, rows: Sequence[Mapping[str, Tensor]]) -> None:
    """Hold a loaded variant against the reference on single rows that were answered lately.

    Rows that the reference refuses say nothing; after five seconds the rest is left. The report
    says on how many it was checked, and how far off it was.

    Args:
        model: of a store.
        executable: one of its variants; anything else passes.
        rows: (1, ...) by input name, of any sizes that the contract leaves free.

    Raises:
        ModelError: it is off by more than its precision may be; names the figures.
    """
    name = executable.report.get("variant")
    if name is None or not rows:
        return
    reference, until = _reference(model, executable), time.monotonic() + RECENT_SECONDS
    wants: dict[str, list[Tensor]] = {}
    gots: dict[str, list[Tensor]] = {}
    checked = 0
    for row in rows:
        if checked and time.monotonic() > until:
            break
        try:
            want = reference.run(row)
        except Exception as error:  # noqa: BLE001 - whatever a model raises on it
            _log.debug("model %s: %s", model.spec.name, type(error).__name__)
            continue
        got = executable.run(row)
        for output, tensor in want.items():
            if got[output].shape != tensor.shape:
                raise _off(model, name, float("inf"), 0.0, " on a recent row")
            wants.setdefault(output, []).append(tensor.flatten())
            gots.setdefault(output, []).append(got[output].flatten())
        checked += 1
    if not checked:
        return
    worst = max(difference(torch.cat(gots[each]), torch.cat(wants[each])) for each in wants)
    allowed = executable.report.get("allowed", TOLERANCE["fp32"])
    executable.report["recent"] = {"rows": checked, "difference": worst}
    if not worst <= allowed:
        raise _off(model, name, worst, allowed, f" on {checked} recent rows")


def _reference(model: Model, executable: Executable) -> Executable:
    kind = registry.find("onnxruntime" if model.onnx else "eager")
    return compiled(kind, model, executable.device, PRESETS["exact"], None)


def _off(model: Model, variant: str, worst: float, allowed: float, where: str) -> ModelError:
    return ModelError(
        f"variant {variant} of {model.spec.name} is off the reference by {worst:.3g}{where}, "
        f"allowed is {allowed:g}",
        hint="make it again, on this machine and with rows like those that come: "
        "plinth optimize or compress",
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
