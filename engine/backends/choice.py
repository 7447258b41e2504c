"""The choice of backend and precision: what can run, agrees with the reference, and is fast."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends import registry
from plinth.engine.backends.base import Backend, Executable, cpu_threads
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError, PlinthError
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve

_log = logging.getLogger(__name__)

TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 5e-2,
    "bf16": 5e-2,
    "int8": 0.15,
    "int8_static": 0.15,
    "int4": 0.3,
}
GAIN = 1.1
MIXING = 1e-2  # how far a row's answers may be apart alone and in a batch
TRIAL_SECONDS = 1.0  # of the reference on all example rows, about
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
    policy: PrecisionPolicy | str | Mapping[str, Any] = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    rows: int = 16,
    example: Mapping[str, Tensor] | None = None,
) -> Executable:
    """Make a model ready to run, the fastest way that is right.

    The model is tried on example rows: those given, those of the model, or rows made up from
    its spec. A model that gives a row another answer alone than beside others is refused, and
    so is a candidate whose outputs are off the eager fp32 ones by more than 1e-3 (bf16: 5e-2)
    of their largest value. The report of the executable says what was asked for, what was
    taken, why, what became of the others, and on what rows it was tried.

    Args:
        model: the model.
        device: where.
        policy: a preset, a table or a policy; ``"auto"`` takes bf16 where it is native and
            at least 1.1 times as fast.
        backend: a name, or ``"auto"``: the fastest of those that are automatic.
        threads: CPU threads; ``None`` as torch has it.
        rows: rows of the probe, fewer where they would take seconds.
        example: valid rows (n, ...) by input name, where made-up ones would not do.

    Raises:
        ConfigError: unknown or impossible backend or precision, with the reason.
        InputError: the example rows are not what the spec says.
        ModelError: nothing can run the model, or it mixes the rows of a batch.
    """
    wanted = resolve(policy)
    kind = registry.find("onnxruntime" if model.onnx else "eager")
    absent: dict[str, str] = {}
    if wanted.exact:
        backends = _exact(kind, backend)
    elif backend == "auto":
        backends, absent = registry.automatic()
    else:
        backends = [registry.find(backend)]
    with cpu_threads(threads):
        reference = compiled(kind, model, device, PRESETS["fp32"], threads)
        given = model.example if example is None else example
        try:
            trial = _trial(model, reference, rows, given)
        except ModelError as error:
            if given is not None or not model.spec.free or kind not in backends or not wanted.plain:
                raise
            reference.report |= {"reason": f"not tried: {error}", "refused": {}}
            return reference
        model = replace(model, example=trial.inputs)
        found, refused = _candidates(model, reference, backends, wanted, trial)
        refused = absent | refused
        if not found:
            reasons = "; ".join(f"{label}: {why}" for label, why in refused.items())
            kind_of_error = ConfigError if backend != "auto" or not wanted.auto else ModelError
            raise kind_of_error(f"model {model.spec.name} cannot run on {device}: {reasons}")
        best = _fastest(found, trial.inputs)
    _explain(best, found, wanted, backend, refused, trial)
    return best.executable


@dataclass(frozen=True, slots=True)
class _Trial:
    """Example rows, what the reference makes of them, and where they are from."""

    model: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    source: str
    nan: float
    """Share of the reference's outputs that are not a number."""


def _trial(
    model: Model, reference: Executable, rows: int, given: Mapping[str, Tensor] | None
) -> _Trial:
    """Run the reference on the first example rows that it takes, and see that it keeps them apart.

    Raises:
        ModelError: it takes none, or the answer to a row depends on its batch.
    """
    failed: ModelError | None = None
    for source, example in _examples(model, given, rows):
        model.spec.check(example)
        one = {name: tensor[:1] for name, tensor in example.items()}
        try:
            begun = time.perf_counter()
            alone = _probe(reference, one)
            seconds = time.perf_counter() - begun
            if seconds < TRIAL_SECONDS:  # the first run may have been slow for once
                begun = time.perf_counter()
                _run(reference, one)
                seconds = max(time.perf_counter() - begun, 1e-9)
            count = min(len(next(iter(example.values()))), max(1, int(TRIAL_SECONDS / seconds)))
            inputs = {name: tensor[:count] for name, tensor in example.items()}
            outputs = _run(reference, inputs) if count > 1 else alone
        except ModelError as error:
            failed = failed or error
            continue
        _refuse_mixing(model, alone, outputs)
        return _Trial(model.spec.name, inputs, outputs, source, _nan_share(outputs))
    raise failed or ModelError(f"model {model.spec.name} has no example rows")


def _examples(
    model: Model, given: Mapping[str, Tensor] | None, rows: int
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    if given is not None:
        yield "given", replace(model, example=given).rows(rows)
        return
    made_up = model.spec.example(rows)
    yield "made up", made_up
    unbounded = {t.name for t in model.spec.inputs if t.bounds is None}
    zeros = {
        name: torch.zeros_like(tensor) if name in unbounded else tensor
        for name, tensor in made_up.items()
        if not tensor.is_floating_point()
    }
    if zeros:
        yield "made up, integers zero", made_up | zeros


def _refuse_mixing(
    model: Model, alone: Mapping[str, Tensor], together: Mapping[str, Tensor]
) -> None:
    off = max(difference(together[name][:1], want) for name, want in alone.items())
    if not off <= MIXING:
        raise ModelError(
            f"model {model.spec.name} mixes the rows of a batch, or answers at random: the first "
            f"example row alone and beside {len(next(iter(together.values()))) - 1} others gives "
            f"answers that are off by {off:.3g}",
            hint="serve it with batch_range=(1, 1) if it must see one row at a time",
        )


def _nan_share(outputs: Mapping[str, Tensor]) -> float:
    floats = [tensor for tensor in outputs.values() if tensor.is_floating_point()]
    total = sum(tensor.numel() for tensor in floats)
    return sum(int(tensor.isnan().sum()) for tensor in floats) / total if total else 0.0


def _candidates(
    model: Model,
    reference: Executable,
    backends: list[Backend],
    wanted: PrecisionPolicy,
    trial: _Trial,
) -> tuple[list[_Candidate], dict[str, str]]:
    """What can run the model and agrees with the reference; the others with the reason.

    Raises:
        PlinthError: the only candidate's own.
    """
    refused: dict[str, str] = {}
    found: list[_Candidate] = []
    device, threads = reference.device, reference.report["threads"]
    precisions = _precisions(wanted, device, refused)
    for chosen in backends:
        for precision in precisions:
            if chosen.name == reference.backend and precision.plain:
                reference.report["difference"] = 0.0
                found.append(_Candidate(reference))
                continue
            try:
                executable = compiled(chosen, model, device, precision, threads)
                _gate(executable, precision, trial)
            except PlinthError as error:
                refused[f"{chosen.name}/{precision.name}"] = error.message
                if len(backends) == 1 and not wanted.auto:
                    raise
                continue
            found.append(_Candidate(executable))
    return found, refused


def _exact(kind: Backend, backend: str) -> list[Backend]:
    if backend not in ("auto", kind.name):
        raise ConfigError(
            f"precision exact is what backend {kind.name} computes in fp32, not {backend}",
            hint=f"use backend auto or {kind.name}",
        )
    return [kind]


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
    return _guarded(executable, executable.run, inputs)


def _probe(executable: Executable, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _guarded(executable, executable.probe, inputs)


def _guarded(
    executable: Executable,
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    inputs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    try:
        output = run(inputs)
        executable.device.synchronize()
        return output
    except PlinthError:
        raise
    except Exception as error:  # models and libraries raise errors of any kind
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise ModelError(
            f"{executable.backend} in {executable.precision} fails on example rows: {reason}",
            hint="give valid rows, add(..., example={...}), or bounds of integers in the spec",
        ) from error


def _gate(executable: Executable, policy: PrecisionPolicy, trial: _Trial) -> None:
    if trial.nan == 1:
        raise ModelError(
            "the reference gives nothing but NaN on the example rows, so that nothing can be "
            "compared",
            hint="give valid rows: add(..., example={...})",
        )
    outputs = _probe(executable, trial.inputs)
    allowed = max(TOLERANCE[each] for each in policy.used | {"fp32"})
    worst = max(difference(outputs[name], want) for name, want in trial.outputs.items())
    executable.report["difference"] = worst
    if not worst <= allowed:
        raise ModelError(
            f"{executable.backend} in {executable.precision} is off the reference by {worst:.3g}, "
            f"allowed is {allowed:g}",
            hint="use backend eager and precision fp32",
        )


def difference(got: Tensor, want: Tensor) -> float:
    """How far outputs are apart: inf if shapes, dtypes or the places of NaN and infinities differ.

    Floats: the largest difference, relative to the largest finite magnitude of ``want``; NaN
    beside NaN is left out, and so is negative zero beside zero. Other dtypes: the share of
    unequal elements.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    if not got.is_floating_point():
        return float((got.cpu() != want.cpu()).double().mean())
    ours, theirs = got.detach().double().cpu(), want.detach().double().cpu()
    finite = theirs.isfinite()
    same = torch.where(finite, ours.isfinite(), (ours == theirs) | (ours.isnan() & theirs.isnan()))
    if not bool(same.all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    ours, theirs = ours[finite], theirs[finite]
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
            candidate.times.append(time.perf_counter() - begun)
        slow = max(candidate.times[-1] for candidate in found) > PROBE_SECONDS
        if time.perf_counter() > until and (turn >= 2 or slow):
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
    trial: _Trial,
) -> None:
    times: dict[str, Any] = {c.label: c.seconds for c in found if c.times}
    rows = int(next(iter(trial.inputs.values())).shape[0])
    others = ", ".join(f"{label} {seconds * 1e6:.0f} us" for label, seconds in times.items())
    only = "as asked for" if backend != "auto" and not wanted.auto else "nothing else can run it"
    gain = f"; bf16 must be {GAIN} times as fast as fp32" if wanted.auto else ""
    best.executable.report |= {
        "requested": {"backend": backend, "precision": wanted.name},
        "resolved": {"backend": best.executable.backend, "precision": best.executable.precision},
        "reason": f"fastest at {rows} rows: {others}{gain}" if times else only,
        "probe_rows": rows,
        "example": trial.source,
        "probe_seconds": times,
        "refused": refused,
    }
    if trial.nan:
        warning = f"{trial.nan:.0%} of the outputs are NaN on the example rows ({trial.source})"
        best.executable.report["warning"] = warning
        _log.warning(
            "model %s: %s; they could not be compared between backends", trial.model, warning
        )
