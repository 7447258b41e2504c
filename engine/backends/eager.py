"""Torch as it is: the reference that every other backend is held against."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.backends.base import Availability, named
from plinth.engine.compression.packed_layers import has_packed, unpack_layers
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.mapped import mappings
from plinth.engine.models.binding import Binding
from plinth.engine.models.families.slabs import may_spare, sparing
from plinth.engine.models.program import ProgramModule
from plinth.engine.models.store import Model
from plinth.engine.precision.policy import PrecisionPolicy
from plinth.engine.precision.programs import with_layers
from plinth.engine.precision.registry import missing
from plinth.engine.precision.transforms import (
    apply,
    flops_by_precision,
    last_layers,
    report,
    sharing_copy,
    whole_copy,
)

_log = logging.getLogger(__name__)

SLOW_SECONDS = 4.0
"""Of a run, from which a probe does without a second one."""
_OURS = 2  # holders of an output's memory: the output, and its storage as it is asked


class TorchExecutable:
    """A torch callable on a device; see :class:`plinth.engine.backends.base.Executable`.

    Args:
        backend: the name of the backend.
        model: the contract, and whose ``forward`` says how inputs are named.
        module: the module in its precisions on the device.
        device: where it lies.
        precision: what it really runs.
        compiled: what is called in the module's place.

    Attributes:
        module: what runs, with the weights it really uses.
    """

    def __init__(
        self,
        backend: str,
        model: Model,
        module: nn.Module,
        device: Device,
        precision: str = "fp32",
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        self.backend = backend
        self.precision = precision
        self.device = device
        self.weights = stored_bytes(module)
        self.report: dict[str, Any] = {"threads": torch.get_num_threads()}
        self._spec = model.spec
        self.module = module
        self._compiled = module if compiled is None else compiled
        self._binding = Binding(model.spec, model.module)
        self._copies_inputs = True
        self._files = tuple(mappings(held_tensors(module)))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows; they may lie on the host or on the device, and come back on the device.

        Raises:
            ModelError: the module is in training mode, loses rows, or wrote into its input; or
                somebody wrote into the file that its weights lie in.
        """
        for file in self._files:
            file.check()
        if self.module.training:
            raise ModelError(
                f"model {self._spec.name} was put into training mode while it is served",
                hint="train a copy",
            )
        with torch.inference_mode():
            given = self._given(inputs)
            before = _versions(given)
            output = named(
                self._spec, self._binding.call(self._compiled, given), len(_first(given))
            )
            _disown(output)
        for file in self._files:  # it may have been written to meanwhile
            file.check()
        if not self._copies_inputs and before != _versions(given):
            self._copies_inputs = True
            raise ModelError(
                f"model {self._spec.name} wrote into its input, which it did not do on the "
                "example rows; from now on it gets a copy",
                hint="send the rows again, and give example rows that show it",
            )
        return output

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`plinth.engine.backends.base.Executable`.

        A module that writes into its input gets copies of all rows from now on. Runs twice, unless
        that takes seconds: the first run may be slow for once.
        """
        self._copies_inputs = True
        watched = self._copied(inputs)
        before, count = _versions(watched), len(_first(watched))
        with torch.inference_mode():
            begun = time.perf_counter()
            output = named(self._spec, self._binding.call(self._compiled, watched), count)
            self.report["probe_runs"] = 1
            self._copies_inputs = before != _versions(watched)
            if time.perf_counter() - begun > SLOW_SECONDS:
                return output
            again = self._copied(inputs) if self._copies_inputs else watched
            named(self._spec, self._binding.call(self._compiled, again), count)
        self.report["probe_runs"] = 2
        return output

    def lend_inputs(self) -> None:
        """Give the module rows as they come: it was foreseen not to write into them."""
        self._copies_inputs = False

    def _copied(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of its own, on its device."""
        return {name: tensor.to(self.device.torch, copy=True) for name, tensor in inputs.items()}

    def another(self) -> TorchExecutable | None:
        """One more for another thread, see ``base.another``: a copy that shares all tensors.

        A module may put what it computes into attributes of its own.
        """
        if self._compiled is not self.module:
            return None
        try:
            shared = {id(tensor): tensor for tensor in held_tensors(self.module)}
            module = whole_copy(self.module, shared)
        except (TypeError, RuntimeError, AttributeError) as error:
            _log.warning("model %s has one lane at a time: %s", self._spec.name, error)
            return None
        return self.over(module)

    @property
    def is_plain(self) -> bool:
        """Whether its module runs as it is, in float32, on the host."""
        plain = self._compiled is self.module and self.precision == "fp32"
        return plain and self.device.kind == "cpu"

    def over(self, module: nn.Module) -> TorchExecutable:
        """The same with a module that computes the same in the place of its own."""
        other = copy.copy(self)
        other.module = other._compiled = module
        other.report = dict(self.report)
        return other

    def release(self) -> bool:
        """Nothing is kept between runs."""
        return False

    def is_native(self, rows: int) -> bool:
        """A module's forward may do anything."""
        return False

    def _given(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.device.kind != "cpu":
            target = self.device.torch
            return {name: tensor.to(target, non_blocking=True) for name, tensor in inputs.items()}
        if self._copies_inputs:
            return {name: tensor.clone() for name, tensor in inputs.items()}
        return dict(inputs)


def _first(rows: Mapping[str, Tensor]) -> Tensor:
    return next(iter(rows.values()))


def _versions(rows: Mapping[str, Tensor]) -> list[int]:
    """How often each tensor was written to; those made in inference mode do not count it."""
    return [tensor._version for tensor in rows.values() if not tensor.is_inference()]


def _disown(output: dict[str, Tensor]) -> None:
    """Copy those of some outputs, in place, whose memory somebody else holds too.

    Of the others, which torch allocated for a forward and nobody has any more, no copy is made.
    """
    for name in output:
        output[name] = output[name].detach()  # the last that we hold of what the model gave
        storage = output[name].untyped_storage()
        count: int = torch._C._storage_Use_Count(storage._cdata)
        if count > _OURS or not storage.resizable():  # NumPy's memory, say, is not resizable
            output[name] = output[name].clone()


def held_tensors(module: nn.Module) -> Iterable[Tensor]:
    """All tensors a module holds, those in plain attributes included."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; tied tensors and views count once."""
    storages = (tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers()))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Eager:
    """Runs the module as torch does, layer by layer, in the precision of each layer."""

    name = "eager"
    automatic = True

    def available(self) -> Availability:
        """torch's version."""
        return Availability(torch.__version__)

    def supports(self, model: Model, device: Device, policy: PrecisionPolicy) -> str | None:
        """Torch modules in the precisions that torch has for their classes."""
        if model.onnx:
            return "the model is an ONNX file, not a torch module"
        return missing("torch", policy)

    def compile(
        self, model: Model, device: Device, policy: PrecisionPolicy, threads: int | None
    ) -> TorchExecutable:
        """Put the module, in its precisions, on the device."""
        return realised(self.name, model, device, policy)


def realised(
    backend: str,
    model: Model,
    device: Device,
    policy: PrecisionPolicy,
    compiled: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> TorchExecutable:
    """An executable of the module in the policy's precisions, which says what really runs.

    Args:
        backend: the name it goes by.
        model: the model.
        device: where.
        policy: what to compute in what.
        compiled: makes of the placed module what is called in its place.
    """
    module = in_eval_mode(model)
    if policy.plain and compiled is None and device.kind == "cpu" and may_spare(module):
        module = _spared(model, module)
    if not policy.plain:
        module = unpacked_copy(module)
    if isinstance(module, ProgramModule) and not policy.plain:
        module = with_layers(sharing_copy(module))
    last = None if policy.plain else _run_last(model, module)
    placed = apply(module, policy, last)
    precision = "fp32" if placed is module else policy.name
    if device.kind != "cpu" and any(True for _ in held_tensors(placed)):
        placed = whole_copy(placed).to(device.torch)  # to() would move the model's own
    executable = TorchExecutable(
        backend, model, placed, device, precision, compiled(placed) if compiled else None
    )
    executable.report["layers"] = {r.name: r.precision for r in report(module, policy, last)}
    if precision != "fp32":
        executable.report["flops"] = _flops(model, placed, device)
    return executable


def _spared(model: Model, module: nn.Module) -> nn.Module:
    """A copy that shares its weights, whose graphs hold less at their peak."""
    try:
        copied = sharing_copy(module)
    except (TypeError, RuntimeError, AttributeError) as error:
        _log.debug("model %s takes the memory of its graph as it is: %s", model.spec.name, error)
        return module
    sparing(copied)
    return copied


def unpacked_copy(module: nn.Module) -> nn.Module:
    """The module, or a copy whose packed layers have plain weights."""
    return unpack_layers(sharing_copy(module)) if has_packed(module) else module


def in_eval_mode(model: Model) -> nn.Module:
    """The model's module, or a copy in eval mode that shares its weights.

    One that cannot be copied, because it holds a lock say, is put into eval mode itself.
    """
    module = model.module
    if not any(part.training for part in module.modules()):
        return module
    try:
        return sharing_copy(module).eval()
    except (TypeError, RuntimeError, AttributeError) as error:
        _log.warning("model %s was put into eval mode: %s", model.spec.name, error)
        return module.eval()


def _run_last(model: Model, module: nn.Module) -> frozenset[str] | None:
    """The layers that run last on example rows; ``None`` where no rows are known to be valid."""
    try:
        with torch.inference_mode():
            return last_layers(module, lambda: _call(model, module, model.rows(1)))
    except Exception as error:  # noqa: BLE001 - rows that are not valid may raise anything
        _log.debug("model %s: %s", model.spec.name, type(error).__name__)
        return None


def _flops(model: Model, module: nn.Module, device: Device) -> dict[str, float]:
    rows = {name: tensor.to(device.torch) for name, tensor in model.rows(1).items()}
    try:
        return flops_by_precision(lambda: _call(model, module, rows))
    except Exception as error:  # noqa: BLE001 - as above
        _log.debug("model %s: %s", model.spec.name, type(error).__name__)
        return {}


def _call(model: Model, module: nn.Module, rows: Mapping[str, Tensor]) -> Any:
    own = {name: tensor.clone() for name, tensor in rows.items()}
    return Binding(model.spec, model.module).call(module, own)
