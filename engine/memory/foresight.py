"""What a forward will take, before it runs: the same forward of tensors without numbers.

A model whose inputs have free sizes cannot be measured once for all: each size takes its own. So
each is foreseen when it first comes, from the shapes alone, on a device that holds no bytes. What
is foreseen to fit shows in one run of one row what it really takes.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plinth.engine.backends.base import Executable
from plinth.engine.backends.eager import stored_bytes
from plinth.engine.errors import OutOfMemory
from plinth.engine.memory.plan import Room, peak_of
from plinth.engine.models.binding import Binding
from plinth.engine.models.store import Model

Shapes = Mapping[str, tuple[int, ...]]
MOST_SIZES = 256
"""Sizes whose plans are kept; that of the one asked for longest ago is forgotten."""
_STEPS = 8  # sizes that share a plan: between a power of two and the next
_COMPILED = 4  # times less than plain torch that what another backend compiled may take
_PLANAR = 4  # dimensions of images, with rows and channels
SEVERAL = 4
"""Times what a module takes by itself from which others are not worth their memory."""
GENEROUS = 2
"""Times what others take, as bound of a model's memory, from which they are tried all the same."""
_EASY = 4096
_EASY_TOKENS = 32768
_EASY_VOLUMES = 512
"""Bytes of memory for each of an input that a forward is taken to need at most, of floats, of
integers such as tokens, and of floats of volumes, all whose pairs no model looks at: where
so much is there, nobody looks."""
_log = logging.getLogger(__name__)


def foreseen(model: Model, shapes: Shapes) -> int | None:
    """Bytes at the peak of one forward of plain torch, without the weights.

    Args:
        model: a torch module.
        shapes: of its inputs, with the rows, by name.

    Returns:
        Inputs, outputs and all between that lives at the same time; ``None`` where it cannot be
        told, as where a forward looks at its numbers.
    """
    found = _without_numbers(model, shapes)
    return None if found is None else found[0]


def _without_numbers(model: Model, shapes: Shapes) -> tuple[int, bool] | None:
    """As :func:`foreseen`, and whether the forward leaves its inputs as they are."""
    if model.onnx is not None:
        return None
    try:
        rows = {
            each.name: torch.empty(
                shapes[each.name], dtype=getattr(torch, each.dtype), device="meta"
            )
            for each in model.spec.inputs
        }
        state = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
        weights = {name: value.detach().to("meta") for name, value in state.items()}
        living = _Living(weights.values())
        for tensor in rows.values():
            living.see(tensor)
        binding = Binding(model.spec, model.module)
        with torch.no_grad(), _Kernels(), living:
            binding.call(_With(model.module, weights), rows)
    except Exception as error:  # noqa: BLE001 - a module without numbers raises anything
        _log.debug("model %s: memory of %s is not foreseen: %s", model.spec.name, shapes, error)
        return None
    return living.most, all(tensor._version == 0 for tensor in rows.values())


@dataclass(frozen=True, slots=True)
class Leaner:
    """A module that takes much less than what would run its graph.

    Args:
        reason: why nothing else is tried, in words.
        reads_only: its forward leaves its inputs as they are.
    """

    reason: str
    reads_only: bool


def leaner(model: Model, halved: bool = False) -> Leaner | None:
    """Whether a module makes a row in parts, where others would hold several times as much.

    Such a module has a method ``forward_bytes``, which takes the sizes of its input behind rows and
    channels, and gives the bytes of a forward of one row; ``None``: it is made whole. What runs a
    graph holds whole results, as plain torch does. Looked at only where the model's memory is
    bounded, and below :data:`GENEROUS` times what a graph would take.

    Args:
        model: the model.
        halved: others may compute in half of the bytes.
    """
    tell = getattr(model.module, "forward_bytes", None)
    if tell is None or model.memory is None or model.spec.free or len(model.spec.inputs) > 1:
        return None
    (taken,) = model.spec.inputs
    sizes = tuple(size for size in taken.shape if size is not None)
    own = tell(sizes[1:])
    found = None if own is None else _without_numbers(model, {taken.name: (1, *sizes)})
    if own is None or found is None:
        return None
    others = found[0] // (2 if halved else 1)
    if others <= max(SEVERAL * own, model.memory / GENEROUS):
        return None
    reason = (
        f"the module makes a row in parts that take about {own} bytes, its graph would hold "
        f"{others} in another backend, and {model.memory} are allowed; one that is named is tried"
    )
    return Leaner(reason, found[1])


def outgrows(model: Model, budget: int) -> bool:
    """Whether a model's weights do not fit, or as foreseen one row beside them; of fixed sizes."""
    if model.onnx is not None:
        return False
    spare = budget - stored_bytes(model.module)
    if spare < 0 or model.spec.free:
        return spare < 0
    rows = model.rows(1)
    if _easy(rows) < spare:
        return False
    taken = foreseen(model, {name: (1, *tensor.shape[1:]) for name, tensor in rows.items()})
    return taken is not None and taken > spare


def _easy(rows: Mapping[str, Tensor]) -> int:
    """Bytes that any forward over some rows is taken to stay below."""
    total = 0
    for tensor in rows.values():
        floats = _EASY_VOLUMES if tensor.ndim > _PLANAR else _EASY
        total += tensor.nbytes * (floats if tensor.is_floating_point() else _EASY_TOKENS)
    return total


class _With:
    """A module called with other weights than its own."""

    def __init__(self, module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
        self._module, self._weights = module, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._module, self._weights, args, kwargs)


_LIKE = (
    *(functional.batch_norm, functional.layer_norm, functional.group_norm, functional.softmax),
    *(functional.relu, functional.leaky_relu, functional.gelu, functional.silu, functional.elu),
    *(functional.instance_norm, functional.hardswish, functional.relu6, functional.dropout),
)
"""What gives a tensor like its first: without numbers torch would compose it of parts, for which
it imports its compiler."""


class _Kernels(TorchFunctionMode):
    """Some functions as their kernels work: attention never holds the scores of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _LIKE and args:
            return args[0] if given.get("inplace") else torch.empty_like(args[0])
        if func is torch.cat and len(args[0]) > 1:
            dim = args[1] if len(args) > 1 else given.get("dim", 0)
            shape = list(args[0][0].shape)
            shape[dim] = sum(part.shape[dim] for part in args[0])
            return args[0][0].new_empty(shape)
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else given["query"]
            value = args[2] if len(args) > 2 else given["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **given)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live, but for some."""

    def __init__(self, but: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in but}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as nothing compiles here, its compiler need not be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.see(each)
        return found

    def see(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until nobody has it any more."""
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class SizePlans:
    """A memory plan for each size that a model with free sizes is asked for.

    Args:
        model: what is run.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._plans: OrderedDict[tuple[tuple[int, ...], ...], _Sized | None] = OrderedDict()
        self._lock = threading.Lock()

    def most(self, rows: Mapping[str, Tensor], room: Room, executable: Executable) -> int:
        """How many of some rows run at once beside what calls hold; all where nobody can tell.

        The first of each size that is not small shows what it takes in a run by itself.

        Args:
            rows: (n, ...) by input name.
            room: what there is.
            executable: what runs them.

        Raises:
            OutOfMemory: not even one would fit, were nothing held; names the bytes.
        """
        count = len(next(iter(rows.values())))
        there = room.limit + room.forward
        if _easy(rows) < there:
            return count
        with self._lock:
            plan = self._plan(rows)
            if plan is None:
                return count
            if not plan.measured:
                least = plan.one if executable.backend == "eager" else plan.one // _COMPILED
                if least > there:
                    raise self._refused(rows, least, there)
                one = peak_of(executable, {name: t[:1] for name, t in rows.items()})
                plan.scale_to(max(one, least))  # less, where others gave memory back meanwhile
        spare = room.free + room.forward - plan.fixed
        return max(1, min(count, spare // max(1, plan.per_row)))

    def _plan(self, rows: Mapping[str, Tensor]) -> _Sized | None:
        shapes, largest = dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
        for tensor in self._model.spec.inputs:
            shape = shapes[tensor.name] = tuple(rows[tensor.name].shape[1:])
            largest[tensor.name] = tuple(
                _rounded(size) if want is None else size
                for size, want in zip(shape, tensor.shape, strict=True)
            )
        key = tuple(largest.values())
        if key not in self._plans:
            self._plans[key] = self._foreseen(largest) or self._foreseen(shapes)
            if len(self._plans) > MOST_SIZES:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _foreseen(self, shapes: Shapes) -> _Sized | None:
        one, three = (
            foreseen(self._model, {name: (n, *shape) for name, shape in shapes.items()})
            for n in (1, 3)
        )
        if one is None or three is None:
            return None
        per_row = max(0, three - one) // 2
        return _Sized(max(0, one - per_row), per_row)

    def _refused(self, rows: Mapping[str, Tensor], needed: int, there: int) -> OutOfMemory:
        sizes = ", ".join(f"{name} {tuple(t.shape[1:])}" for name, t in rows.items())
        return OutOfMemory(
            f"model {self._model.spec.name}: a row of {sizes} takes about {needed} bytes, the "
            f"memory budget leaves {there}",
            needed=needed,
            available=there,
            hint="send a smaller one, or raise memory_budget",
        )

    def status(self) -> dict[str, Any]:
        """How many sizes have a plan, and what a row of the largest takes."""
        with self._lock:
            known = [plan for plan in self._plans.values() if plan is not None]
        return {
            "sizes": len(known),
            "largest_row_bytes": max((p.per_row for p in known), default=0),
        }


@dataclass(slots=True)
class _Sized:
    """Bytes of a forward whatever its rows, and of each row; foreseen until they are measured."""

    fixed: int
    per_row: int
    measured: bool = False

    @property
    def one(self) -> int:
        """Bytes of one row by itself."""
        return self.fixed + self.per_row

    def scale_to(self, one: int) -> None:
        """Let one row take so many bytes."""
        scale = one / max(1, self.one)
        self.fixed, self.per_row = int(scale * self.fixed), int(scale * self.per_row)
        self.measured = True


def _rounded(size: int) -> int:
    """The upper end of the sizes that share a plan: eight between two powers of two."""
    step = max(1, 1 << max(0, size.bit_length() - 1) >> (_STEPS.bit_length() - 1))
    return -(-size // step) * step
