"""Whether a JPEG Lossless code stream (ITU-T T.81, annex H) is as long as its decoded values need.

The format has no check sum, and decoders go on where bytes are missing, too many or wrong. But the
values that they give need a known number of bits: for each, the Huffman code of the category of
its difference from its prediction, and the bits of that difference. A stream of another length
was not made of these values.

To count every value takes a quarter of the time of decoding them. So the stream is decoded with
one row more, and a mark behind its coded data: the decoder has read what it ought to where that
row begins with the padding and the mark. Only where it does not are the values counted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache

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
MARK = bytes.fromhex("2a55334c691e5b26")
"""Behind the coded data: bytes that no padding has, without a long run of ones or a period."""
MARK_VALUES = 8 * (len(MARK) + 1)
"""Values of the row more in which padding and mark are read, of a bit or more each."""
NO_CODE_BITS = 17
"""What libjpeg reads before it takes a code that is in no table for a difference of 0."""
MOST_ROWS = 65_535
NO_TABLES = "its code stream has no tables that make sense"


class WrongLength(ValueError):
    """A code stream was not made of the values that it decodes to; says why."""


@dataclass(slots=True)
class _Scan:
    """What stands before the coded data."""

    marker: int = 0
    precision: int = 0
    predictor: int = 0
    shift: int = 0
    restart: int = 0
    table: int = 0
    header: int = 0
    start: int = 0
    codes: dict[int, Array] = field(default_factory=dict)
    tables: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)


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


def decode_lossless(
    decode: Callable[[bytes], Array], frame: bytes, at: int, stored: int = 16
) -> Array:
    """The values of a whole code stream of one component, if it is as long as they need.

    Args:
        decode: gives the values of a code stream.
        frame: of the lossless process, from SOI to EOI.
        at: where its frame header is.
        stored: bits that a value has, as far as it is known.

    Returns:
        (rows, columns) uint8 or uint16.

    Raises:
        WrongLength: it was not made of these values.
        ValueError, RuntimeError: it cannot be decoded.
    """
    try:
        scan = _scan(frame)
    except (struct.error, IndexError, ValueError):
        raise WrongLength(NO_TABLES) from None
    values = _by_mark(decode, frame, at, scan, min(stored, scan.precision))
    if values is not None:
        return values
    values = decode(frame)
    wrong = wrong_length(frame, values)
    if wrong is not None:
        raise WrongLength(wrong)
    return values


def _by_mark(
    decode: Callable[[bytes], Array], frame: bytes, at: int, scan: _Scan, bits: int
) -> Array | None:
    """The values, if the row after the last was read from where padding and MARK are.

    A code that no table has would be read as one of another length: such codes are given a
    difference that is larger than a value can be.
    """
    end = frame.rindex(b"\xff\xd9")
    (rows,) = struct.unpack_from(">H", frame, at + 5)
    if scan.restart or rows == MOST_ROWS or bits == 16 or frame[end - 1] == 0xFF:
        return None
    table = _completed(scan.table, *scan.tables[scan.table])
    if table is None:
        return None
    segment, symbols = table
    size, view = struct.pack(">H", rows + 1), memoryview(frame)
    head = frame[: at + 5], size, frame[at + 7 : scan.header], segment
    values = decode(b"".join((*head, view[scan.header : end], MARK, view[end:])))
    last = 0xFF if frame[end - 2 : end] == b"\xff\0" else frame[end - 1]  # stuffed (B.1.1.5)
    behind = "".join(f"{byte:08b}" for byte in (last, *MARK))
    found = _differences(scan, values[-2:, :MARK_VALUES], 2)[1].view(np.int16).tolist()
    reached = any(_begins_so(found, symbols, behind[8 - spare :]) for spare in range(8))
    return values[:-1] if reached and not int(values[:-1].max()) >> bits else None


@lru_cache(maxsize=64)
def _completed(
    number: int, counts: bytes, categories: bytes
) -> tuple[bytes, dict[str, int]] | None:
    """A table whose unused codes are of category 16, as a segment DHT, and categories by code.

    Only the code of sixteen ones stays free. ``None``: there is no room for so many codes.

    Args:
        number: of the table.
        counts: codes of each length from 1.
        categories: of the codes, in their order.
    """
    filled, added, code = list(counts), 0, 0
    longest = max(n for n, count in enumerate(counts, 1) if count)
    for n in range(1, 17):
        code = code * 2 + filled[n - 1]
        free = (1 << n) - 1 - code
        if n >= longest and free > 0:
            filled[n - 1], added, code = filled[n - 1] + free, added + free, code + free
        if free < 0 or len(categories) + added > 255:
            return None
    named = categories + bytes([16] * added)
    body = bytes([number, *filled]) + named
    symbols, code, at = {}, 0, 0
    for n, count in enumerate(filled, 1):
        code *= 2
        for category in named[at : at + count]:
            symbols[f"{code:0{n}b}"] = category
            code += 1
        at += count
    return struct.pack(">BBH", 0xFF, 0xC4, 2 + len(body)) + body, symbols


def _begins_so(found: list[int], symbols: dict[str, int], digits: str) -> bool:
    """Differences are what a decoder reads from digits, to their end."""
    at = 0
    for difference in found:
        length = next((n for n in range(1, 17) if digits[at : at + n] in symbols), None)
        if at + (length or NO_CODE_BITS) > len(digits):
            return True
        if length is None:
            at += NO_CODE_BITS
            expected = 0
        else:
            category = symbols[digits[at : at + length]]
            at += length + (category if category < 16 else 0)
            expected = _extended(digits[at - category : at], category)
        if at > len(digits):
            return True
        if difference != expected:
            return False
    return False


def _extended(digits: str, category: int) -> int:
    """The difference that the bits behind a code say (F.2.2.1, H.1.2.2)."""
    if not category or category == 16:
        return -32_768 if category else 0
    low = int(digits or "0", 2)
    return low if low >> (category - 1) else low - (1 << category) + 1


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
        return NO_TABLES
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
            _add_tables(found, body)
        elif code == 0xDD:
            (found.restart,) = struct.unpack(">H", body)
        elif code == 0xDA:
            found.table, found.predictor, found.shift = body[2] >> 4, body[3], body[5] & 15
            found.header, found.start = at - 2 - length, at
            if found.marker == LOSSLESS and (
                found.table not in found.codes or not 1 <= found.predictor <= 7
            ):
                raise ValueError("no table, or no prediction")
            return found


def _add_tables(found: _Scan, body: bytes) -> None:
    """The tables of a segment DHT (B.2.4.2), and the bits of a difference by its magnitude."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        bits = np.full(17, NO_CODE, np.uint8)
        for symbol, length in zip(symbols, np.repeat(np.arange(1, 17), list(counts)), strict=True):
            if symbol <= 16:
                bits[symbol] = length + (symbol if symbol < 16 else 0)
        found.codes[body[at]], found.tables[body[at]] = bits, (counts, symbols)
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
