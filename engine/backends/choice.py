"""The choice of backend and precision: what can run, agrees with the reference, and is fast."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends.base import Backend, Executable
from plinth.engine.backends.eager import Eager
from plinth.engine.backends.inductor import Inductor
from plinth.engine.backends.onnxruntime import OnnxRuntime
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError, PlinthError, nearest
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Eager(), Inductor(), OnnxRuntime())
}
"""The backends by name; register another one by adding it here."""

AUTOMATIC = ("eager", "onnxruntime")
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
GAIN = 1.1
PROBE_SECONDS = 0.3
PROBE_ROUNDS = 30


@dataclass(slots=True)
class _Candidate:
    executable: Executable
    times: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.executable.backend}/{self.executable.precision}"

    @property
    def seconds(self) -> float:
        return min(self.times)


def prepare(
    model: Model,
    device: Device,
    policy: PrecisionPolicy | str | Mapping[str, str] = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    rows: int = 16,
    example: Mapping[str, Tensor] | None = None,
) -> Executable:
    """Make a model ready to run, the fastest way that is right.

    Every candidate runs the same rows; one whose outputs are off the eager fp32 ones by more
    than 1e-3 (bf16: 5e-2) of their largest value is refused. The report of the executable
    says what was asked for, what was taken, why, and what became of the others.

    Args:
        model: the model.
        device: where.
        policy: a preset, a table or a policy; ``"auto"`` takes bf16 where it is native and
            at least 1.1 times as fast.
        backend: a name, or ``"auto"``: of eager and onnxruntime, the faster one.
        threads: CPU threads; ``None`` as torch has it.
        rows: rows of the probe.
        example: rows for the probe, where made-up ones would not do.

    Raises:
        ConfigError: unknown or impossible backend or precision, with the reason.
        ModelError: nothing can run the model.
    """
    wanted = resolve(policy)
    inputs = dict(example) if example is not None else model.spec.example(rows)
    model.spec.check(inputs)
    reference = _reference(model, device, threads, inputs)
    refused: dict[str, str] = {}
    found: list[_Candidate] = []
    for chosen in _backends(backend):
        for precision in _precisions(wanted, device, refused):
            label = f"{chosen.name}/{precision.name}"
            try:
                executable = compiled(chosen, model, device, precision, threads)
                _gate(executable, precision, inputs, reference)
            except PlinthError as error:
                refused[label] = error.message
                if backend != "auto" and not wanted.auto:
                    raise
                continue
            found.append(_Candidate(executable))
    if not found:
        reasons = "; ".join(f"{label}: {why}" for label, why in refused.items())
        kind = ConfigError if backend != "auto" or not wanted.auto else ModelError
        raise kind(f"model {model.spec.name} cannot run on {device}: {reasons}")
    best = _fastest(found, inputs)
    _explain(best, found, wanted, backend, refused, inputs)
    return best.executable


def _backends(backend: str) -> list[Backend]:
    if backend == "auto":
        return [BACKENDS[name] for name in AUTOMATIC]
    if backend not in BACKENDS:
        raise ConfigError(
            f"there is no backend {backend!r}", hint=nearest(backend, ("auto", *BACKENDS))
        )
    return [BACKENDS[backend]]


def _precisions(
    wanted: PrecisionPolicy, device: Device, refused: dict[str, str]
) -> list[PrecisionPolicy]:
    if not wanted.auto:
        return [wanted]
    if not device.native("bf16"):
        refused["bf16"] = f"{device} ({device.name}) has no bf16 instructions"
        return [PRESETS["fp32"]]
    return [PRESETS["fp32"], PRESETS["bf16"]]


def compiled(
    backend: Backend, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
) -> Executable:
    """Compile with one backend, unchecked.

    Raises:
        ConfigError: the backend cannot run the model so; says why.
    """
    reason = backend.supports(model, device, policy)
    if reason is not None:
        raise ConfigError(
            f"backend {backend.name} cannot run model {model.spec.name} in {policy.name} on "
            f"{device}: {reason}",
            hint="use backend auto",
        )
    return backend.compile(model, device, policy, threads)


def _run(executable: Executable, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return executable.run(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ModelError(
            f"{executable.backend} in {executable.precision} fails on example rows: {reason}",
            hint="choose another backend or precision, or give example rows",
        ) from error


def _reference(
    model: Model, device: Device, threads: int | None, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    backend = BACKENDS["onnxruntime" if model.onnx else "eager"]
    return _run(compiled(backend, model, device, PRESETS["fp32"], threads), inputs)


def _gate(
    executable: Executable,
    policy: PrecisionPolicy,
    inputs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
) -> None:
    outputs = _run(executable, inputs)
    allowed = TOLERANCE["fp32" if policy.plain else "bf16"]
    worst = max(difference(outputs[name], want) for name, want in reference.items())
    executable.report["difference"] = worst
    if not worst <= allowed:
        raise ModelError(
            f"{executable.backend} in {executable.precision} is off the reference by {worst:.3g}, "
            f"allowed is {allowed:g}",
            hint="use backend eager and precision fp32",
        )


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest magnitude of ``want``; inf if shapes differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    ours, theirs = got.detach().double().cpu(), want.detach().double().cpu()
    if torch.equal(ours.isfinite(), theirs.isfinite()):
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    scale = max(float(theirs.abs().max()), 1e-12)
    return float((ours - theirs).abs().max()) / scale


def _fastest(found: list[_Candidate], inputs: Mapping[str, Tensor]) -> _Candidate:
    """Interleaved, the least time of each: what else the machine does hits all alike."""
    if len(found) == 1:
        return found[0]
    until = time.perf_counter() + PROBE_SECONDS * len(found)
    for turn in range(PROBE_ROUNDS):
        for candidate in found:
            begun = time.perf_counter()
            _run(candidate.executable, inputs)
            candidate.executable.device.synchronize()
            candidate.times.append(time.perf_counter() - begun)
        if turn >= 2 and time.perf_counter() > until:
            break
    exact = [c for c in found if c.executable.precision == "fp32"]
    best = min(found, key=lambda candidate: candidate.seconds)
    if exact and best not in exact:
        rival = min(exact, key=lambda candidate: candidate.seconds)
        return best if best.seconds * GAIN <= rival.seconds else rival
    return best


def _explain(
    best: _Candidate,
    found: list[_Candidate],
    wanted: PrecisionPolicy,
    backend: str,
    refused: dict[str, str],
    inputs: Mapping[str, Tensor],
) -> None:
    times: dict[str, Any] = {c.label: c.seconds for c in found if c.times}
    rows = int(next(iter(inputs.values())).shape[0])
    others = ", ".join(f"{label} {seconds * 1e6:.0f} us" for label, seconds in times.items())
    only = "as asked for" if backend != "auto" and not wanted.auto else "nothing else can run it"
    gain = f"; bf16 must be {GAIN} times as fast as fp32" if wanted.auto else ""
    best.executable.report |= {
        "requested": {"backend": backend, "precision": wanted.name},
        "resolved": {"backend": best.executable.backend, "precision": best.executable.precision},
        "reason": f"fastest at {rows} rows: {others}{gain}" if times else only,
        "probe_rows": rows,
        "probe_seconds": times,
        "refused": refused,
    }
