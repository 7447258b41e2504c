"""The choice of backend and precision: what can run, agrees with the reference, and is fast."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends import planner, registry
from plinth.engine.backends.base import Backend, Executable, Wrapped, cpu_threads
from plinth.engine.backends.planner import Bounded, Planned, Stretch
from plinth.engine.devices.device import Device
from plinth.engine.errors import ConfigError, ModelError, OutOfMemory, PlinthError
from plinth.engine.mapped import trim
from plinth.engine.models.other_sizes import other_sizes, sizes_of
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy, resolve
from plinth.engine.precision.transforms import sharing_copy

_log = logging.getLogger(__name__)

TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 5e-2,
    "bf16": 5e-2,
    "int8": 0.15,
    "int8_static": 0.15,
    "int4": 0.3,
}
MIXING = 1e-2  # how far a row's answers may be apart alone and in a batch
TRIAL_SECONDS = 1.0  # of the reference on all example rows, about
PROBE_SECONDS = 0.15  # of one candidate at one number of rows
PROBE_ROUNDS = 30
PLAN_SECONDS = 6.0  # of timing all candidates at all numbers of rows
COMPILE_SECONDS = 15.0  # of compiling and exporting all candidates of "auto"
CHECK_SECONDS = 8.0  # of trying the reference, and again of trying all others, in "auto"
HOPELESS = 5.0  # times the fastest, from which a candidate is left out where time is short
AGAIN_SECONDS = 2.0  # of a first run below which the reference is timed by another one
SLOW_SECONDS = 1.0  # of one row; what takes longer is run as seldom as can be
_COMPARED_AT_ONCE = 1 << 20  # numbers of outputs; in float64 they take several times as much
GROWTH = 2.0  # times an example's elements at most that are tried at other sizes, for their memory


def prepare(
    model: Model,
    device: Device,
    policy: PrecisionPolicy | str | Mapping[str, Any] = "auto",
    backend: str = "auto",
    threads: int | None = None,
    *,
    rows: int = 16,
    most: int | None = None,
    example: Mapping[str, Tensor] | None = None,
    room: int | None = None,
    smaller: Callable[[Executable], Executable | None] | None = None,
    alone: str | None = None,
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
        backend: a name, or ``"auto"``: the fastest of those that are automatic, one for each
            range of rows; what cannot be compiled within 15 s is left out. Where the reference
            cannot be tried within 8 s it is taken as it is, and its report says ``untried``.
        threads: CPU threads; ``None`` as torch has it.
        rows: rows of the comparison with the reference, fewer where they would take seconds.
        most: rows of the largest batch that is planned for; ``None``: ``rows``.
        example: valid rows (n, ...) by input name, where made-up ones would not do.
        room: bytes that compiling may take at its peak; ``"auto"`` leaves out what takes more.
        smaller: makes what takes less memory of the reference, before anything runs.
        alone: why ``"auto"`` takes the reference as it is, without making rows to try it on.

    Raises:
        ConfigError: unknown or impossible backend or precision, with the reason.
        InputError: the example rows are not what the spec says.
        ModelError: nothing can run the model, or it mixes the rows of a batch.
        OutOfMemory: the backend that is named would take more than ``room`` to compile.
    """
    wanted = resolve(policy)
    kind = registry.find("onnxruntime" if model.onnx else "eager")
    absent: dict[str, str] = {}
    if wanted.exact:
        backends = _exact(kind, backend)
    elif backend == "auto":
        backends, absent = registry.automatic()
        large = {each.name: why for each in backends if (why := _too_large(each, model, room))}
        backends = [each for each in backends if each.name not in large]
        absent |= {name: why.message for name, why in large.items()}
    else:
        backends = [registry.find(backend)]
        if (error := _too_large(backends[0], model, room)) is not None:
            raise error
    with cpu_threads(threads):
        reference = compiled(kind, model, device, PRESETS["fp32"], threads)
        if smaller is not None:
            reference = smaller(reference) or reference
        given = model.example if example is None else example
        hurried = kind in backends and (wanted.plain or wanted.auto)
        if alone is not None and hurried and backend == "auto" and given is None:
            return _untried(reference, alone)
        within = Bounded(CHECK_SECONDS if hurried else None)
        turns = Turns(reference)
        try:
            trial = within.run(lambda: _trial(model, turns, rows, given, threads), "one row")
        except ModelError as error:
            if within.late:
                _log.warning("model %s: %s", model.spec.name, _SLOW)
                return _untried(turns.given_up(within.left), _SLOW)
            if given is not None or not model.spec.free or kind not in backends or not wanted.plain:
                raise
            reference.report |= {"reason": f"not tried: {error}", "refused": {}}
            return reference
        model = replace(model, example=trial.inputs)
        asked = _Asked(model, reference, backends, wanted, backend, max(most or rows, 1), trial)
        executable = _planned(asked, absent)
    _warn(executable, trial)
    return executable


def _too_large(backend: Backend, model: Model, room: int | None) -> OutOfMemory | None:
    """Why compiling does not fit; ``None`` if it does."""
    if room is None or (needed := _peak_of(backend, model)) <= room:
        return None
    return OutOfMemory(
        f"compiling {model.spec.name} with {backend.name} takes about {needed} bytes at its peak, "
        f"{room} are left in the memory budget",
        needed=needed,
        available=room,
        hint="raise memory_budget, or use backend eager",
    )


def compile_peak(model: Model, backend: str) -> int:
    """Bytes that making a model ready takes at its peak, about, beside the model itself.

    Args:
        model: the model.
        backend: a name, or ``"auto"``: the most that one of its backends takes.
    """
    some = registry.automatic()[0] if backend == "auto" else [registry.find(backend)]
    return max((_peak_of(each, model) for each in some), default=0)


def _peak_of(backend: Backend, model: Model) -> int:
    """What a backend tells by a method ``compile_peak``; 0 where it has none."""
    tell = getattr(backend, "compile_peak", None)
    return 0 if tell is None else int(tell(model))


class Turns(Wrapped):
    """An executable whose trial may have to be given up while it runs.

    Args:
        inner: what is tried.
        lock: taken for each forward.
        before: a thread that has to have ended, and freed what it holds, before the first.
    """

    def __init__(
        self,
        inner: Executable,
        lock: threading.Lock | None = None,
        before: threading.Thread | None = None,
    ) -> None:
        super().__init__(inner)
        self._lock = lock or threading.Lock()
        self._over = False
        self._before = before

    def given_up(self, by: threading.Thread | None) -> Turns:
        """The same for others: no forward is begun here any more, the one under way is awaited.

        Args:
            by: the thread that tried it.
        """
        self._over = True
        return Turns(self.inner, self._lock, by)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        if self._before is not None:
            self._before.join()
            self._before = None
            trim()  # what the trial freed lies beside what is computed now
        with self._lock:
            self._check()
            return self.inner.run(inputs)

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        with self._lock:
            self._check()
            return self.inner.probe(inputs)

    def _check(self) -> None:
        if self._over:
            raise ModelError("nobody waits for this trial any more")


_SLOW = (
    f"one row takes more than {CHECK_SECONDS / 2:g} s, so that nothing was tried or compared; "
    "a backend that is named is, however long it takes"
)


def _untried(reference: Executable, reason: str) -> Executable:
    """The reference as it is, with the reason why nothing is compared with it."""
    reference.report |= {"reason": reason, "refused": {}, "untried": True}
    return reference


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a plan is made for."""

    model: Model
    reference: Executable
    backends: list[Backend]
    wanted: PrecisionPolicy
    backend: str
    most: int
    trial: _Trial

    @property
    def single(self) -> bool:
        """Nothing is to be chosen."""
        return len(self.backends) == 1 and not self.wanted.auto


def _planned(asked: _Asked, absent: dict[str, str]) -> Executable:
    """The plan of an earlier run as far as it still holds, else a new one."""
    threads = asked.reference.report["threads"]
    facts = (asked.wanted, asked.most, sorted(absent), asked.model.memory)
    key = planner.plan_key(asked.model, asked.reference.device, asked.backends, threads, *facts)
    known = None if asked.single else planner.recall(key)
    if known is not None:
        found, refused, _ = _candidates(asked, {stretch.label for stretch in known[0]})
        if all(stretch.label in found for stretch in known[0]):
            return _composed(asked, found, absent | refused, *known, source="as measured before")
    found, refused, late = _candidates(asked)
    refused = absent | refused
    if not found:
        device, name = asked.reference.device, asked.model.spec.name
        reasons = "; ".join(f"{label}: {why}" for label, why in refused.items())
        chosen = asked.backend != "auto" or not asked.wanted.auto
        kind_of_error = ConfigError if chosen else ModelError
        raise kind_of_error(f"model {name} cannot run on {device}: {reasons}")
    if len(found) == 1:
        return _composed(asked, found, refused, [Stretch(1, next(iter(found)))], {})
    stopwatch = _Stopwatch(asked, found)
    stretches = planner.ranges(list(found), stopwatch.times, asked.most, stopwatch.reference)
    if not late:
        planner.remember(key, stretches, stopwatch.seconds)
    refused |= stopwatch.dropped
    return _composed(asked, found, refused, stretches, stopwatch.seconds)


def _composed(
    asked: _Asked,
    found: dict[str, Executable],
    refused: dict[str, str],
    stretches: list[Stretch],
    seconds: planner.Seconds,
    *,
    source: str = "measured",
) -> Executable:
    """One executable of a plan, with the report of how it came about."""
    parts = [(stretch.first, found[stretch.label]) for stretch in stretches]
    executable = parts[0][1] if len(stretches) == 1 else Planned(parts)
    only = "as asked for" if asked.single else "nothing else can run it"
    executable.report |= {
        "requested": {"backend": asked.backend, "precision": asked.wanted.name},
        "resolved": {"backend": executable.backend, "precision": executable.precision},
        "reason": _reason(stretches, seconds, asked.wanted) if seconds else only,
        "plan": [{"from_rows": each.first, "runs": each.label} for each in stretches],
        "plan_source": source,
        "probe_rows": len(next(iter(asked.trial.inputs.values()))),
        "example": asked.trial.source,
        "probe_seconds": seconds,
        "refused": refused,
    }
    return executable


def _reason(stretches: list[Stretch], seconds: planner.Seconds, wanted: PrecisionPolicy) -> str:
    plan = ", ".join(f"{each.label} from {each.first} rows on" for each in stretches)
    rows = min(seconds, key=lambda count: abs(count - 16))
    times = ", ".join(f"{label} {value * 1e6:.0f} us" for label, value in seconds[rows].items())
    gain = f"; bf16 must be {planner.GAIN} times as fast as fp32" if wanted.auto else ""
    return f"fastest: {plan}; at {rows} rows: {times}{gain}"


class _Stopwatch:
    """Times candidates in turn, and holds them against the reference at each number of rows."""

    def __init__(self, asked: _Asked, found: dict[str, Executable]) -> None:
        self.seconds: planner.Seconds = {}
        self.dropped: dict[str, str] = {}
        self._asked = asked
        self._found = found
        self._until = time.perf_counter() + PLAN_SECONDS
        same = (label for label, each in found.items() if each is asked.reference)
        self.reference = next(same, None)

    def times(self, rows: int) -> list[float] | None:
        """See :data:`planner.Times`."""
        if rows not in self.seconds:
            if self.seconds and not self._affordable(rows):
                return None
            self.seconds[rows] = self._measure(rows)
        return [self.seconds[rows].get(label, float("inf")) for label in self._found]

    def _affordable(self, rows: int) -> bool:
        """Whether there is time; candidates that are far behind are left out if there is then."""
        last = max(count for count in self.seconds)
        known = {
            label: value
            for label, value in self.seconds[last].items()
            if label not in self.dropped and value < float("inf")
        }
        most = (self._until - time.perf_counter()) / (2 * max(1.0, rows / last))
        if max(known.values()) * len(self._found) < most:
            return True
        best = min(known.values())
        kept = [value for value in known.values() if value <= HOPELESS * best]
        if len(kept) == len(known) or max(kept) * len(kept) >= most:
            return False
        for label, value in known.items():
            if value > HOPELESS * best:
                self.dropped[label] = (
                    f"{value / best:.0f} times as slow as the fastest at {last} rows"
                )
        return True

    def _measure(self, rows: int) -> dict[str, float]:
        """Interleaved, the least time of each: what else the machine does hits all alike.

        What takes seconds is not run again: one run tells enough.
        """
        slow = self._asked.reference.report.get("row_seconds", 0.0)
        if slow > SLOW_SECONDS and rows == 1:
            once = {
                label: each.report.get("row_seconds", slow) for label, each in self._found.items()
            }
            if time.perf_counter() + 2 * sum(once.values()) > self._until:
                return once
        inputs = self._asked.model.rows(rows)
        times: dict[str, list[float]] = {}
        for label, executable in self._found.items():
            if label not in self.dropped and self._agrees(label, executable, inputs):
                times[label] = []
        until = time.perf_counter() + PROBE_SECONDS * len(times)
        for turn in range(PROBE_ROUNDS):
            for label, taken in times.items():
                begun = time.perf_counter()
                _run(self._found[label], inputs)
                taken.append(time.perf_counter() - begun)
                if self._asked.model.memory is not None:
                    self._found[label].release()
            slow = max(min(taken) for taken in times.values()) > PROBE_SECONDS
            # Once may be a delay of the machine's; twice is the model's own.
            if time.perf_counter() > until and (turn >= 2 or (turn == 1 and slow)):
                break
        return {label: min(taken) for label, taken in times.items()}

    def _agrees(self, label: str, executable: Executable, inputs: Mapping[str, Tensor]) -> bool:
        """Whether a candidate gives at this number of rows what it gave when it was compared."""
        if executable is self._asked.reference:
            return True
        try:
            outputs = _run(executable, inputs)
            want = self._want(inputs)
            worst = max(difference(outputs[name], each) for name, each in want.items())
            if worst <= executable.report["allowed"]:
                return True
            reason = f"off the reference by {worst:.3g} at {len(next(iter(inputs.values())))} rows"
        except PlinthError as error:
            reason = error.message
        self.dropped[label] = reason
        return False

    def _want(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the reference makes of rows that are those of the trial in turn."""
        given = len(next(iter(self._asked.trial.inputs.values())))
        turn = torch.arange(len(next(iter(inputs.values())))) % given
        return {name: each.cpu()[turn] for name, each in self._asked.trial.outputs.items()}


@dataclass(frozen=True, slots=True)
class _Trial:
    """Example rows, what the reference makes of them, and where they are from."""

    model: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    alone: Mapping[str, Tensor]
    """Outputs of the first row run by itself."""
    source: str
    nan: float
    """Share of the reference's outputs that are not a number."""
    others: tuple[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]], ...]
    """What else a row may be, in words, such a row, and what the reference makes of it."""


def _trial(
    model: Model,
    reference: Executable,
    rows: int,
    given: Mapping[str, Tensor] | None,
    threads: int | None,
) -> _Trial:
    """As :func:`_tried`, in a thread of its own."""
    with cpu_threads(threads):
        return _tried(model, reference, rows, given)


def _tried(
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
            seconds /= reference.report.pop("probe_runs", 1)
            if seconds < AGAIN_SECONDS:  # the first run may have been slow for once
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
        if seconds > SLOW_SECONDS:
            reference.report["row_seconds"] = seconds
        others = (*_elsewhere(model, reference, one, seconds), *_missing(reference, one, seconds))
        nan = _nan_share(outputs)
        return _Trial(model.spec.name, inputs, outputs, alone, source, nan, others)
    raise failed or ModelError(f"model {model.spec.name} has no example rows")


def _elsewhere(
    model: Model, reference: Executable, one: Mapping[str, Tensor], seconds: float
) -> Iterator[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """A row at other sizes, where some are free, and what the reference makes of it.

    Args:
        model: the model.
        reference: what runs it.
        one: a row that it takes.
        seconds: that this took. What would take too long is left out, and what it refuses.
    """
    for rows in other_sizes(model.spec, one, min(TRIAL_SECONDS / seconds, GROWTH)):
        try:
            yield sizes_of(rows), rows, _run(reference, rows)
        except ModelError as error:
            _log.debug("model %s takes no %s: %s", model.spec.name, sizes_of(rows), error)


def _missing(
    reference: Executable, one: Mapping[str, Tensor], seconds: float
) -> Iterator[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """A row of NaN, where the reference has numbers for that: such a model knows missing values."""
    floats = {name for name, tensor in one.items() if tensor.is_floating_point()}
    if not floats or seconds > TRIAL_SECONDS / 2:
        return
    rows = {n: torch.full_like(t, torch.nan) if n in floats else t for n, t in one.items()}
    try:
        found = _run(reference, rows)
    except ModelError as error:
        _log.debug("the reference takes no NaN: %s", error)
        return
    numbers = [tensor.cpu() for tensor in found.values() if tensor.is_floating_point()]
    if numbers and all(bool(tensor.isfinite().all()) for tensor in numbers):
        yield "NaN", rows, found


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
    # A sum of booleans would make a tensor of 64-bit integers first.
    found = sum(int(tensor.isnan().count_nonzero()) for tensor in floats)
    return found / total if total else 0.0


def _candidates(
    asked: _Asked, only: set[str] | None = None
) -> tuple[dict[str, Executable], dict[str, str], bool]:
    """What can run the model and agrees with the reference, by label; the others with the reason.

    Also whether one was left out because it took too long.

    Raises:
        PlinthError: the only candidate's own.
    """
    refused: dict[str, str] = {}
    found: dict[str, Executable] = {}
    reference = asked.reference
    precisions = _precisions(asked.wanted, reference.device, refused)
    bounded = Bounded(COMPILE_SECONDS)
    hurried = len(asked.backends) > 1 and (asked.wanted.plain or asked.wanted.auto)
    checks = Bounded(CHECK_SECONDS if hurried else None)
    for chosen in asked.backends:
        for precision in precisions:
            label = f"{chosen.name}/{precision.name}"
            if chosen.name == reference.backend and precision.plain:
                reference.report["difference"] = 0.0
                found[f"{chosen.name}/fp32"] = reference
            elif only is None or label in only:
                try:
                    found[label] = _candidate(asked, chosen, precision, bounded, checks)
                except PlinthError as error:
                    refused[label] = error.message
                    if asked.single:
                        raise
    return found, refused, bounded.late or checks.late


def _candidate(
    asked: _Asked, backend: Backend, policy: PrecisionPolicy, bounded: Bounded, checks: Bounded
) -> Executable:
    """A candidate that agrees with the reference; compiled within the bound if there are others.

    Raises:
        PlinthError: it cannot be compiled, is late, or does not agree.
    """
    device, threads = asked.reference.device, asked.reference.report["threads"]
    other = None if asked.single or backend.name == "eager" else _apart(asked.model)
    if not asked.single:
        half = 2 if "bf16" in policy.used else 1
        bounded.run(
            lambda: _check_memory(backend, asked.model, half), f"{backend.name}/{policy.name}"
        )
    if other is None:
        executable = compiled(backend, asked.model, device, policy, threads)
    else:
        executable = bounded.run(
            lambda: compiled(backend, other, device, policy, threads),
            f"{backend.name}/{policy.name}",
        )
    checks.run(
        lambda: _gate(executable, policy, asked.trial, threads), f"{backend.name}/{policy.name}"
    )
    if asked.model.memory is not None:  # what it keeps for its next run is not held beside others
        executable.release()
    return executable


def _check_memory(backend: Backend, model: Model, share: int) -> None:
    """Leave out what is foreseen to take more than the model may: it is not even tried.

    Args:
        backend: which.
        model: the model.
        share: of float32 that its numbers take: 1, or 2 for a half.

    Raises:
        OutOfMemory: names the bytes.
    """
    tell = getattr(backend, "run_peak", None)
    if model.memory is None or tell is None:
        return
    found = tell(model)
    needed = 0 if found is None else found // share
    if needed > model.memory:
        raise OutOfMemory(
            f"a row takes about {needed} bytes at its peak, {model.spec.name} may take "
            f"{model.memory}",
            needed=needed,
            available=model.memory,
            hint=f"allow it more memory, or name it: backend={backend.name!r}",
        )


def _apart(model: Model) -> Model | None:
    """The model with a module of its own that shares all tensors; ``None`` if it has no copy.

    An exporter puts other tensors into the module that it traces: while one goes on in the
    background, nobody else may run that module.
    """
    try:
        return replace(model, module=sharing_copy(model.module))
    except (TypeError, RuntimeError, AttributeError):
        return None


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


def _gate(
    executable: Executable, policy: PrecisionPolicy, trial: _Trial, threads: int | None
) -> None:
    with cpu_threads(threads):
        _hold(executable, policy, trial)


def _hold(executable: Executable, policy: PrecisionPolicy, trial: _Trial) -> None:
    if trial.nan == 1:
        raise ModelError(
            "the reference gives nothing but NaN on the example rows, so that nothing can be "
            "compared",
            hint="give valid rows: add(..., example={...})",
        )
    begun = time.perf_counter()
    outputs = _probe(executable, trial.inputs)
    if len(next(iter(trial.inputs.values()))) > 1:
        one = {name: tensor[:1] for name, tensor in trial.inputs.items()}
        alone = _run(executable, one)
    else:
        alone = outputs
        seconds = time.perf_counter() - begun
        executable.report["row_seconds"] = seconds / executable.report.pop("probe_runs", 1)
    allowed = max(TOLERANCE[each] for each in policy.used | {"fp32"})
    worst = max(difference(outputs[name], want) for name, want in trial.outputs.items())
    worst = max(worst, *(difference(alone[name], want) for name, want in trial.alone.items()))
    executable.report |= {"difference": worst, "allowed": allowed}
    if not worst <= allowed:
        raise ModelError(
            f"{executable.backend} in {executable.precision} is off the reference by {worst:.3g}, "
            f"allowed is {allowed:g}",
            hint="use backend eager and precision fp32",
        )
    for what, rows, want in trial.others:
        _hold_elsewhere(executable, what, rows, want, allowed)


def _hold_elsewhere(
    executable: Executable,
    what: str,
    rows: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    allowed: float,
) -> None:
    """Hold an executable against the reference on a row of other sizes, or of NaN."""
    label = f"{executable.backend} in {executable.precision}"
    hint = "use backend eager, or fix sizes that are free in the spec"
    try:
        found = _run(executable, rows)
    except PlinthError as error:
        told = f"{label} fails at {what}, which the reference takes: {error.message}"
        raise ModelError(told, hint=hint) from error
    worst = max(difference(found[name], each) for name, each in want.items())
    if not worst <= allowed:
        raise ModelError(
            f"{label} is off the reference by {worst:.3g} at {what}, allowed is {allowed:g}",
            hint=hint,
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
    worst = scale = 0.0
    pieces = (torch.split(each.detach().reshape(-1), _COMPARED_AT_ONCE) for each in (got, want))
    for ours, theirs in zip(*pieces, strict=True):
        piece = _apart_by(ours.double().cpu(), theirs.double().cpu())
        worst, scale = max(worst, piece[0]), max(scale, piece[1])
    return worst / max(scale, 1e-12)


def _apart_by(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference, inf as in :func:`difference`, and magnitude of finite numbers."""
    finite = theirs.isfinite()
    same = torch.where(finite, ours.isfinite(), (ours == theirs) | (ours.isnan() & theirs.isnan()))
    if not bool(same.all()):
        return float("inf"), 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    ours, theirs = ours[finite], theirs[finite]
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _warn(executable: Executable, trial: _Trial) -> None:
    """Say in the report and the log that NaN proves nothing."""
    if trial.nan:
        warning = f"{trial.nan:.0%} of the outputs are NaN on the example rows ({trial.source})"
        executable.report["warning"] = warning
        _log.warning(
            "model %s: %s; they could not be compared between backends", trial.model, warning
        )
