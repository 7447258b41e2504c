"""Packed weights: sparse, low-bit and entropy-coded tensors in one file, read by memory map.

::

    8 bytes   PLNTPACK
    u16       version of the format
    u16       0
    u32, u32  bytes of the head, and their CRC-32
    head      zstd: u32 length of a table in JSON, the table, then the small tensors
    large     each tensor from a multiple of 64 on, in the order of the table

All numbers are little endian. A line of the table is ``[name, dtype, shape, kind, layout, bytes,
crc, axis]``. Kinds: ``plain``, the tensor's own bytes; ``half``, float32 values that are all
float16, in float16; ``coded``, small integers and a float16 scale for each channel of an axis
(the scales lie in the head); ``same``, the tensor that ``layout`` names. Reading gives the very
bits that were written. Nothing in the file is executed.

What the table says is held against bounds before memory is taken for it; a file that is damaged,
cut off or made to harm is refused with its name, the offset and the reason.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from plinth.engine.compression import coding
from plinth.engine.compression.coding import CodingError
from plinth.engine.errors import ModelError
from plinth.engine.files import replace_file
from plinth.engine.mapped import map_file

MAGIC = b"PLNTPACK"
VERSION = 1
MAX_HEAD_BYTES = 64 << 20  # of a head, packed or not
MAX_TENSORS = 100_000
MAX_TABLE_BYTES = 8 << 20
MAX_RATIO = 1024  # bytes of all tensors by bytes of the file ...
FREE_BYTES = 64 << 20  # ... beyond these
_MAX_BYTES = 64 << 30
_START = struct.Struct("<8sHHII")
_ALIGNED = 64
_SMALL = 4096  # bytes of a tensor that lies in the head
_HINT = "copy it again, or pack the model again: plinth compress"

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float32", "float64", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
STORED = frozenset(_NAMES)
"""Dtypes that a packed file can hold."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor as small integers times a scale for each channel.

    Args:
        codes: int8, of the tensor's shape.
        scales: float16, one for each index of ``axis``.
        axis: the dimension of channels.
    """

    codes: Tensor
    scales: Tensor
    axis: int = 0

    def dense(self) -> Tensor:
        """The tensor, float32: each code times its channel's scale."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.codes.float() * self.scales.float().reshape(shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the table says of one tensor.

    Args:
        name: of the tensor; ``dtype``, ``shape``: as it is read.
        kind: ``plain``, ``half``, ``coded`` or ``same``; ``layout``: of its bytes.
        offset: where its bytes lie, in the file or, if ``inside``, in the unpacked head.
        size: how many there are; ``crc``: CRC-32 of them.
        axis: of the channels of a coded one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    layout: str
    offset: int
    size: int
    crc: int
    axis: int
    inside: bool

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the tensor once it is read."""
        return self.count * _DTYPES[self.dtype].itemsize


def write(
    path: Path, tensors: Mapping[str, Tensor | Coded], shared: Mapping[str, str] | None = None
) -> None:
    """Write tensors, whole or not at all; the file is read again and held against them.

    Args:
        path: the file.
        tensors: by name.
        shared: alias -> name, for tensors that are one in memory.

    Raises:
        ModelError: a tensor has a dtype that is not stored, or they do not fit the format.
    """
    table: list[list[Any]] = []
    inside, behind = bytearray(), []
    for name, value in tensors.items():
        line, data = _pack(name, value)
        if isinstance(value, Coded):
            inside += _planes(value.scales.contiguous().numpy(force=True))
        if line[4] == "raw":
            line[4] = "raw>"
            inside += data
        else:
            behind.append(data)
        table.append(line)
    table += [[alias, "", [], "same", name, 0, 0, 0] for alias, name in (shared or {}).items()]
    said = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head = coding.squeeze(len(said).to_bytes(4, "little") + said + inside)
    start = _START.pack(MAGIC, VERSION, 0, len(head), zlib.crc32(head))
    pieces, at = [start, head], len(start) + len(head)
    for data in behind:
        room = -at % _ALIGNED if len(data) >= _SMALL else 0
        pieces += [bytes(room), data]
        at += room + len(data)
    replace_file(path, pieces)
    with PackedFile(path) as written:
        for name, value in tensors.items():
            if not _same(written.read(name), value):
                raise ModelError(f"{path}: {name} is not what was written", hint="report it")


def _same(found: Tensor | Coded, given: Tensor | Coded) -> bool:
    if isinstance(found, Coded) and isinstance(given, Coded):
        return _bits(found.codes) == _bits(given.codes) and (
            _bits(found.scales) == _bits(given.scales) and found.axis == given.axis
        )
    if isinstance(found, Coded) or isinstance(given, Coded):
        return False
    return found.dtype == given.dtype and _bits(found) == _bits(given)


def _bits(tensor: Tensor) -> bytes:
    return _array(tensor).tobytes()


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Its numbers; bfloat16, which NumPy does not have, as int16."""
    host = tensor.detach().cpu().contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()


def _pack(name: str, value: Tensor | Coded) -> tuple[list[Any], bytes]:
    if isinstance(value, Coded):
        if value.codes.numel() == 0:
            raise ModelError(f"tensor {name} is coded and has no numbers")
        codes = value.codes.movedim(value.axis, 0).contiguous().numpy(force=True)
        layout, data = coding.encode(codes.reshape(len(codes), -1))
        shape, kind, dtype, axis = list(value.codes.shape), "coded", "float32", value.axis
    else:
        if value.dtype not in _NAMES:
            raise ModelError(f"tensor {name} is {value.dtype}, which is not stored")
        shape, kind, dtype, axis = list(value.shape), "plain", _NAMES[value.dtype], 0
        array = _array(value)
        if value.dtype == torch.float32:
            with np.errstate(over="ignore"):  # what is too large is not kept in half
                half = array.astype(np.float16, casting="same_kind")
            if half.astype(np.float32).tobytes() == array.tobytes():
                array, kind = half, "half"
        layout, data = "raw", _planes(array)
        if len(data) > _SMALL:
            squeezed = coding.squeeze(data)
            layout, data = (
                ("zstd", squeezed) if len(squeezed) < 0.9 * len(data) else ("flat", array.tobytes())
            )
    return [name, dtype, shape, kind, layout, len(data), zlib.crc32(data), axis], data


def _planes(array: np.ndarray[Any, Any]) -> bytes:
    """First bytes of all numbers, then second ones: like bytes stand together."""
    width = array.dtype.itemsize
    return np.ascontiguousarray(array.reshape(-1).view(np.uint8).reshape(-1, width).T).tobytes()


def _from_planes(data: bytes | memoryview, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)


class PackedFile:
    """A packed file, its table read and checked; tensors are read when they are asked for.

    Args:
        path: the file.

    Attributes:
        entries: what there is, by name.

    Raises:
        ModelError: it cannot be opened, or its table is not valid; names file, offset, reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            if self.size < _START.size:
                self._refuse(self.size, f"the file ends here, its start has {_START.size} bytes")
            self._map = map_file(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        self._bytes = memoryview(self._map)
        self._scales: dict[str, int] = {}
        try:
            self._head = self._read_head()
            self.entries = {entry.name: entry for entry in self._read_table()}
            self._check_sizes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tensors that still lie in it keep it open for themselves."""
        try:
            self._bytes.release()
            self._map.close()
        except BufferError:
            return

    def read(self, name: str) -> Tensor | Coded:
        """One tensor as it was written; large plain and int8 ones lie in the file itself.

        Raises:
            ModelError: its bytes are damaged; names file, offset, reason.
        """
        entry = self._entry(name)
        data = self._data(entry)
        try:
            if entry.kind == "coded":
                return self._coded(entry, data)
            return self._tensor(entry, data)
        except (CodingError, ValueError) as error:
            self._refuse(entry.offset, f"tensor {name}: {error}")

    def nibbles(self, name: str) -> Tensor | None:
        """The codes of a tensor that lies there two a byte, as it lies there; else ``None``.

        Raises:
            ModelError: as :meth:`read`.
        """
        entry = self._entry(name)
        if entry.kind != "coded" or entry.layout != "i4" or entry.inside:
            return None
        return _torch(np.frombuffer(self._data(entry), np.uint8))

    def dense(self, name: str) -> Tensor:
        """One tensor in the dtype of its table.

        Raises:
            ModelError: as :meth:`read`.
        """
        found = self.read(name)
        return found.dense() if isinstance(found, Coded) else found

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor; nothing of it is read."""
        entry = self._entry(name)
        return entry.shape, entry.dtype

    def _entry(self, name: str) -> Entry:
        entry = self.entries[name]
        return self.entries[entry.layout] if entry.kind == "same" else entry

    def _data(self, entry: Entry) -> memoryview:
        whole = self._head if entry.inside else self._bytes
        data = whole[entry.offset : entry.offset + entry.size]
        if zlib.crc32(data) != entry.crc:
            self._refuse(
                0 if entry.inside else entry.offset, f"tensor {entry.name}: its checksum is wrong"
            )
        return data

    def _tensor(self, entry: Entry, data: memoryview) -> Tensor:
        dtype = _DTYPES["float16" if entry.kind == "half" else entry.dtype]
        bfloat = dtype == torch.bfloat16
        kind = np.dtype("<i2") if bfloat else torch.empty(0, dtype=dtype).numpy().dtype
        want = entry.count * kind.itemsize
        if entry.layout == "zstd":
            data = memoryview(coding.unsqueeze(data, want))
        elif len(data) != want:
            raise CodingError(f"{entry.count} numbers take {want} bytes, not {len(data)}")
        flat = entry.layout == "flat"
        array = np.frombuffer(data, kind) if flat else _from_planes(data, kind)
        if entry.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
            raise CodingError("a truth value is neither 0 nor 1")
        tensor = _torch(array)
        tensor = tensor.view(torch.bfloat16) if bfloat else tensor
        return (tensor.float() if entry.kind == "half" else tensor).reshape(entry.shape)

    def _coded(self, entry: Entry, data: memoryview) -> Coded:
        channels = entry.shape[entry.axis]
        rest = [size for axis, size in enumerate(entry.shape) if axis != entry.axis]
        codes = coding.decode(entry.layout, data, channels, math.prod(rest))
        at = self._scales[entry.name]
        scales = _from_planes(self._head[at : at + 2 * channels], np.dtype("<f2"))
        whole = _torch(codes).reshape([channels, *rest]).movedim(0, entry.axis)
        return Coded(whole, _torch(scales), entry.axis)

    # -- the head ------------------------------------------------------------------------------
    def _read_head(self) -> memoryview:
        magic, version, zero, size, crc = _START.unpack_from(self._bytes)
        if magic != MAGIC:
            self._refuse(0, f"it begins with {magic!r}, a packed file with {MAGIC!r}")
        if version != VERSION or zero:
            hint = "update plinth-engine" if version > VERSION and not zero else _HINT
            self._refuse(8, f"its format is {version}.{zero}, this release reads {VERSION}.0", hint)
        if size > min(MAX_HEAD_BYTES, self.size - _START.size):
            self._refuse(12, f"its head is to have {size} bytes, more than there are or may be")
        packed = self._bytes[_START.size : _START.size + size]
        if zlib.crc32(packed) != crc:
            self._refuse(_START.size, "the checksum of its head is wrong")
        self._end = _START.size + size
        try:
            return memoryview(coding.unsqueeze(packed, MAX_HEAD_BYTES, at_most=True))
        except CodingError as error:
            self._refuse(_START.size, f"its head: {error}")

    def _read_table(self) -> Iterator[Entry]:
        size = int.from_bytes(self._head[:4], "little")
        if len(self._head) < 4 or size > min(MAX_TABLE_BYTES, len(self._head) - 4):
            self._refuse(_START.size, f"its table is to have {size} bytes, more than may be")
        try:
            table = json.loads(bytes(self._head[4 : 4 + size]))
            lines = [_line(line) for line in table]
        except (ValueError, TypeError, RecursionError) as error:
            self._refuse(_START.size, f"its table: {str(error)[:200]}")
        if len(lines) > MAX_TENSORS or len({line[0] for line in lines}) != len(lines):
            self._refuse(_START.size, f"its table has {len(lines)} lines, or a name twice")
        inside, outside = 4 + size, self._end
        for name, dtype, shape, kind, layout, count, crc, axis in lines:
            if kind == "coded":
                self._scales[name] = inside
                inside += 2 * shape[axis]
            within = layout.endswith(">")
            if within:
                at, inside = inside, inside + count
            else:
                at = outside + (-outside % _ALIGNED if count >= _SMALL else 0)
                if any(self._bytes[outside : min(at, outside + _ALIGNED)]):
                    self._refuse(outside, "there are bytes between two tensors")
                outside = at + count
            layout = layout.removesuffix(">")
            yield Entry(name, dtype, shape, kind, layout, at, count, crc, axis, within)
        if inside != len(self._head):
            self._refuse(_START.size, f"its head has {len(self._head)} bytes, expected {inside}")
        if outside != self.size:
            self._refuse(
                min(outside, self.size), f"the file has {self.size} bytes, expected {outside}"
            )

    def _check_sizes(self) -> None:
        """Whether all that the table promises may be unpacked at all."""
        total = 0
        for entry in self.entries.values():
            target = self.entries.get(entry.layout) if entry.kind == "same" else entry
            if target is None or (entry.kind == "same" and target.kind == "same"):
                self._refuse(_START.size, f"tensor {entry.name} is to be {entry.layout}, not there")
            total += target.dense_bytes if entry.kind != "same" else 0
        allowed = min(_MAX_BYTES, FREE_BYTES + MAX_RATIO * self.size)
        if total > allowed:
            self._refuse(
                _START.size, f"it is to unpack to {total} bytes, a file of its size to {allowed}"
            )

    def _refuse(self, offset: int, reason: str, hint: str = _HINT) -> NoReturn:
        raise ModelError(f"{self.path} at byte {offset}: {reason}", hint=hint)


_KINDS = {
    "plain": {"raw>", "zstd", "flat"},
    "half": {"raw>", "zstd", "flat"},
    "coded": set(coding.LAYOUTS),
}


def _line(line: Any) -> tuple[str, str, tuple[int, ...], str, str, int, int, int]:
    """One line of a table, each of its fields what it must be."""
    if not isinstance(line, list) or len(line) != 8:
        raise ValueError("a line has not eight fields")
    name, dtype, shape, kind, layout, *numbers = line
    words = (name, dtype, kind, layout)
    if not all(isinstance(word, str) and len(word) < 1024 for word in words):
        raise ValueError("a name is no word of less than 1024 letters")
    if not isinstance(shape, list) or len(shape) > 8:
        raise ValueError(f"tensor {name} has not up to 8 dimensions")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, *numbers)):
        raise ValueError(f"tensor {name} has a size, length or checksum that is none")
    if math.prod(shape) > _MAX_BYTES:
        raise ValueError(f"tensor {name} has {math.prod(shape)} numbers")
    size, crc, axis = numbers
    if kind == "same":
        if size or shape:
            raise ValueError(f"tensor {name} is another one and has bytes")
        return name, "uint8", (), kind, layout, 0, 0, 0
    if layout not in _KINDS.get(kind, ()) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name} is {dtype} {kind} {layout}, which is not known")
    if kind != "plain" and dtype != "float32":
        raise ValueError(f"tensor {name} is {kind} and {dtype}")
    if axis >= max(1, len(shape)) or (kind == "coded" and not shape):
        raise ValueError(f"tensor {name} has no dimension {axis}")
    return name, dtype, tuple(shape), kind, layout, size, crc, axis


def _torch(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor of an array's memory; a copy of what may not be written to."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
