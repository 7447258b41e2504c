"""Decode one compressed frame (PS3.5 A.4) to stored values, each syntax by one library."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.encaps import get_frame
from pydicom.uid import UID

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.header import Header
from plinth.verticals.medical.dicom.jpeg.lossless import (
    LOSSLESS,
    WrongLength,
    decode_lossless,
    frame_header,
)
from plinth.verticals.medical.dicom.jpeg.lossy import PACKAGE, DamagedStream, decode_lossy
from plinth.verticals.medical.volumes.volume import Array

Decoder = Callable[[Any, bytes, Header], bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """What a code stream says of itself.

    Args:
        rows: of its image.
        columns: of its image.
        components: values of a pixel.
        precision: bits of a value, ``None`` where the header is right about them.
        lossy: it was made in a way that changes values, whatever the header says.
    """

    rows: int
    columns: int
    components: int
    precision: int | None = None
    lossy: bool = False


@dataclass(frozen=True, slots=True)
class Decoded:
    """One frame.

    Args:
        stored: stored bits (y, x) of any unsigned width.
        precision: bits of a value by its code stream, ``None`` where the format states none.
        lossy: the code stream says that values were changed.
    """

    stored: Array
    precision: int | None = None
    lossy: bool = False


@dataclass(frozen=True, slots=True)
class Codec:
    """How to decode a transfer syntax.

    Args:
        package: what to ``pip install``.
        module: what it imports as.
        decode: (module, frame, header) to the bytes of the stored values, little endian.
        facts: what the code stream itself states, if it does.
        end: marker at the end of a whole code stream, if the format has one.
        check: why a code stream was not made of the values decoded from it, if that can be told.
    """

    package: str
    module: str
    decode: Decoder
    facts: Callable[[bytes], StreamFacts] | None = None
    end: bytes = b""
    check: Callable[[bytes, Array], str | None] | None = None


def _jpeg_ls(module: Any, frame: bytes, _: Header) -> bytes | bytearray | memoryview:
    decoded: bytearray = module.decode_pixel_data(frame)[0]
    return decoded


def _jpeg_ls_facts(frame: bytes) -> StreamFacts:
    """From the frame header SOF55 and the scan header, with NEAR (ITU-T T.87, C.2.2 and C.2.3)."""
    at = frame.index(b"\xff\xf7") + 4
    precision, rows, columns, components = struct.unpack_from(">BHHB", frame, at)
    scan = frame.index(b"\xff\xda", at)
    near = frame[scan + 5 + 2 * frame[scan + 4]]
    return StreamFacts(rows, columns, components, precision, near > 0)


def _jpeg_facts(frame: bytes) -> StreamFacts:
    """From the frame header.

    The precision is left to the header: encoders write 16 where 12 bits are stored.
    """
    _, rows, columns, components = struct.unpack_from(">BHHB", frame, frame_header(frame) + 4)
    return StreamFacts(rows, columns, components)


def _jpeg_2000_facts(frame: bytes) -> StreamFacts:
    """From the markers SIZ, which follows SOC, and COD (ITU-T T.800, A.5.1 and A.6.1).

    The wavelet 5-3 gives values back; 9-7 does not.
    """
    at = frame.index(b"\xff\x4f\xff\x51") + 8
    right, bottom, left, top = struct.unpack_from(">IIII", frame, at)
    components, depth = struct.unpack_from(">HB", frame, at + 32)
    coding = frame.index(b"\xff\x52", at)
    lossy = frame[coding + 13] == 0
    return StreamFacts(bottom - top, right - left, components, (depth & 0x7F) + 1, lossy)


def _jpeg_2000_parts(frame: bytes, _: Array) -> str | None:
    """Each tile-part states its length (marker SOT, A.4.2): they end where the code stream does."""
    end = frame.rindex(b"\xff\xd9")
    at = frame.index(b"\xff\x4f\xff\x51") + 2
    try:
        while frame[at : at + 2] != b"\xff\x90":
            at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])
        while at < end:
            mark, _, _, length = struct.unpack_from(">HHHI", frame, at)
            if mark != 0xFF90:
                return "its tile-parts are not as long as they say"
            at += length or end - at
    except struct.error:
        return "its tile-parts do not follow one another"
    return None if at == end else "its tile-parts are not as long as they say"


def _rle(module: Any, frame: bytes, header: Header) -> bytes | bytearray | memoryview:
    decoded: bytearray = module.decode_pixel_data(
        frame,
        version=2,
        rows=header.rows,
        columns=header.columns,
        bits_allocated=header.bits_allocated,
    )
    return decoded


def _jpeg(module: Any, frame: bytes, header: Header) -> bytes | bytearray | memoryview:
    """JPEG baseline, extended and lossless, of up to 16 bits."""
    at = frame_header(frame)
    if frame[at + 1] == LOSSLESS:
        return _stored(decode_lossless(module.jpeg8_decode, frame, at, header.bits_stored))
    return _stored(decode_lossy(module, frame, at))


def _jpeg_2000(module: Any, frame: bytes, _: Header) -> bytes | bytearray | memoryview:
    return _stored(module.jpeg2k_decode(frame))


def _stored(values: Array) -> memoryview:
    """Their bytes, little endian, in the memory that the decoder wrote them to."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


_JPEG = Codec("imagecodecs", "imagecodecs", _jpeg, _jpeg_facts, b"\xff\xd9")
_JPEG_LS = Codec("pyjpegls", "jpeg_ls", _jpeg_ls, _jpeg_ls_facts, b"\xff\xd9")
_JPEG_2000 = Codec(
    "imagecodecs", "imagecodecs", _jpeg_2000, _jpeg_2000_facts, b"\xff\xd9", _jpeg_2000_parts
)

CODECS = {
    "1.2.840.10008.1.2.4.50": _JPEG,
    "1.2.840.10008.1.2.4.51": _JPEG,
    "1.2.840.10008.1.2.4.57": _JPEG,
    "1.2.840.10008.1.2.4.70": _JPEG,
    "1.2.840.10008.1.2.5": Codec("pylibjpeg-rle", "rle", _rle),
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.90": _JPEG_2000,
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _JPEG_2000,
    "1.2.840.10008.1.2.4.202": _JPEG_2000,
    "1.2.840.10008.1.2.4.203": _JPEG_2000,
}


FORMATS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
"""First bytes of a code stream, and its format; RLE has no mark."""


JPEG_XL = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
}
"""Names of transfer syntaxes that pydicom does not know yet (PS3.6 table A-1)."""

UNCOMPRESSED = {
    *("1.2.840.10008.1.2", "1.2.840.10008.1.2.1"),
    *("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"),
}


def syntax_name(syntax: str) -> str:
    """Name and UID of a transfer syntax."""
    name = JPEG_XL.get(syntax) or UID(syntax).name
    return syntax if name == syntax else f"{name} ({syntax})"


def _library(codec_module: str, package: str, header: Header) -> Any:
    try:
        return importlib.import_module(codec_module)
    except ImportError:
        raise InputError(
            f"{header.source.name} is stored as {syntax_name(header.syntax)} and its decoder is "
            "not installed",
            field=header.source.name,
            hint=f"pip install {package}",
            reason="no_decoder",
        ) from None


def check_decoder(header: Header) -> None:
    """Fail before any work when a file's transfer syntax cannot be decoded here.

    Uncompressed pixels under the name of a compressed syntax are as they are; under a name that is
    not known they may be in any order of bytes, as in GE's private one.

    Raises:
        InputError: names the file, the syntax and the package to install.
    """
    codec = CODECS.get(header.syntax)
    if not header.encapsulated and (codec is not None or header.syntax in UNCOMPRESSED):
        return
    if codec is not None:
        _library(codec.module, codec.package, header)
        if codec is _JPEG:
            _library(PACKAGE, PACKAGE, header)
    elif header.syntax in UNCOMPRESSED:
        raise _broken(header, "its pixel data are compressed and its transfer syntax is not")
    else:
        raise InputError(
            f"{header.source.name} is stored as {syntax_name(header.syntax)}, which is not read",
            field=header.source.name,
            hint="ask the sender for it uncompressed, as JPEG Lossless, JPEG-LS or JPEG 2000",
            reason="unsupported_syntax",
        )


CODEC_ERRORS = (RuntimeError, ValueError, TypeError, OSError, MemoryError)
PANICS = "pyo3_runtime"
"""Where the exception of a decoder in Rust comes from, which is no Exception and has no import."""


def decode_frame(header: Header, fragments: bytes, index: int) -> Decoded:
    """One frame of an encapsulated file.

    Args:
        header: facts of the file.
        fragments: the pixel data's value: offset table and fragments (PS3.5 A.4).
        index: frame from 0.

    Raises:
        InputError: truncated or damaged stream, or one of another size or format than the
            header says.
    """
    codec = CODECS[header.syntax]
    module = _library(codec.module, codec.package, header)
    check_fragments(header, fragments)
    try:
        frame = get_frame(fragments, index, number_of_frames=header.frames)
    except (ValueError, IndexError, struct.error) as error:
        raise _broken(header, str(error)) from None
    _check_format(header, frame)
    if codec.end and not frame.rstrip(b"\0\xff").endswith(codec.end):
        raise _broken(
            header, f"frame {index + 1} ends after {len(frame)} bytes without its end mark"
        )
    facts = _checked_facts(codec, header, frame)
    try:
        decoded = codec.decode(module, frame, header)
    except WrongLength as error:
        raise _broken(header, str(error)) from None
    except BaseException as error:
        if not isinstance(error, CODEC_ERRORS) and type(error).__module__ != PANICS:
            raise
        told = str(error) if isinstance(error, DamagedStream) else type(error).__name__
        raise _broken(header, f"{told} in the decoder") from None
    pixels = header.rows * header.columns
    width = len(decoded) // pixels
    if width not in (1, 2, 4) or len(decoded) != pixels * width:
        raise _broken(header, f"{len(decoded)} bytes decoded for {pixels} pixels")
    values = np.frombuffer(decoded, dtype=f"<u{width}").reshape(header.rows, header.columns)
    wrong = codec.check(frame, values) if codec.check is not None else None
    if wrong is not None:
        raise _broken(header, wrong)
    return Decoded(values) if facts is None else Decoded(values, facts.precision, facts.lossy)


def _check_format(header: Header, frame: bytes) -> None:
    """The code stream's own mark is that of the declared transfer syntax."""
    found = next((name for mark, name in FORMATS if frame.startswith(mark)), None)
    expected = {_JPEG: "JPEG", _JPEG_LS: "JPEG", _JPEG_2000: "JPEG 2000"}.get(CODECS[header.syntax])
    jpeg_ls = b"\xff\xf7" in frame[:4096] and found == "JPEG"
    if found and found != (expected or found):
        raise _broken(header, f"its code stream is {found}")
    if found == "JPEG" and expected == "JPEG" and jpeg_ls != (CODECS[header.syntax] is _JPEG_LS):
        raise _broken(header, f"its code stream is JPEG{'-LS' * jpeg_ls}")


def _checked_facts(codec: Codec, header: Header, frame: bytes) -> StreamFacts | None:
    """A code stream of another size than the header's would be decoded into other memory.

    RLE states no size; its shortest run makes 64 times as many bytes (PS3.5 G.3.1).
    """
    if codec.facts is None:
        if header.frame_bytes > 64 * len(frame):
            raise _broken(header, f"{len(frame)} bytes of RLE for {header.frame_bytes} bytes")
        return None
    try:
        facts = codec.facts(frame)
    except (ValueError, IndexError, struct.error):
        raise _broken(header, "its code stream states no size") from None
    if (facts.rows, facts.columns) != (header.rows, header.columns):
        stated, expected = (f"{o.columns} x {o.rows}" for o in (facts, header))
        raise _broken(header, f"its code stream is {stated} pixels, not {expected}")
    if facts.components != 1:
        raise _broken(header, f"its code stream has {facts.components} values in a pixel, not 1")
    return facts


def check_fragments(header: Header, data: bytes) -> None:
    """Walk the fragments' item headers; a fragment beyond the end of the file is an error."""
    at = 0
    while at + 8 <= len(data):
        mark, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if mark == b"\xfe\xff\xdd\xe0":
            return
        if mark != b"\xfe\xff\x00\xe0":
            raise _broken(header, "its fragments are not items")
        at += 8 + length
    if at != len(data):
        needed = at if at > len(data) else at + 8
        raise truncated(header, header.size + needed - len(data))


def truncated(header: Header, expected: int) -> InputError:
    """The error for a file that ends before its pixel data do."""
    return InputError(
        f"{header.source.name} is truncated: {header.size} bytes, its pixel data need {expected}",
        field=header.source.name,
        hint="send the file again",
        reason="truncated",
    )


def _broken(header: Header, what: str) -> InputError:
    return InputError(
        f"{header.source.name} ({header.size} bytes, {syntax_name(header.syntax)}) cannot be "
        f"decoded: {what}",
        field=header.source.name,
        hint="send the file again",
        reason="damaged_pixels",
    )
