"""Whether a JPEG Lossless code stream (ITU-T T.81, annex H) is as long as its decoded values need.

The format has no check sum, and decoders go on where bytes are missing, too many or wrong. But the
values that they give need a known number of bits: for each, the Huffman code of the category of
its difference from its prediction, and the bits of that difference. A stream of another length
was not made of these values.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from plinth.verticals.medical.volumes.volume import Array

LOSSLESS = 0xC3
"""Marker SOF3."""
FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header of JPEG (ITU-T T.81, table B.1)."""
NO_CODE = 255
"""Bits of a category that the Huffman table has no code for: no stream is so long."""
PADDING = 3
"""Bytes of zeros or ones that may follow the last one: some encoders end on a whole word."""


@dataclass(slots=True)
class _Scan:
    """What stands before the coded data."""

    marker: int = 0
    precision: int = 0
    predictor: int = 0
    shift: int = 0
    restart: int = 0
    table: int = 0
    start: int = 0
    codes: dict[int, Array] = field(default_factory=dict)


def frame_header(frame: bytes) -> int:
    """Where the frame header (marker SOF) is (B.2.2).

    Raises:
        ValueError, struct.error: there is none.
    """
    return segment(frame, FRAME_HEADERS, 2)


def segment(frame: bytes, codes: Collection[int], at: int) -> int:
    """Where the first segment with one of these markers is, after segments of stated lengths.

    Args:
        frame: the code stream.
        codes: second byte of the markers.
        at: where a segment begins.

    Raises:
        ValueError, struct.error: there is none.
    """
    while True:
        mark, code, length = struct.unpack_from(">BBH", frame, at)
        if mark != 0xFF:
            raise ValueError("no marker")
        if code in codes:
            return at
        at += 1 if code == 0xFF else 2 + length  # 0xFF may be repeated before a marker


def wrong_length(frame: bytes, values: Array) -> str | None:
    """Why a whole JPEG code stream of one component was not made of the values decoded from it.

    Args:
        frame: the code stream, from SOI to EOI.
        values: (rows, columns) uint8 or uint16, as decoded from it.

    Returns:
        ``None`` if it may have been, or if it is not of the lossless process.
    """
    try:
        scan = _scan(frame)
    except (struct.error, IndexError, ValueError):
        return "its code stream has no tables that make sense"
    if scan.marker != LOSSLESS:
        return None
    if scan.precision < 16 and int(values.max()) >> scan.precision:
        return f"it decodes to values of more than its {scan.precision} bits"
    data = frame[scan.start : frame.rindex(b"\xff\xd9")].rstrip(b"\xff")
    pieces = re.split(rb"\xff+[\xd0-\xd7]", data) if scan.restart else [data]
    rows, columns = values.shape
    every = scan.restart // columns if scan.restart else rows
    if not every or scan.restart % columns or len(pieces) != -(-rows // every):
        return f"its code stream has {len(pieces) - 1} restart markers where they do not belong"
    for piece, bits in zip(pieces, _bits(scan, values, every), strict=True):
        coded = np.frombuffer(piece, np.uint8)
        full = coded == 255
        stuffed = int(np.count_nonzero(full))  # a zero follows each byte of ones (B.1.1.5)
        if stuffed != np.count_nonzero(full[:-1] & (coded[1:] == 0)):
            return "its coded data hold a marker"
        spare = 8 * (len(piece) - stuffed) - bits
        if not 0 <= spare < 8 and not _padded(piece, spare):
            return f"its coded data hold {spare + bits} bits, and the values in it need {bits}"
    return None


def _padded(piece: bytes, spare: int) -> bool:
    """The spare bits are a few bytes of zeros or ones."""
    return 0 <= spare < 8 * (PADDING + 1) and set(piece[-(spare // 8) :]) in ({0}, {0, 255})


def _scan(frame: bytes) -> _Scan:
    """Read the segments up to the start of the coded data (B.2)."""
    found, at = _Scan(), 2
    while True:
        mark, code, length = struct.unpack_from(">BBH", frame, at)
        if mark != 0xFF:
            raise ValueError("no marker")
        if code == 0xFF:  # may be repeated before a marker
            at += 1
            continue
        body = frame[at + 4 : at + 2 + length]
        at += 2 + length
        if code in FRAME_HEADERS:
            found.marker, found.precision = code, body[0]
        elif code == 0xC4:
            _add_tables(found.codes, body)
        elif code == 0xDD:
            (found.restart,) = struct.unpack(">H", body)
        elif code == 0xDA:
            found.table, found.predictor, found.shift = body[2] >> 4, body[3], body[5] & 15
            found.start = at
            if found.marker == LOSSLESS and (
                found.table not in found.codes or not 1 <= found.predictor <= 7
            ):
                raise ValueError("no table, or no prediction")
            return found


def _add_tables(codes: dict[int, Array], body: bytes) -> None:
    """Bits of a difference by its magnitude, for each table of a segment DHT (B.2.4.2)."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        bits = np.full(17, NO_CODE, np.uint8)
        for symbol, length in zip(symbols, np.repeat(np.arange(1, 17), list(counts)), strict=True):
            if symbol <= 16:
                bits[symbol] = length + (symbol if symbol < 16 else 0)
        codes[body[at]] = bits
        at += 17 + len(symbols)


def _bits(scan: _Scan, values: Array, every: int) -> list[int]:
    """Bits that each so many rows need, where the prediction begins anew.

    For each category the magnitudes of it and above are counted: some passes over small numbers
    are cheaper than looking each of them up.
    """
    differences = _differences(scan, values, every).view(np.int16)
    magnitudes = np.abs(differences, out=differences).view(np.uint16)
    codes = scan.codes[scan.table].astype(np.int64).tolist()
    needed, buffer = [], np.empty(magnitudes[:every].shape, np.bool_)
    for first in range(0, len(magnitudes), every):
        part = magnitudes[first : first + every]
        above = buffer[: len(part)]
        bits = codes[0] * part.size
        for category in range(1, int(part.max()).bit_length() + 1):
            np.greater_equal(part, 1 << (category - 1), out=above)
            bits += (codes[category] - codes[category - 1]) * int(np.count_nonzero(above))
        needed.append(bits)
    return needed


def _differences(scan: _Scan, values: Array, every: int) -> Array:
    """Values less their predictions, modulo 65536 (H.1.2.1)."""
    x = values.astype(np.uint16, copy=False)
    if scan.shift:
        x = x >> np.uint16(scan.shift)
    found = np.empty_like(x)
    found[1:, 0] = x[1:, 0] - x[:-1, 0]
    left, above, corner = x[1:, :-1], x[:-1, 1:], x[:-1, :-1]
    predicted = _PREDICTIONS[scan.predictor](left, above, corner)
    np.subtract(x[1:, 1:], predicted, out=found[1:, 1:], casting="unsafe")
    first = slice(None, None, every)
    found[first, 0] = x[first, 0] - np.uint16(1 << (scan.precision - scan.shift - 1))
    found[first, 1:] = x[first, 1:] - x[first, :-1]
    return found


def _half(one: Array, other: Array, sign: int) -> Array:
    return (one.astype(np.int32) + sign * other.astype(np.int32)) >> 1


_PREDICTIONS: dict[int, Callable[[Array, Array, Array], Array]] = {
    1: lambda left, above, corner: left,
    2: lambda left, above, corner: above,
    3: lambda left, above, corner: corner,
    4: lambda left, above, corner: left + above - corner,
    5: lambda left, above, corner: left + _half(above, corner, -1),
    6: lambda left, above, corner: above + _half(left, corner, -1),
    7: lambda left, above, corner: _half(left, above, 1),
}
"""Predictions from the neighbours, by the selection value (table H.1)."""
