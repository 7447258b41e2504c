"""Tensors of the protocol: their header, their bytes and their JSON, read within bounds.

https://github.com/kserve/open-inference-protocol, and the binary tensor data extension: bytes are
little-endian, in row-major order, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from plinth.engine import InputError, TensorSpec

DATATYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
"""Torch dtype by the protocol's name; models of the engine take no others."""
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
MAX_DIMENSIONS = 16
_MOST = 1 << 48  # of one dimension; the bytes have a tighter bound


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What is said of a tensor before its values.

    Args:
        name: of the input or output.
        dtype: of its values.
        shape: sizes, the first of which counts rows.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return self.count * self.dtype.itemsize


def header_of(name: object, datatype: object, shape: object, most: int) -> TensorHeader:
    """A checked header.

    Args:
        name: of the input.
        datatype: such as ``"FP32"``.
        shape: list of sizes.
        most: bytes that one tensor may have.

    Raises:
        InputError: names the input, what was expected and what to do.
    """
    if not isinstance(name, str) or not name:
        raise InputError("an input has no name", field="inputs", hint="send its name as a string")
    called = name[:64]
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise InputError(
            f"input {called}: the datatype is none that models here take",
            field=called,
            hint=f"use one of {', '.join(DATATYPES)}",
            reason="bad_datatype",
        )
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else None
    if sizes is None or any(type(n) is not int or not 0 < n < _MOST for n in sizes):
        raise InputError(
            f"input {called}: the shape is no list of whole numbers, 1 or more",
            field=called,
            reason="bad_shape",
        )
    if not 1 <= len(sizes) <= MAX_DIMENSIONS:
        raise InputError(
            f"input {called}: the shape has {len(sizes)} sizes, expected 1 to {MAX_DIMENSIONS}",
            field=called,
            hint="the first size counts rows",
            reason="bad_shape",
        )
    header = TensorHeader(called, DATATYPES[datatype], tuple(sizes))
    if header.bytes > most:
        raise InputError(
            f"input {called}: a tensor of this shape has {header.bytes:,} bytes, at most "
            f"{most:,} are taken",
            field=called,
            hint="send fewer rows at once, or raise serve.oip.max_body_bytes",
            reason="tensor_too_large",
        )
    return header


def from_bytes(header: TensorHeader, raw: bytes | memoryview) -> Tensor:
    """The tensor of raw bytes.

    Raises:
        InputError: there are more or fewer bytes than the header says.
    """
    if len(raw) != header.bytes:
        raise InputError(
            f"input {header.name}: {len(raw):,} bytes came, its shape and datatype ask for "
            f"{header.bytes:,}",
            field=header.name,
            reason="wrong_size",
        )
    tensor = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
    if header.dtype is torch.bool:  # any byte but 0 is true, and torch wants 1
        return tensor.ne(0).reshape(header.shape)
    return tensor.view(header.dtype).reshape(header.shape)


def from_json(header: TensorHeader, data: object) -> Tensor:
    """The tensor of a JSON list, flat or nested.

    Raises:
        InputError: other values than the datatype has, or another number of them.
    """
    if not isinstance(data, list):
        raise InputError(
            f"input {header.name}: data is no list",
            field=header.name,
            hint='send "data": [...], or binary data with "binary_data_size"',
            reason="bad_data",
        )
    text = orjson.dumps(data)
    if any(mark in text for mark in (b'"', b"{", b"null")):  # NumPy would make room for the longest
        raise _unlike(header)
    try:
        array = np.array(data)
    except ValueError:
        raise _ragged(header) from None
    if array.size != header.count or (array.ndim > 1 and array.shape != header.shape):
        raise InputError(
            f"input {header.name}: data has the shape {list(array.shape)}, the header says "
            f"{list(header.shape)}",
            field=header.name,
            reason="wrong_size",
        )
    return _converted(header, array, has_booleans=b"true" in text or b"false" in text)


def _converted(header: TensorHeader, array: np.ndarray[Any, Any], *, has_booleans: bool) -> Tensor:
    dtype = header.dtype
    kinds = "b" if dtype is torch.bool else "iuf" if dtype.is_floating_point else "iu"
    # NumPy takes true for 1 beside numbers.
    if array.dtype.kind not in kinds or (kinds != "b" and has_booleans):
        raise _unlike(header)
    if kinds == "iu":
        info = torch.iinfo(dtype)
        fits = int(array.min()) >= info.min and int(array.max()) <= info.max
    else:
        with np.errstate(over="ignore"):
            given = torch.from_numpy(array.astype(_numpy(dtype))).to(dtype)
        fits = not dtype.is_floating_point or bool(given.isfinite().all())
    if not fits:
        raise InputError(
            f"input {header.name}: data has values beyond {NAMES[dtype]}",
            field=header.name,
            reason="bad_data",
        )
    return torch.from_numpy(array.astype(_numpy(dtype))).to(dtype).reshape(header.shape)


def _unlike(header: TensorHeader) -> InputError:
    return InputError(
        f"input {header.name}: data has values that are not {NAMES[header.dtype]}",
        field=header.name,
        reason="bad_data",
    )


def _ragged(header: TensorHeader) -> InputError:
    return InputError(
        f"input {header.name}: its lists differ in length", field=header.name, reason="ragged"
    )


def _numpy(dtype: torch.dtype) -> Any:
    """What NumPy calls a dtype; it has no bfloat16."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype("float32" if name == "bfloat16" else name)


def to_bytes(tensor: Tensor) -> memoryview:
    """The values as raw bytes, which are not copied where they lie in a row already."""
    array: Any = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def to_json(tensor: Tensor, name: str) -> list[Any]:
    """The values as a flat list.

    Raises:
        InputError: a value is infinite or not a number, which JSON does not have.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise InputError(
            f"output {name} has values that are infinite or not a number, which JSON does not have",
            field=name,
            hint="ask for it as binary data",
            reason="not_finite",
        )
    return list(tensor.flatten().tolist())


def metadata_of(spec: TensorSpec) -> dict[str, Any]:
    """An input or output of a model as the protocol tells it; -1 is any size."""
    return {
        "name": spec.name,
        "datatype": NAMES[getattr(torch, spec.dtype)],
        "shape": [-1, *(-1 if size is None else size for size in spec.shape)],
    }
