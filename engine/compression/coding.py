"""Small integers to bytes and back, exactly, in as few bytes as one of several ways gives.

Codes are int8, one for each weight, in rows (rows, row length): a row is an output channel. A
*layout* says how they become bytes:

- ``i8``, ``i4``, ``t5``: one code a byte, two (-8 to 7), five of -1, 0 and 1 (base 243); as they
  are, or through zstd (``i8z``, ``i4z``, ``t5z``). ``i8`` is read where it lies.
- ``rans``: range asymmetric numeral systems (J. Duda, arXiv:1311.2540, 2013), many lanes at once
  so that NumPy runs them. Rows of like statistics share a table of frequencies, which zstd cannot
  do; it is slower to read, and is taken where it saves at least 3 %.

Whoever reads says how many codes there must be, so that no stream decides how much memory it takes.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int8]

RANS_GAIN = 0.97  # at most this share of the best other layout, for rans to be taken
LEVEL = 19  # of zstd
_BITS = 12  # of a frequency
_TOTAL = 1 << _BITS
_LOW = 1 << 16  # a state lies in [_LOW, _LOW << 16)
_STEPS = 2048  # codes of a lane, about
_LANES = 2048
_CLASSES = (1, 4)  # tables that are tried; four take two bits of a row
_HEAD = struct.Struct("<BbBH")  # tables, smallest code, codes of the alphabet, lanes
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


class CodingError(ValueError):
    """Bytes that are not what :func:`encode` gave; says why."""


def encode(codes: Codes, *, fast: bool = False) -> tuple[str, bytes]:
    """The layout that takes fewest bytes, and the bytes.

    Args:
        codes: (rows, row length) int8.
        fast: leave ``rans`` out.
    """
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    plain = "t5" if low >= -1 and high <= 1 else "i4" if low >= -8 and high <= 7 else "i8"
    data = as_plain(plain, codes.ravel())
    squeezed = [(f"{plain}z", squeeze(data))]
    if plain != "i8":  # zstd's Huffman codes one byte at a time: either may be the better byte
        squeezed.append(("i8z", squeeze(codes.tobytes())))
    layout, best = min(squeezed, key=lambda one: len(one[1]))
    if len(best) > RANS_GAIN * len(data):
        layout, best = plain, data
    if not fast and codes.size >= _LANES // 8:
        found = min((_rans(codes, classes) for classes in _CLASSES), key=len)
        if len(found) <= RANS_GAIN * len(best):
            layout, best = "rans", found
    return layout, best


LAYOUTS = ("i8", "i4", "t5", "i8z", "i4z", "t5z", "rans")


def decode(layout: str, data: memoryview, rows: int, length: int) -> Codes:
    """What :func:`encode` was given; ``i8`` a view of the bytes.

    Args:
        layout: one of ``LAYOUTS``.
        data: the bytes.
        rows: of the codes; ``length``: of a row.

    Raises:
        CodingError: not such bytes; says why.
    """
    count = rows * length
    if layout == "rans":
        return _unrans(data, rows, length)
    if layout.endswith("z"):
        layout = layout[:-1]
        data = memoryview(unsqueeze(data, _plain_bytes(layout, count)))
    if layout not in ("i8", "i4", "t5"):
        raise CodingError(f"there is no layout {layout!r}")
    if len(data) != _plain_bytes(layout, count):
        raise CodingError(
            f"{count} codes take {_plain_bytes(layout, count)} bytes, not {len(data)}"
        )
    return _unplain(layout, data, count).reshape(rows, length)


def squeeze(data: bytes) -> bytes:
    """Through zstd, its size said in its head."""
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(data)


def unsqueeze(data: memoryview | bytes, size: int, *, at_most: bool = False) -> bytes:
    """What :func:`squeeze` was given, if it had ``size`` bytes, or ``at_most`` so many.

    Raises:
        CodingError: not zstd, or of another size, found before a byte is unpacked.
    """
    import zstandard

    try:
        said = zstandard.get_frame_parameters(data).content_size
        if said > size or (said != size and not at_most):
            raise CodingError(f"it says it unpacks to {said} bytes, expected {size}")
        size = said
        found = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CodingError(f"zstd: {error}") from error
    if len(found) != size:
        raise CodingError(f"it unpacks to {len(found)} bytes, expected {size}")
    return found


def _plain_bytes(layout: str, count: int) -> int:
    return {"i8": count, "i4": -(-count // 2), "t5": -(-count // 5)}.get(layout, -1)


def as_plain(layout: str, codes: Codes) -> bytes:
    """Codes in a layout without coding: one (``i8``), two (``i4``) or five (``t5``) a byte."""
    if layout == "i8":
        return codes.tobytes()
    width, shift = (2, 8) if layout == "i4" else (5, 1)
    padded = np.full(-(-codes.size // width) * width, shift, np.uint8)
    padded[: codes.size] = codes.astype(np.int16) + shift
    digits = padded.reshape(-1, width)
    packed = digits[:, 0] | digits[:, 1] << 4 if layout == "i4" else digits @ _POWERS
    return packed.astype(np.uint8).tobytes()


def _unplain(layout: str, data: memoryview, count: int) -> Codes:
    packed = np.frombuffer(data, np.uint8)
    if layout == "i8":
        return packed.view(np.int8)
    if layout == "i4":
        digits, shift = np.stack([packed & 15, packed >> 4], axis=1), 8
    else:
        if packed.size and packed.max() > 242:
            raise CodingError(
                f"byte {int(packed.argmax())} is {packed.max()}, at most 242 is valid"
            )
        digits, shift = packed[:, None] // _POWERS % 3, 1
    codes: Codes = digits.reshape(-1).astype(np.int8) - np.int8(shift)
    if (codes[count:] != 0).any():
        raise CodingError("there are codes behind the last one")
    return codes[:count]


# -- rans --------------------------------------------------------------------------------------
def _rans(codes: Codes, classes: int) -> bytes:
    length = codes.shape[1]
    low = int(codes.min())
    symbols = (codes.astype(np.int16) - low).astype(np.uint8)
    size = int(symbols.max()) + 1
    kinds = _kinds(codes, classes)
    counts = np.stack(
        [np.bincount(symbols[kinds == kind].ravel(), minlength=size) for kind in range(classes)]
    )
    tables = np.stack([_frequencies(count) for count in counts])
    lanes = _lanes(codes.size)
    states, words = _push(symbols.ravel(), np.repeat(kinds, length), tables, lanes)
    said = np.packbits(np.stack([kinds >> 1, kinds & 1], axis=1)).tobytes() if classes > 1 else b""
    head = _HEAD.pack(classes, low, size - 1, lanes)
    return b"".join([head, tables.astype("<u2").tobytes(), said, states.tobytes(), words.tobytes()])


def _lanes(count: int) -> int:
    return max(1, min(_LANES, count // _STEPS))


def _kinds(codes: Codes, classes: int) -> npt.NDArray[np.uint8]:
    """A class for each row: quarters of the rows by how many of their codes are not 0."""
    if classes == 1:
        return np.zeros(len(codes), np.uint8)
    rank = np.argsort(np.argsort(np.count_nonzero(codes, axis=1), kind="stable"), kind="stable")
    return (rank * classes // len(codes)).astype(np.uint8)


def _frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts scaled to a sum of ``_TOTAL``; what occurs has at least 1."""
    total = int(counts.sum())
    if total == 0:
        return np.bincount([0], minlength=len(counts)) * _TOTAL
    scaled = np.where(counts > 0, np.maximum(1, counts * _TOTAL // total), 0)
    scaled[scaled.argmax()] += max(0, _TOTAL - int(scaled.sum()))
    while scaled.sum() > _TOTAL:
        scaled[scaled.argmax()] -= 1
    return scaled


def _push(
    symbols: npt.NDArray[np.uint8], kinds: npt.NDArray[np.uint8], tables: Any, lanes: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """States and words from which the symbols come out again, first to last."""
    starts = np.cumsum(tables, axis=1) - tables
    frequency = tables[kinds, symbols].astype(np.uint64)
    start = starts[kinds, symbols].astype(np.uint64)
    states = np.full(lanes, _LOW, np.uint64)
    words: list[npt.NDArray[Any]] = []
    for first in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        f, c = frequency[first : first + lanes], start[first : first + lanes]
        x = states[: f.size]
        full = x >= f << np.uint64(32 - _BITS)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: f.size] = (x // f << np.uint64(_BITS)) + x % f + c
    return states.astype("<u4"), np.concatenate(words[::-1])


def _unrans(data: memoryview, rows: int, length: int) -> Codes:
    if len(data) < _HEAD.size:
        raise CodingError(f"{len(data)} bytes are too few for its head")
    classes, low, last, lanes = _HEAD.unpack_from(data)
    size, count = last + 1, rows * length
    side = -(-rows // 4) if classes > 1 else 0
    fixed = _HEAD.size + 2 * classes * size + side + 4 * lanes
    if classes not in _CLASSES or not 1 <= lanes <= _LANES or low + last > 127:
        raise CodingError(f"{classes} tables, {lanes} lanes, codes {low} to {low + last}")
    if len(data) < fixed or (len(data) - fixed) % 2:
        raise CodingError(f"{len(data)} bytes do not hold tables and states of {fixed}")
    if lanes != _lanes(count):
        raise CodingError(f"{lanes} lanes for {count} codes, expected {_lanes(count)}")
    tables = np.frombuffer(data, "<u2", classes * size, _HEAD.size).reshape(classes, size)
    if (tables.sum(axis=1, dtype=np.int64) != _TOTAL).any():
        raise CodingError(f"its frequencies do not sum to {_TOTAL}")
    kinds = np.zeros(rows, np.uint8)
    if classes > 1:
        at = _HEAD.size + 2 * classes * size
        bits = np.unpackbits(np.frombuffer(data, np.uint8, side, at), count=2 * rows)
        kinds = bits.reshape(rows, 2) @ np.array([2, 1], np.uint8)
    states = np.frombuffer(data, "<u4", lanes, fixed - 4 * lanes)
    words = np.frombuffer(data, "<u2", offset=fixed)
    symbols = _pop(states, words, tables.astype(np.int64), kinds, length)
    codes: Codes = (symbols.astype(np.int16) + low).astype(np.int8)
    return codes.reshape(rows, length)


def _pop(
    states: npt.NDArray[Any],
    words: npt.NDArray[Any],
    tables: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.uint8],
    length: int,
) -> npt.NDArray[np.uint8]:
    flat = np.arange(tables.shape[1])
    symbol_at = np.stack([np.repeat(flat, table) for table in tables])
    starts = np.cumsum(tables, axis=1) - tables
    frequency_at = np.take_along_axis(tables, symbol_at, axis=1).ravel().astype(np.uint32)
    ahead = np.arange(_TOTAL) - np.take_along_axis(starts, symbol_at, axis=1)
    ahead_at, symbol_at = ahead.ravel().astype(np.uint32), symbol_at.ravel().astype(np.uint8)
    bases = np.repeat(kinds.astype(np.uint32) << _BITS, length)
    found = np.empty(bases.size, np.uint8)
    x, read = states.astype(np.uint32), 0
    for first in range(0, bases.size, len(x)):
        base = bases[first : first + len(x)]
        now = x[: base.size]
        slot = (now & np.uint32(_TOTAL - 1)) + base
        found[first : first + len(x)] = symbol_at[slot]
        now = frequency_at[slot] * (now >> np.uint32(_BITS)) + ahead_at[slot]
        empty = np.flatnonzero(now < _LOW)
        if read + empty.size > words.size:
            raise CodingError(f"its {words.size} words end before code {first + len(x)}")
        now[empty] = (now[empty] << np.uint32(16)) | words[read : read + empty.size]
        read += empty.size
        x[: base.size] = now
    if read != words.size or (x != _LOW).any():
        raise CodingError("its states do not end where they began")
    return found
