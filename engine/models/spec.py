"""The contract of a model: what it is, takes and gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from plinth.engine.errors import InputError, ModelError
from plinth.engine.models.onnx import Contract

DTYPES = (
    *("float32", "float64", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


class TensorSpec(BaseModel):
    """One input or output of a model.

    Args:
        name: its name.
        shape: sizes of one row, without the dimension of rows; ``None`` is any size.
        dtype: name of a torch dtype, such as ``"float32"``.
        bounds: smallest and largest valid value, both included: the vocabulary of token ids,
            say. Made-up rows lie within; integers outside are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"
    bounds: tuple[float, float] | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is not one of {', '.join(DTYPES)}")
        return dtype

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] <= bounds[1]:
            raise ValueError(f"{bounds} is not (smallest, largest)")
        return bounds

    def example(self, rows: int = 1, *, free: int = 32) -> Tensor:
        """Rows (rows, *shape) to try a model with, the same each time.

        Floats are noise. Integers are ones, which are valid as token ids, lengths and masks
        alike. With ``bounds`` both are drawn from between them.

        Args:
            rows: how many.
            free: the size of dimensions of any size.
        """
        sizes = [rows, *(free if size is None else size for size in self.shape)]
        dtype: torch.dtype = getattr(torch, self.dtype)
        noise = torch.Generator().manual_seed(0)
        if self.bounds is None:
            if not dtype.is_floating_point:
                return torch.ones(sizes, dtype=dtype)
            return torch.randn(sizes, generator=noise).to(dtype)
        low, high = self.bounds
        if not dtype.is_floating_point:
            low, high = math.ceil(low), math.floor(high)
            return torch.randint(low, high + 1, sizes, generator=noise).to(dtype)
        drawn = torch.rand(sizes, generator=noise)
        return drawn.mul_(high - low).add_(low).to(dtype)  # in place: a volume may be large

    def fits(self, rows: Tensor) -> bool:
        """Whether rows (n, ...) have the shape and the dtype."""
        return rows.dtype is _TORCH_DTYPES[self.dtype] and self._is_shaped(rows)

    def is_like(self, rows: Tensor) -> bool:
        """Whether rows (n, ...) have the shape, and are floats where the dtype is one of floats."""
        floats = _TORCH_DTYPES[self.dtype].is_floating_point
        return rows.is_floating_point() == floats and self._is_shaped(rows)

    def unlike(self, found: Any, count: int) -> str | None:
        """What was given in the place of ``count`` rows of this, in words; ``None`` if they are."""
        if not isinstance(found, Tensor):
            return "nothing" if found is None else type(found).__name__
        if found.is_meta or found.layout is not torch.strided:
            return "a tensor without values" if found.is_meta else f"a tensor of {found.layout}"
        if self.is_like(found) and len(found) == count:
            return None
        return f"{tuple(found.shape)} {str(found.dtype).removeprefix('torch.')}"

    def _is_shaped(self, rows: Tensor) -> bool:
        if rows.ndim != len(self.shape) + 1:
            return False
        sizes = rows.shape[1:]
        return sizes == self.shape or all(
            want is None or want == size for want, size in zip(self.shape, sizes, strict=True)
        )

    def outside(self, rows: Tensor) -> str | None:
        """What is wrong with integers outside ``bounds``, or ``None``."""
        if self.bounds is None or rows.is_floating_point() or rows.is_meta or not rows.numel():
            return None
        low, high = rows.min().item(), rows.max().item()
        if self.bounds[0] <= low and high <= self.bounds[1]:
            return None
        return (
            f"has values from {low} to {high}, valid are {self.bounds[0]:g} to {self.bounds[1]:g}"
        )


class ModelSpec(BaseModel):
    """What a model is: its contract, origin and measured quality.

    Args:
        name: lower case, ``[a-z0-9._-]``.
        version: compared naturally, so that 1.10 follows 1.9.
        architecture: name under which its code is registered.
        config: keyword arguments of that code.
        inputs: what it takes; ``outputs``: what it gives.
        description: what it is for; ``licence``: of the weights; ``source``: where from.
        metrics: measured quality by name.
        cheaper: name of the variant that degraded work goes to.
        mask: name of the input that says where there are values (1) and where there is padding
            (0): rows of different lengths then share batches. ``None``: the input called
            ``mask`` or ``..._mask``; ``""``: there is none.
        block: rows that every forward gets, the last ones filled up: the bits of an answer then
            do not depend on the rows that share its batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(default="1", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    architecture: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    description: str = ""
    licence: str = ""
    source: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    cheaper: str | None = None
    mask: str | None = None
    block: int | None = Field(default=None, ge=1, le=4096)

    @model_validator(mode="after")
    def _mask_is_an_input(self) -> ModelSpec:
        if self.mask and self.mask not in {tensor.name for tensor in self.inputs}:
            raise ValueError(f"mask is {self.mask!r}, which is no input")
        return self

    @property
    def free(self) -> bool:
        """Whether some size of the inputs is free, so that rows come in many shapes."""
        return any(None in tensor.shape for tensor in self.inputs)

    def check(self, rows: Mapping[str, Tensor]) -> None:
        """Hold rows (n, ...) by input name against the contract.

        Raises:
            InputError: names the input, what was expected and what came.
        """
        if len(rows) != len(self.inputs) or any(spec.name not in rows for spec in self.inputs):
            expected, got = sorted(spec.name for spec in self.inputs), sorted(map(str, rows))
            raise InputError(f"model {self.name} takes inputs {expected}, got {got}")
        for spec in self.inputs:
            found = rows[spec.name]
            if not spec.fits(found):
                shape, dtype = tuple(found.shape[1:]), str(found.dtype).removeprefix("torch.")
                raise InputError(
                    f"model {self.name}: input {spec.name} has rows {shape} {dtype}, "
                    f"expected {spec.shape} {spec.dtype}",
                    field=spec.name,
                )
            if outside := spec.outside(found):
                raise InputError(f"model {self.name}: input {spec.name} {outside}", field=spec.name)
        if len(rows) == 1:
            return
        counts = {name: len(tensor) for name, tensor in rows.items()}
        if len(set(counts.values())) > 1:
            raise InputError(
                f"model {self.name}: the inputs have different numbers of rows, {counts}",
                field=self.inputs[0].name,
            )

    def example(self, rows: int = 1, *, free: int = 32) -> dict[str, Tensor]:
        """Rows by input name to try the model with; see :meth:`TensorSpec.example`."""
        return {spec.name: spec.example(rows, free=free) for spec in self.inputs}


Found = tuple[list[Contract], list[Contract]]


def spec_of(path: Path, found: Found, name: str, version: str) -> ModelSpec:
    """The spec of an ONNX file whose graph says ``found``; raises ModelError on a bad name."""
    inputs, outputs = (
        [{"name": n, "shape": shape, "dtype": dtype} for n, shape, dtype in side] for side in found
    )
    fields = {"name": name, "version": version, "source": path.name}
    try:
        return ModelSpec.model_validate(fields | {"inputs": inputs, "outputs": outputs})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(
            f"{path}: {where}: {first['msg']}", hint="name the model and its version"
        ) from None


def hold_against(spec: ModelSpec, path: Path, found: Found) -> None:
    """Raises ModelError, naming the tensor, if an ONNX file does not fulfil a spec."""
    if spec.architecture is not None:
        raise ModelError(f"{spec.name}: an ONNX file has no architecture", hint="leave it out")
    for kind, wanted, have in zip(
        ("input", "output"), (spec.inputs, spec.outputs), found, strict=True
    ):
        facts = {name: (shape, dtype) for name, shape, dtype in have}
        if kind == "input" and {tensor.name for tensor in wanted} != set(facts):
            raise ModelError(f"{path} has inputs {sorted(facts)}, the spec others")
        for tensor in wanted:
            shape, dtype = facts.get(tensor.name, ((), "absent"))
            fits = len(shape) == len(tensor.shape) and all(
                None in (a, b) or a == b for a, b in zip(shape, tensor.shape, strict=True)
            )
            if not fits or dtype != tensor.dtype:
                raise ModelError(
                    f"{path}: {kind} {tensor.name} is {shape} {dtype} in the graph, "
                    f"{tensor.shape} {tensor.dtype} in the spec"
                )
