"""Contracts derived from modules and rows, and proof that rows do not mix in a batch."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from plinth.engine.errors import InputError, ModelError, nearest
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.spec import DTYPES, ModelSpec, TensorSpec

ROWS = 4
"""Rows that a model is tried on, alone and together."""
MIXING = 1e-3
"""How far a row's answers may be apart alone and in a batch, relative to the largest output."""

Rows = dict[str, Tensor]
Run = Callable[[Rows], Mapping[str, Any]]
Example = Any
"""A tensor, a sequence of tensors in the order of ``forward``, or tensors by input name."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a contract cannot show by itself; see :meth:`plinth.engine.Model.from_torch`."""

    name: str | None = None
    version: str = "1"
    other: Example = None
    free: Mapping[str, Sequence[int]] = field(default_factory=dict)
    outputs: Sequence[str] | None = None
    rows_dim: Mapping[str, int] = field(default_factory=dict)
    description: str = ""
    licence: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Derived:
    """A contract, the module in eval mode that keeps it, and rows (n, ...) by input name."""

    spec: ModelSpec
    module: nn.Module
    example: Rows


def derive(module: nn.Module, example: Example, wishes: Wishes) -> Derived:
    """Read the contract of a module off example rows.

    Raises:
        ModelError: the example does not fit ``forward``, an output has no row for each input
            row, rows mix, or answers are random.
    """
    name = _proposal(type(module).__name__) if wishes.name is None else _name(wishes.name)
    copied = _in_eval_mode(module, name)
    rows = _by_name(module, example, name, wishes.rows_dim)
    other = _other(module, rows, wishes, name)
    if any(wishes.rows_dim.values()):
        copied = RowsFirst(copied, wishes.rows_dim, tuple(wishes.outputs or ()))
    inputs = tuple(_input(key, tensor, other[key]) for key, tensor in rows.items())
    with _looked_up(copied, rows) as bounds:
        named = _read_outputs(name, _called(copied, name, inputs, rows), wishes.outputs)
    for key in (*wishes.free, *wishes.rows_dim):
        known = [*rows] if key in wishes.free else [*rows, *named]
        if key not in known:
            raise ModelError(f"model {name} has no tensor {key}", hint=nearest(key, known))
    inputs = tuple(t.model_copy(update={"bounds": bounds.get(t.name)}) for t in inputs)

    def run(given: Rows) -> Mapping[str, Any]:
        return _read_outputs(name, _called(copied, name, inputs, given), tuple(named))

    answers = check_rows(run, rows, name)
    others = run(other)
    spec = contract(
        name=name,
        version=wishes.version,
        inputs=inputs,
        outputs=tuple(_output(key, answers[key], others[key]) for key in named),
        description=wishes.description,
        licence=wishes.licence,
        source=wishes.source,
    )
    return Derived(spec, copied, rows)


def contract(**fields: Any) -> ModelSpec:
    """A spec, or a ModelError that names the first field that is wrong."""
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"model {fields.get('name')}: {where}: {first['msg']}",
            hint="names and versions are made of a-z, 0-9, dot, _ and -",
        ) from None


def check_rows(run: Run, rows: Rows, name: str) -> dict[str, Tensor]:
    """See that each row has its own answer, the same alone and beside others.

    Args:
        run: rows (n, ...) by input name -> tensors by output name.
        rows: valid rows; where there is but one, others are made up beside it.
        name: the model's, for errors.

    Returns:
        The answers to the rows, together.

    Raises:
        ModelError: an output has not one row for each input row, rows mix, or answers are
            random; says which.
    """
    tried = _several(run, rows)
    count = len(next(iter(tried.values())))
    together = _checked(run(tried), count, name)
    again = _checked(run(tried), count, name)
    for key, tensor in together.items():
        if apart(again[key], tensor) > 0:
            raise ModelError(
                f"model {name}: output {key} is another each time for the same rows",
                hint="answers must not be random: leave dropout and sampling out of forward",
            )
    for row in range(count):
        alone = _checked(run(row_of(tried, row)), 1, name)
        for key, tensor in together.items():
            off = apart(alone[key], tensor[row : row + 1], largest(tensor))
            if off > MIXING:
                raise ModelError(
                    f"model {name} mixes the rows of a batch: output {key} of row {row} alone "
                    f"and beside {count - 1} others is off by {off:.3g}",
                    hint="rows are the first dimension of every tensor: for sequence-first "
                    "models name where they are, rows_dim={...}; leave out what is computed "
                    "over the batch",
                )
    return together


def given_rows(name: str, inputs: Iterable[TensorSpec], example: Rows | None) -> Rows | None:
    """Example rows held against the inputs; the only array of a ``.npy`` goes to the only input.

    Raises:
        ModelError: names, sizes or dtypes differ; says which.
    """
    if example is None:
        return None
    specs = tuple(inputs)
    if set(example) == {""} and len(specs) == 1:
        example = {specs[0].name: example[""]}
    stand_in = ModelSpec(name=name, inputs=specs, outputs=(TensorSpec(name="any", shape=()),))
    try:
        stand_in.check(example)
    except InputError as error:
        raise ModelError(f"the example does not fit: {error.message}", hint=error.hint) from error
    if not len(next(iter(example.values()))):
        raise ModelError(f"model {name}: the example has no rows")
    return example


def row_of(rows: Rows, row: int) -> Rows:
    """One row, still with a dimension of rows."""
    return {key: tensor[row : row + 1] for key, tensor in rows.items()}


def largest(tensor: Tensor) -> float:
    """The largest finite magnitude, or 1 where there is none above 0."""
    wide = tensor.double().abs()
    finite = wide[wide.isfinite()]
    return (float(finite.max()) if finite.numel() else 0.0) or 1.0


def apart(got: Tensor, want: Tensor, scale: float | None = None) -> float:
    """The largest difference, relative to ``scale``: else the largest magnitude of ``want``.

    Infinite for other shapes or dtypes, and where NaN or infinities stand at other places.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.numel():
        return 0.0
    ours, theirs = got.double(), want.double()
    finite = theirs.isfinite()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | (finite & ours.isfinite())
    if not bool(same.all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((ours - theirs)[finite].abs().max()) / (scale or largest(want))


class RowsFirst(nn.Module):
    """A module whose rows lie in other dimensions, as one whose rows come first.

    Args:
        module: what runs.
        dims: the dimension of rows by input and output name; others have it first.
        outputs: names of the outputs, in order.
    """

    def __init__(
        self, module: nn.Module, dims: Mapping[str, int], outputs: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.module = module
        self.dims = dict(dims)
        self.outputs = outputs

    def forward(self, **rows: Tensor) -> Any:
        """Rows (n, ...) by input name; what the module gives, with rows first."""
        given = {k: t.movedim(0, self.dims.get(k, 0)) for k, t in rows.items()}
        only = next(iter(given.values()))
        by_name = _parameters(self.module).keys() >= given.keys()
        found = self.module(**given) if by_name else self.module(only)
        named = _named("model", found, self.outputs or _output_names(found))
        return {key: part.movedim(self.dims.get(key, 0), 0) for key, part in named.items()}


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (ValueError, TypeError):
        return {}


def _name(wanted: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", wanted):
        return wanted
    raise ModelError(
        f"{wanted!r} is not a model name",
        hint=f"use a-z, 0-9, dot, _ and -, such as {_proposal(wanted)!r}",
    )


def _proposal(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:64] or "model"


def _in_eval_mode(module: nn.Module, name: str) -> nn.Module:
    """A copy of its own: training goes on without what is served."""
    try:
        return copy.deepcopy(module).eval().cpu()
    except Exception as error:  # whatever __deepcopy__ raises
        raise ModelError(
            f"model {name} cannot be copied: {_first_line(error)}",
            hint="describe it with a ModelSpec, and give Model(spec, module.eval())",
        ) from error


def _by_name(module: nn.Module, example: Example, name: str, rows_dim: Mapping[str, int]) -> Rows:
    """Example rows by input name, rows first, on the host."""
    if isinstance(example, Mapping):
        given = dict(example)
    else:
        values = list(example) if isinstance(example, tuple | list) else [example]
        given = dict(zip(_places(module, len(values), name), values, strict=True))
    found = {str(k): _tensor(name, str(k), v) for k, v in given.items() if v is not None}
    if not found:
        raise ModelError(f"model {name}: the example has no tensors")
    for key, tensor in found.items():
        dim = rows_dim.get(key, 0)
        if not -tensor.ndim <= dim < tensor.ndim:
            raise ModelError(
                f"model {name}: input {key} has {tensor.ndim} dimensions, so none for rows"
                + (f" at {dim}" if dim else ""),
                hint="an example is a batch: its first dimension counts rows, example[None] "
                "makes a batch of one",
            )
        found[key] = tensor.movedim(dim, 0)
    counts = {key: len(tensor) for key, tensor in found.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ModelError(
            f"model {name}: the inputs have {counts} rows, expected one number above 0",
            hint="the first dimension of every input counts rows; where it is another, say "
            "rows_dim={input: dimension}",
        )
    return found


def _places(module: nn.Module, count: int, name: str) -> list[str]:
    """Names of the first parameters of ``forward``."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [key for key, p in _parameters(module).items() if p.kind in places]
    if count > len(names):
        raise ModelError(
            f"model {name}: the example has {count} tensors, forward names {names}",
            hint="give tensors by name, example={'x': ...}, to a forward that has these names",
        )
    return names[:count]


def _tensor(name: str, key: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise ModelError(
            f"model {name}: {key} is {type(value).__name__} in the example, expected a tensor",
            hint="wrap the module in one whose forward takes tensors alone, and fixes the rest",
        )
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in DTYPES or value.layout is not torch.strided:
        raise ModelError(f"model {name}: {key} is {kind} {value.layout}, not one of {DTYPES}")
    return value.detach().cpu().clone()


def _other(module: nn.Module, rows: Rows, wishes: Wishes, name: str) -> Rows:
    """Rows with other sizes wherever they may be free."""
    if wishes.other is not None:
        other = _by_name(module, wishes.other, name, wishes.rows_dim)
        if {k: t.ndim for k, t in other.items()} != {k: t.ndim for k, t in rows.items()}:
            raise ModelError(f"model {name}: the two examples have other inputs or dimensions")
        return other
    other = dict(rows)
    for key, dims in wishes.free.items():
        for dim in dims if key in rows else ():
            size = rows[key].shape[dim] if 0 < dim < rows[key].ndim else 0
            if not size:
                raise ModelError(
                    f"model {name}: free={{{key!r}: {dim}}} is not a dimension of "
                    f"{tuple(rows[key].shape)} beside the rows, which are dimension 0 and free"
                )
            part = other[key]
            longer = torch.cat([part, part], dim)
            other[key] = part.narrow(dim, 0, size // 2) if size > 1 else longer
    return other


def _input(key: str, tensor: Tensor, other: Tensor) -> TensorSpec:
    if tensor.dtype != other.dtype:
        raise ModelError(
            f"input {key} is {tensor.dtype} in one example, {other.dtype} in the other"
        )
    return TensorSpec(name=key, shape=_sizes(tensor, other), dtype=_dtype(tensor))


def _output(key: str, tensor: Tensor, other: Tensor) -> TensorSpec:
    return TensorSpec(name=key, shape=_sizes(tensor, other), dtype=_dtype(tensor))


def _sizes(tensor: Tensor, other: Tensor) -> tuple[int | None, ...]:
    pairs = zip(tensor.shape[1:], other.shape[1:], strict=True)
    return tuple(size if size == also else None for size, also in pairs)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _called(module: nn.Module, name: str, inputs: Iterable[TensorSpec], rows: Rows) -> Any:
    """What forward gives; the rows may be written to, so it gets copies."""
    stand_in = ModelSpec(
        name=name, inputs=tuple(inputs), outputs=(TensorSpec(name="any", shape=()),)
    )
    binding = Binding(stand_in, module)
    try:
        with torch.inference_mode():
            return binding.call(module, {key: tensor.clone() for key, tensor in rows.items()})
    except Exception as error:  # models raise errors of any kind
        shapes = ", ".join(f"{k} {tuple(t.shape)} {_dtype(t)}" for k, t in rows.items())
        raise ModelError(
            f"model {name} fails on {shapes}: {_first_line(error)}",
            hint="dtypes and sizes are those of the example: compare them with the module's",
        ) from error


def _read_outputs(name: str, found: Any, names: Sequence[str] | None) -> dict[str, Any]:
    if names is None:
        names = _output_names(found)
    named = _named(name, found, names)
    for key, part in named.items():
        if not isinstance(part, Tensor):
            fields = getattr(found, "_fields", None) or (
                list(found) if isinstance(found, Mapping) else []
            )
            tensors = [k for k in fields if isinstance(dict(_items(found)).get(k), Tensor)]
            keep = f"keep only tensors, outputs={tensors}" if tensors else "return tensors alone"
            raise ModelError(
                f"model {name}: output {key} is {type(part).__name__}, not a tensor", hint=keep
            )
        if _dtype(part) not in DTYPES:
            raise ModelError(f"model {name}: output {key} is {_dtype(part)}, not one of {DTYPES}")
    return named


def _items(found: Any) -> Iterator[tuple[str, Any]]:
    fields = getattr(found, "_fields", None)
    yield from zip(fields, found, strict=True) if fields else found.items()


def _output_names(found: Any) -> list[str]:
    fields = getattr(found, "_fields", None)
    if fields:
        return [str(f) for f in fields]
    if isinstance(found, Mapping):
        return [str(key) for key in found]
    if isinstance(found, tuple | list):
        return [f"output_{i}" for i in range(len(found))] if len(found) > 1 else ["output"]
    return ["output"]


def _named(name: str, found: Any, names: Sequence[str]) -> dict[str, Any]:
    if not names:
        raise ModelError(f"model {name} gives no outputs")
    outputs = tuple(TensorSpec(name=key, shape=()) for key in names)
    stand_in = ModelSpec(name=name, inputs=(TensorSpec(name="any", shape=()),), outputs=outputs)
    return dict(outputs_by_name(stand_in, found))


def _several(run: Run, rows: Rows) -> Rows:
    """Up to ROWS rows that differ: those given, else made up beside the only one."""
    count = len(next(iter(rows.values())))
    if count > 1:
        return {key: tensor[:ROWS] for key, tensor in rows.items()}
    for made_up in (True, False):
        found = {key: _varied(tensor, made_up) for key, tensor in rows.items()}
        try:
            run(found)
        except ModelError:
            continue
        return found
    return {key: tensor.repeat(3, *[1] * (tensor.ndim - 1)) for key, tensor in rows.items()}


def _varied(tensor: Tensor, integers: bool) -> Tensor:
    """Three rows: the one given, and two of the same kind; integers within its own values."""
    noise = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        wide = tensor.float()
        spread = float(wide.std()) if wide.numel() > 1 else 0.0
        spread = spread or float(wide.abs().max()) or 1.0
        made = [torch.randn(wide.shape, generator=noise) * spread + wide for _ in range(2)]
        return torch.cat([tensor, *(part.to(tensor.dtype) for part in made)])
    if integers and tensor.dtype is not torch.bool and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        made = [torch.randint(low, high + 1, tensor.shape, generator=noise) for _ in range(2)]
        return torch.cat([tensor, *(part.to(tensor.dtype) for part in made)])
    return tensor.repeat(3, *[1] * (tensor.ndim - 1))


def _checked(found: Mapping[str, Any], rows: int, name: str) -> dict[str, Tensor]:
    for key, part in found.items():
        if not isinstance(part, Tensor) or part.ndim == 0 or part.shape[0] != rows:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            rest = [k for k, v in found.items() if k != key]
            raise ModelError(
                f"model {name}: output {key} is {shape} for {rows} rows, expected one row for each",
                hint=(f"leave it out, outputs={rest}, or " if rest else "")
                + "give each row an answer of its own; where rows are another dimension of it, "
                "say rows_dim={...}",
            )
    return dict(found)


@contextmanager
def _looked_up(module: nn.Module, rows: Rows) -> Iterator[dict[str, tuple[float, float]]]:
    """Inside the block: bounds of the inputs that go into an embedding as they are."""
    found: dict[str, tuple[float, float]] = {}

    def look(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = next(iter((*given, *named.values())), None)
        for key, tensor in rows.items():
            if isinstance(ids, Tensor) and ids.dtype == tensor.dtype and _equal(ids, tensor):
                high = float(layer.num_embeddings) - 1  # type: ignore[arg-type]
                found[key] = (0.0, min(high, found.get(key, (0.0, high))[1]))

    handles = [
        layer.register_forward_pre_hook(look, with_kwargs=True)
        for layer in module.modules()
        if isinstance(layer, nn.Embedding)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
