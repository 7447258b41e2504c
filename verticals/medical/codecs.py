"""Decode one compressed frame (PS3.5 A.4) to stored values, each syntax by one library."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydicom.encaps import get_frame
from pydicom.uid import UID

from engine.errors import InputError
from verticals.medical.header import Header
from verticals.medical.source import Source
from verticals.medical.volume import Array

Decoder = Callable[[Any, bytes, Header], bytes | bytearray]


@dataclass(frozen=True, slots=True)
class Codec:
    """How to decode a transfer syntax.

    Args:
        package: what to ``pip install``.
        module: what it imports as.
        decode: (module, frame, header) to the bytes of the stored values, little endian.
        end: marker at the end of a whole code stream, if the format has one.
    """

    package: str
    module: str
    decode: Decoder
    end: bytes = b""


def _jpeg_ls(module: Any, frame: bytes, _: Header) -> bytes | bytearray:
    decoded: bytearray = module.decode_pixel_data(frame)[0]
    return decoded


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


_JPEG_LS = Codec("pyjpegls", "jpeg_ls", _jpeg_ls, b"\xff\xd9")
_JPEG_2000 = Codec("pylibjpeg-openjpeg", "openjpeg", _jpeg_2000, b"\xff\xd9")

CODECS = {
    "1.2.840.10008.1.2.5": Codec("pylibjpeg-rle", "rle", _rle),
    "1.2.840.10008.1.2.4.80": _JPEG_LS,
    "1.2.840.10008.1.2.4.81": _JPEG_LS,
    "1.2.840.10008.1.2.4.90": _JPEG_2000,
    "1.2.840.10008.1.2.4.91": _JPEG_2000,
    "1.2.840.10008.1.2.4.201": _JPEG_2000,
    "1.2.840.10008.1.2.4.202": _JPEG_2000,
    "1.2.840.10008.1.2.4.203": _JPEG_2000,
}

WHOLE_FILE = {
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
}
"""JPEG baseline, extended and lossless: read by SimpleITK, which wants the whole file."""


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
    elif header.syntax in WHOLE_FILE:
        _library("SimpleITK", "SimpleITK", header)
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
    except (ValueError, IndexError) as error:
        raise _broken(header, str(error)) from None
    if codec.end and not frame.rstrip(b"\0\xff").endswith(codec.end):
        raise _broken(
            header, f"frame {index + 1} ends after {len(frame)} bytes without its end mark"
        )
    try:
        decoded = codec.decode(module, frame, header)
    except (RuntimeError, ValueError, TypeError, OSError, MemoryError) as error:
        raise _broken(header, f"{type(error).__name__} in the decoder") from None
    pixels = header.rows * header.columns
    width = len(decoded) // pixels
    if width not in (1, 2, 4) or len(decoded) != pixels * width:
        raise _broken(header, f"{len(decoded)} bytes decoded for {pixels} pixels")
    return np.frombuffer(decoded, dtype=f"<u{width}").reshape(header.rows, header.columns)


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
    if at > len(data):
        raise truncated(header, header.size + at - len(data))


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


def decode_whole(header: Header) -> Array:
    """All frames of a JPEG file through SimpleITK, (frames, y, x), already rescaled.

    ITK applies the file's own slope and intercept, so the values are in modality units.
    """
    sitk = _library("SimpleITK", "SimpleITK", header)
    with ExitStack() as held:
        path = held.enter_context(_on_disk(header.source))
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            values: Array = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise _broken(header, str(error).strip().splitlines()[-1][:120]) from None
    if values.size != header.frames * header.rows * header.columns:
        raise _broken(header, f"{values.size} values decoded")
    return values.reshape(header.frames, header.rows, header.columns)


class _on_disk:
    """The source as a path: itself, or a temporary copy of an archive's member."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.copy: IO[bytes] | None = None

    def __enter__(self) -> Path:
        if self.source.member is None:
            return self.source.path
        self.copy = tempfile.NamedTemporaryFile(suffix=".dcm")
        with self.source.open() as (stream, _):
            self.copy.write(stream.read())
        self.copy.flush()
        return Path(self.copy.name)

    def __exit__(self, *_: object) -> None:
        if self.copy is not None:
            self.copy.close()
