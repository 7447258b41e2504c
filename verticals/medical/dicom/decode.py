"""Pixels of a stack into one preallocated array, in the smallest type that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from plinth.engine.errors import InputError
from plinth.engine.parallel import spread
from plinth.verticals.medical.dicom import codecs
from plinth.verticals.medical.dicom.header import BIG_ENDIAN, UNDEFINED, Frame, Header
from plinth.verticals.medical.source import DEFLATED, Source, inflate
from plinth.verticals.medical.volumes.volume import Array

CT_AIR, CT_TOP = -1024, 3071
"""Padding outside this range of HU is replaced by CT_AIR."""

INT16 = np.iinfo(np.int16)

MAX_BYTES = 4 << 30
"""Bytes of the largest volume that is read, unless the caller says otherwise."""

DENSE, MAX_RATIO = 256 << 20, 1000
"""A volume of more bytes may be at most this many times as large as its compressed pixel data:
JPEG 2000 of air packs more densely, but not a whole series of hundreds of MB."""


class _TooWide(Exception):
    """A value does not fit int16."""


def decode(
    frames: Sequence[Frame], max_bytes: int = MAX_BYTES, lossy: set[int] | None = None
) -> Array:
    """Read the pixels of frames of one size, in the order given.

    Every slice is rescaled by its own slope and intercept (PS3.3 C.11.1). The result is int16
    when all of them are whole numbers and all values fit, else float32. Bits beyond Bits
    Stored are masked. Padding (PS3.3 C.7.5.1.1.2) of CT images that lies outside -1024 to 3071
    HU becomes -1024 HU.

    Args:
        frames: scalar images of equal rows and columns.
        max_bytes: what the result may take; what would take more is refused before any of it is.
        lossy: gets the numbers of those whose code stream says that values were changed.

    Returns:
        (len(frames), rows, columns) int16 or float32, modality units.

    Raises:
        InputError: truncated or damaged file, or a transfer syntax without decoder; names the
            file, its bytes and what to install.
    """
    for header in {frame.header.syntax: frame.header for frame in reversed(frames)}.values():
        codecs.check_decoder(header)
    _check_sizes(frames, max_bytes)
    lossy = set() if lossy is None else lossy
    whole = all(frame.slope.is_integer() and frame.intercept.is_integer() for frame in frames)
    if whole:
        try:
            return _decode_as(frames, np.int16, lossy)
        except _TooWide:
            pass
    _check_bytes(frames, np.float32, max_bytes)
    return _decode_as(frames, np.float32, lossy)


def _check_sizes(frames: Sequence[Frame], max_bytes: int) -> None:
    """Refuse before anything is allocated: pixels that are not there, or too many of them."""
    _check_bytes(frames, np.int16, max_bytes)
    headers = {id(frame.header): frame.header for frame in frames}.values()
    packed = 0
    for header in headers:
        if header.encapsulated:
            packed += header.size - header.offset
        else:
            _check(header)
    header = frames[0].header
    unpacked = sum(frame.header.encapsulated for frame in frames) * header.frame_bytes
    if unpacked > max(DENSE, MAX_RATIO * packed):
        raise _too_large(frames, f"{unpacked} bytes from {packed} compressed ones")


def _check_bytes(frames: Sequence[Frame], dtype: type[np.generic], max_bytes: int) -> None:
    header = frames[0].header
    wanted = len(frames) * header.rows * header.columns * np.dtype(dtype).itemsize
    if wanted > max_bytes:
        raise _too_large(frames, f"{wanted} bytes, at most {max_bytes} are read")


def _too_large(frames: Sequence[Frame], why: str) -> InputError:
    header = frames[0].header
    return InputError(
        f"{len(frames)} images of {header.columns} x {header.rows} from {header.source.name} on "
        f"are {why}",
        field=header.source.name,
        hint="load a part of the series, or raise max_volume_mb if it is what it says",
        reason="too_large",
    )


def _decode_as(frames: Sequence[Frame], dtype: type[np.generic], lossy: set[int]) -> Array:
    header = frames[0].header
    out = _room((len(frames), header.rows, header.columns), dtype, header)
    by_file: dict[Source, list[int]] = {}
    for k, frame in enumerate(frames):
        by_file.setdefault(frame.header.source, []).append(k)
    files = [[(k, frames[k]) for k in slices] for slices in by_file.values()]
    if header.encapsulated and len(files) > 1:
        spread(lambda slices: _read_file(out, slices, lossy), files)
    else:
        for slices in files:
            _read_file(out, slices, lossy)
    return out


def _room(shape: tuple[int, int, int], dtype: type[np.generic], header: Header) -> Array:
    """The array for a volume that fits the limits, and may still not fit the machine."""
    try:
        return np.empty(shape, dtype=dtype)
    except MemoryError:
        z, y, x = shape
        raise InputError(
            f"{z} images of {x} x {y} from {header.source.name} on do not fit the memory of this "
            "machine",
            field=header.source.name,
            hint="load a part of the series, or where there is more memory",
            reason="too_large",
        ) from None


def _read_file(out: Array, slices: list[tuple[int, Frame]], lossy: set[int]) -> None:
    """All wanted frames of one file into their slices of ``out``."""
    header = slices[0][1].header
    if header.encapsulated:
        fragments = _value(header)

        def read(one: tuple[int, Frame]) -> None:
            k, frame = one
            made = codecs.decode_frame(header, fragments, frame.index)
            _finish(out[k], made.stored, frame, made.precision)
            if made.lossy:
                lossy.add(k)

        spread(read, slices)
    elif _direct(header, out):
        _read_direct(out, slices)
    else:
        order = ">" if header.syntax == BIG_ENDIAN else "<"
        data = _value(header)
        kind = np.dtype(f"{order}u{header.bits_allocated // 8}")
        count = header.rows * header.columns
        for k, frame in slices:
            stored = np.frombuffer(data, kind, count, frame.index * header.frame_bytes)
            image = stored.reshape(header.rows, header.columns).astype(kind.newbyteorder("="))
            _finish(out[k], image, frame)


def _direct(header: Header, out: Array) -> bool:
    """Stored bytes can be read straight into the result."""
    return out.dtype == np.int16 and header.bits_allocated == 16 and header.syntax != DEFLATED


def _read_direct(out: Array, slices: list[tuple[int, Frame]]) -> None:
    header = slices[0][1].header
    with header.source.open() as (stream, _):
        for k, frame in slices:
            stream.seek(_check(header) + frame.index * header.frame_bytes)
            image = out[k].view(np.uint16)
            if stream.readinto(memoryview(cast(Any, image)).cast("B")) != header.frame_bytes:  # type: ignore[attr-defined]
                raise codecs.truncated(header, header.size + header.frame_bytes)
            if header.syntax == BIG_ENDIAN:
                image.byteswap(inplace=True)
            _finish(out[k], image, frame)


def _check(header: Header) -> int:
    """Offset of the uncompressed pixels, after their declared and real lengths were checked."""
    needed = header.frame_bytes * header.frames
    if header.size < header.offset + needed:
        raise codecs.truncated(header, header.offset + needed)
    excess = header.length - needed
    row = header.frame_bytes // header.rows
    if header.length != UNDEFINED and not 0 <= excess <= max(1, row):
        raise InputError(
            f"{header.source.name}: pixel data of {header.length} bytes, "
            f"{header.rows} x {header.columns} x {header.frames} pixels need {needed}",
            field=header.source.name,
            hint="ask the sender for the original image",
            reason="damaged_pixels",
        )
    return header.offset


def _value(header: Header) -> bytes:
    """The bytes of the pixel data's value, to the end of the file when compressed."""
    offset = header.offset if header.encapsulated else _check(header)
    with header.source.open() as (file, _):
        stream = inflate(file)[0] if header.syntax == DEFLATED else file
        stream.seek(offset)
        return stream.read(-1 if header.encapsulated else header.frame_bytes * header.frames)


# -- stored values to modality values --------------------------------------------------------
def _finish(out: Array, stored: Array, frame: Frame, precision: int | None = None) -> None:
    """Mask and sign stored bits, rescale, replace padding; ``stored`` may share ``out``."""
    header = frame.header
    beside = _padding_beside(stored, header)
    if precision is None:
        _check_spare_bits(stored, header, beside)
    values = _significant(stored, header, precision)
    if out.dtype == np.int16:
        _rescale_whole(out, values, frame, max(header.bits_stored, precision or 0))
    else:
        np.copyto(out, values * frame.slope + frame.intercept, casting="same_kind")
    _replace_padding(out, frame)
    if beside is not None:
        out[beside] = CT_AIR


def _padding_beside(stored: Array, header: Header) -> Array | None:
    """Where a CT image holds padding that takes more bits than Bits Stored has.

    Such as -2000 as 63536 in an image of 12 bits: its low bits alone would be bone.
    """
    bits = header.bits_stored
    if header.padding is None or header.modality != "CT" or header.high_bit != bits - 1:
        return None
    (low, high), most = header.padding, 1 << (bits - header.signed)
    if high < most and low >= (-most if header.signed else 0):
        return None
    width = stored.dtype.itemsize
    raw = stored.view(f"{'i' if header.signed else 'u'}{width}")
    found: Array = (raw >= low) & (raw <= high)
    return found


def _check_spare_bits(stored: Array, header: Header, beside: Array | None) -> None:
    """Refuse an image that uses bits beyond Bits Stored, and does not say for what.

    They are no part of a value (PS3.5 8.1.1), and hold the sign, one pattern in all pixels, or an
    overlay that the header names. All else is values that Bits Stored would cut.

    Args:
        stored: as they lie in the file.
        header: of the image.
        beside: of :func:`_padding_beside`.
    """
    bits, width = header.bits_stored, stored.dtype.itemsize * 8
    if header.overlaid or header.high_bit != bits - 1 or not 1 <= bits < width:
        return
    whole = stored.view(f"{'i' if header.signed else 'u'}{width // 8}")
    if _within(whole, bits):
        return
    shown = whole if beside is None else whole[~beside]
    if _within(shown, bits):
        return
    spare = shown >> bits
    if not (spare == spare.flat[0]).all():
        raise InputError(
            f"{header.source.name}: Bits Stored is {bits}, but values from {shown.min()} to "
            f"{shown.max()} are there, and no overlay that would lie in the bits beyond it",
            field="BitsStored",
            hint="ask the sender for the original image",
            reason="damaged_pixels",
        )


def _within(values: Array, bits: int) -> bool:
    """Whether the bits beyond are 0 in all values, or hold the sign in all of them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return high < 1 << (bits - 1 if low < 0 else bits) and low >= -(1 << (bits - 1))


def _significant(stored: Array, header: Header, precision: int | None) -> Array:
    """Bits Stored bits up to High Bit, sign-extended for signed images; in place if writable.

    A code stream that states another precision is right about it: the bits that were coded hold
    the sign (the header of such files describes the container).
    """
    width = stored.dtype.itemsize * 8
    bits, high = header.bits_stored, header.high_bit
    if not 1 <= bits <= high + 1 <= header.bits_allocated:
        raise InputError(
            f"{header.source.name}: Bits Stored {bits} and High Bit {high} of "
            f"{header.bits_allocated} allocated make no sense",
            field="BitsStored",
            hint="ask the sender for the original image",
            reason="damaged_pixels",
        )
    if precision is not None and precision != high + 1:
        bits, high = precision, precision - 1
    drop = 0 if header.encapsulated and high + 1 > width else high + 1 - bits
    values = stored if stored.flags.writeable else stored.copy()
    if drop:
        values >>= drop
    spare = width - bits
    if spare > 0 and not header.signed:
        values &= (1 << bits) - 1
    if not header.signed:
        return values
    signed = values.view(f"i{values.dtype.itemsize}")
    if spare > 0:
        signed <<= spare
        signed >>= spare
    return signed


def _rescale_whole(out: Array, values: Array, frame: Frame, bits: int) -> None:
    """Whole slope and intercept in int16; wrap-around arithmetic is exact if the ends fit."""
    header = frame.header
    slope, intercept = int(frame.slope), int(frame.intercept)
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if header.signed else (0, (1 << bits) - 1)
    if not _fits(ends, slope, intercept):
        ends = int(values.min()), int(values.max())
        if not _fits(ends, slope, intercept):
            raise _TooWide
    if not np.shares_memory(out, values):
        np.copyto(
            out, values.astype(np.int64) if values.dtype.itemsize > 2 else values, casting="unsafe"
        )
    wrapped = out.view(np.uint16)
    if slope != 1:
        wrapped *= np.uint16(slope % 65536)
    if intercept:
        wrapped += np.uint16(intercept % 65536)


def _fits(ends: tuple[int, int], slope: int, intercept: int) -> bool:
    first, last = (end * slope + intercept for end in ends)
    return INT16.min <= min(first, last) and max(first, last) <= INT16.max


def _replace_padding(out: Array, frame: Frame) -> None:
    header = frame.header
    if header.padding is None or header.modality != "CT":
        return
    low, high = sorted(value * frame.slope + frame.intercept for value in header.padding)
    if low >= CT_AIR and high <= CT_TOP:
        return
    if low == high:
        out[out == out.dtype.type(low) if _holds(out, low) else np.zeros((), bool)] = CT_AIR
    else:
        out[(out >= low) & (out <= high)] = CT_AIR


def _holds(out: Array, value: float) -> bool:
    return out.dtype.kind == "f" or INT16.min <= value <= INT16.max


def padding_hu(frame: Frame) -> tuple[float, float] | None:
    """Padding of a CT frame in HU, lower end first, if it declares any."""
    if frame.header.padding is None or frame.header.modality != "CT":
        return None
    low, high = sorted(value * frame.slope + frame.intercept for value in frame.header.padding)
    return low, high
