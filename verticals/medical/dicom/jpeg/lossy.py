"""Lossy JPEG (ITU-T T.81), refused where its decoder notices damage.

The format has no check sum. Where coded data end early, go on too long or hold a code that no table
has, libjpeg warns and goes on with grey; here each of its warnings is an error. Of 12 bits, which
the strict decoder does not know, the coded data are read by it as if they were of 8: the Huffman
codes are the same, and only whether they can be read counts.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from plinth.verticals.medical.dicom.jpeg.lossless import PADDING, segment
from plinth.verticals.medical.volumes.volume import Array

PACKAGE = "simplejpeg"
SCAN = 0xDA
"""Marker SOS."""
SEQUENTIAL = (0xC0, 0xC1)
"""Markers SOF0 and SOF1."""


class DamagedStream(ValueError):
    """A code stream that was not made as it is; says what is wrong with it."""


def decode_lossy(library: Any, frame: bytes, at: int) -> Array:
    """The values of a code stream of one component.

    Args:
        library: imagecodecs, which decodes more than 8 bits.
        frame: the code stream, from SOI to EOI.
        at: where its frame header is.

    Returns:
        (rows, columns) uint8, or uint16 of more than 8 bits.

    Raises:
        DamagedStream: libjpeg warns of it.
        ValueError: it cannot be decoded.
    """
    precision = frame[at + 4]
    values = _strictly(_plain(frame, at))
    if precision == 8:
        return values
    decoded: Array = library.jpeg8_decode(frame)
    return decoded


def _plain(frame: bytes, at: int) -> bytes:
    """The code stream with 8 bits and, if it is sequential, the spectrum that it then has to name.

    Some encoders name another (B.2.3), which libjpeg warns of and ignores.
    """
    plain = bytearray(frame)
    plain[at + 4] = 8
    scan = segment(frame, (SCAN,), at)
    if frame[at + 1] in SEQUENTIAL and frame[scan + 4] == 1:
        plain[scan + 7 : scan + 10] = bytes((0, 63, 0))
    return bytes(plain)


def _strictly(frame: bytes) -> Array:
    """Read with every warning as an error; a few bytes of padding before the end mark are none."""
    strict: Any = importlib.import_module(PACKAGE)
    try:
        read: Array = strict.decode_jpeg(frame, "GRAY", strict=True)
    except ValueError as error:
        end = frame.rindex(b"\xff\xd9")
        padding = re.search(rb"[\x00\xff]{0,%d}$" % PADDING, frame[:end])
        if "extraneous" not in str(error) or not padding or not padding[0]:
            raise DamagedStream(str(error)) from None
        return _strictly(frame[: end - len(padding[0])] + b"\xff\xd9")
    return read[..., 0]
