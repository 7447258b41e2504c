"""Decode one compressed frame (PS3.5 A.4) to stored values, each syntax by one library."""

from __future__ import annotations

import importlib
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, SecondaryCaptureImageStorage

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.header import Header
from plinth.verticals.medical.volumes.volume import Array

Decoder = Callable[[Any, bytes, Header], bytes | bytearray]


@dataclass(frozen=True, slots=True)
class Codec:
    """How to decode a transfer syntax.

    Args:
        package: what to ``pip install``.
        module: what it imports as.
        decode: (module, frame, header) to the bytes of the stored values, little endian.
        size: (rows, columns) that the code stream itself states, if it does.
        end: marker at the end of a whole code stream, if the format has one.
    """

    package: str
    module: str
    decode: Decoder
    size: Callable[[bytes], tuple[int, int]] | None = None
    end: bytes = b""


def _jpeg_ls(module: Any, frame: bytes, _: Header) -> bytes | bytearray:
    decoded: bytearray = module.decode_pixel_data(frame)[0]
    return decoded


def _jpeg_ls_size(frame: bytes) -> tuple[int, int]:
    """From the frame header SOF55 (ITU-T T.87, C.2.2)."""
    rows, columns = struct.unpack_from(">HH", frame, frame.index(b"\xff\xf7") + 5)
    return rows, columns


def _jpeg_2000_size(frame: bytes) -> tuple[int, int]:
    """From the marker SIZ, which follows SOC (ITU-T T.800, A.5.1)."""
    at = frame.index(b"\xff\x4f\xff\x51") + 8
    right, bottom, left, top = struct.unpack_from(">IIII", frame, at)
    return bottom - top, right - left


def _jpeg_2000(module: Any, frame: bytes, _: Header) -> bytes | bytearray:
    decoded: bytearray = module.decode_pixel_data(frame, version=2)
    return decoded


def _rle(module: Any, frame: bytes, header: Header) -> bytes | bytearray:
    decoded: bytearray = module.decode_pixel_data(
        frame,
        version=2,
        rows=header.rows,
        columns=header.columns,
        bits_allocated=header.bits_allocated,
    )
    return decoded


def _jpeg(module: Any, frame: bytes, header: Header) -> bytes | bytearray:
    """JPEG baseline, extended and lossless through SimpleITK, which reads nothing but files.

    The file holds this frame alone and no rescale, so that every codec gives stored values.
    """
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = header.rows, header.columns
    image.BitsAllocated, image.BitsStored = header.bits_allocated, header.bits_stored
    image.HighBit, image.PixelRepresentation = header.high_bit, 0
    image.PixelData = encapsulate([frame])
    image["PixelData"].VR = "OB"
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = UID(header.syntax)
    reader = module.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        image.save_as(file, enforce_file_format=True)
        file.flush()
        reader.SetFileName(file.name)
        values: Array = module.GetArrayFromImage(reader.Execute())
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


_JPEG = Codec("SimpleITK", "SimpleITK", _jpeg, end=b"\xff\xd9")
_JPEG_LS = Codec("pyjpegls", "jpeg_ls", _jpeg_ls, _jpeg_ls_size, b"\xff\xd9")
_JPEG_2000 = Codec("pylibjpeg-openjpeg", "openjpeg", _jpeg_2000, _jpeg_2000_size, b"\xff\xd9")

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


def syntax_name(syntax: str) -> str:
    """Name and UID of a transfer syntax."""
    name = UID(syntax).name
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

    Raises:
        InputError: names the file, the syntax and the package to install.
    """
    codec = CODECS.get(header.syntax)
    if codec is not None:
        _library(codec.module, codec.package, header)
    else:
        raise InputError(
            f"{header.source.name} is stored as {syntax_name(header.syntax)}, which is not read",
            field=header.source.name,
            hint="convert it to an uncompressed transfer syntax (gdcmconv --raw, dcmdjpeg)",
            reason="unsupported_syntax",
        )


def decode_frame(header: Header, fragments: bytes, index: int) -> Array:
    """One frame of an encapsulated file as stored bits, (y, x), any unsigned width.

    Args:
        header: facts of the file.
        fragments: the pixel data's value: offset table and fragments (PS3.5 A.4).
        index: frame from 0.

    Raises:
        InputError: truncated or damaged stream, or one of another size than the header says.
    """
    codec = CODECS[header.syntax]
    module = _library(codec.module, codec.package, header)
    check_fragments(header, fragments)
    try:
        frame = get_frame(fragments, index, number_of_frames=header.frames)
    except (ValueError, IndexError, struct.error) as error:
        raise _broken(header, str(error)) from None
    if codec.end and not frame.rstrip(b"\0\xff").endswith(codec.end):
        raise _broken(
            header, f"frame {index + 1} ends after {len(frame)} bytes without its end mark"
        )
    _check_size(codec, header, frame)
    try:
        decoded = codec.decode(module, frame, header)
    except (RuntimeError, ValueError, TypeError, OSError, MemoryError) as error:
        raise _broken(header, f"{type(error).__name__} in the decoder") from None
    pixels = header.rows * header.columns
    width = len(decoded) // pixels
    if width not in (1, 2, 4) or len(decoded) != pixels * width:
        raise _broken(header, f"{len(decoded)} bytes decoded for {pixels} pixels")
    return np.frombuffer(decoded, dtype=f"<u{width}").reshape(header.rows, header.columns)


def _check_size(codec: Codec, header: Header, frame: bytes) -> None:
    """A code stream of another size than the header's would be decoded into other memory."""
    if codec.size is None:
        return
    try:
        rows, columns = codec.size(frame)
    except (ValueError, struct.error):
        raise _broken(header, "its code stream states no size") from None
    if (rows, columns) != (header.rows, header.columns):
        expected = f"{header.columns} x {header.rows}"
        raise _broken(header, f"its code stream is {columns} x {rows} pixels, not {expected}")


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
