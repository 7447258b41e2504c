"""Damage inside code streams: for each codec, which is found and which gives other values silently?

    python benchmarks/dicom_streams.py [--streams 1000] [--seed 7] [--json]

A slice of the chest phantom, 13 bits deep, is packed in each transfer syntax. Each stream is then
changed in its coded data alone, headers and end mark untouched, as if a sender had packed damaged
bytes: bytes lost, bytes doubled, bytes replaced, a bit turned. A change is *found* when the image
is refused, *harmless* when the values stay the same, *silent* when they are others. For lossless
JPEG the values are counted against the length of the stream, for lossy JPEG each warning of the
decoder counts; what the decoders of the other formats do not object to is not found.
"""

from __future__ import annotations

import importlib
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from head import parser_of, print_json
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from plinth.engine import InputError
from plinth.verticals.medical.dicom.codecs import decode_frame
from plinth.verticals.medical.dicom.header import read_frames
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import datasets
from plinth.verticals.medical.source import Source

BITS = 13
SYNTAXES = {
    "JPEG Lossless, predictor 1": JPEGLosslessSV1,
    "JPEG Lossless, predictor 6": JPEGLossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
    "HTJ2K": HTJ2KLossless,
    "RLE": RLELossless,
    "JPEG extended, 12 bits": JPEGExtended12Bit,
    "JPEG baseline, 8 bits": JPEGBaseline8Bit,
}


def packed(image: Dataset, syntax: UID) -> bytes:
    """One code stream of an image's stored values."""
    library: Any = importlib.import_module("imagecodecs")
    stored = np.frombuffer(image.PixelData, "<u2").reshape(image.Rows, image.Columns)
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        predictor = 1 if syntax == JPEGLosslessSV1 else 6
        how = {"lossless": True, "predictor": predictor, "bitspersample": BITS}
        return bytes(library.jpeg8_encode(stored, **how))
    if syntax == JPEGExtended12Bit:
        return bytes(library.jpeg8_encode(stored >> 1, level=95, bitspersample=12))
    if syntax == JPEGBaseline8Bit:
        return bytes(library.jpeg8_encode((stored >> 5).astype(np.uint8), level=95))
    if syntax == JPEGLSLossless:
        return bytes(importlib.import_module("jpeg_ls").encode(stored).tobytes())
    if syntax == JPEG2000Lossless:
        return bytes(library.jpeg2k_encode(stored, bitspersample=BITS, codecformat="j2k", level=0))
    if syntax == HTJ2KLossless:
        return bytes(library.htj2k_encode(stored))
    image.compress(RLELossless, generate_instance_uid=False)
    return next(generate_frames(image.PixelData, number_of_frames=1))


def coded(stream: bytes, syntax: UID) -> tuple[int, int]:
    """Where the coded data of a stream begin and end."""
    if syntax == RLELossless:
        return 64, len(stream)
    mark = b"\xff\x93" if stream.startswith(b"\xff\x4f") else b"\xff\xda"
    start = stream.index(mark) + 2
    if mark == b"\xff\xda":
        start += int.from_bytes(stream[start : start + 2], "big")
    return start, stream.rindex(b"\xff\xd9")


def lost(chance: random.Random, data: bytearray, at: int) -> None:
    """One to eight bytes less."""
    del data[at : at + chance.choice((1, 1, 2, 4, 8))]


def doubled(chance: random.Random, data: bytearray, at: int) -> None:
    """One to eight bytes twice."""
    data[at:at] = data[at : at + chance.choice((1, 1, 2, 4, 8))]


def replaced(chance: random.Random, data: bytearray, at: int) -> None:
    """One to eight other bytes."""
    count = min(chance.choice((1, 1, 2, 4, 8)), len(data) - at)
    data[at : at + count] = chance.randbytes(count)


def turned(chance: random.Random, data: bytearray, at: int) -> None:
    """One bit."""
    data[at] ^= 1 << chance.randrange(8)


CHANGES: dict[str, Callable[[random.Random, bytearray, int], None]] = {
    "bytes lost": lost,
    "bytes doubled": doubled,
    "bytes replaced": replaced,
    "a bit turned": turned,
}


def damaged(stream: bytes, syntax: UID, how: str, chance: random.Random) -> bytes:
    """A stream with one change in its coded data."""
    start, end = coded(stream, syntax)
    data = bytearray(stream[start:end])
    CHANGES[how](chance, data, chance.randrange(len(data)))
    return stream[:start] + bytes(data) + stream[end:]


def counts(
    syntax: UID, folder: Path, streams: int, seed: int
) -> Iterator[tuple[str, Counter[str]]]:
    """What became of so many streams with each kind of change.

    Args:
        syntax: of the streams.
        folder: for the file they are of.
        streams: of each kind of change.
        seed: of the changes.
    """
    image = next(iter(datasets(Phantom(shape=(128, 112, 3), spacing=(2.6, 2.6, 60.0)))))
    image.BitsStored, image.HighBit = 16, 15
    if syntax == JPEGBaseline8Bit:
        image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    stream = packed(image, syntax)
    image.PixelData = encapsulate([stream])
    image["PixelData"].VR = "OB"
    image["PixelData"].is_undefined_length = True
    image.file_meta.TransferSyntaxUID = syntax
    path = folder / "image.dcm"
    image.save_as(path, enforce_file_format=True)
    header = read_frames(Source(path))[0].header
    whole = decode_frame(header, image.PixelData, 0).stored
    for how in CHANGES:
        chance, found = random.Random(f"{seed} {how}"), Counter[str]()
        for _ in range(streams):
            changed = damaged(stream, syntax, how, chance)
            try:
                values = decode_frame(header, encapsulate([changed]), 0).stored
            except InputError:
                found["found"] += 1
            else:
                found["harmless" if np.array_equal(values, whole) else "silent"] += 1
        yield how, found


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--streams", type=int, default=1000, help="of each codec and change")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = {
            name: dict(counts(syntax, Path(folder), given.streams, given.seed))
            for name, syntax in SYNTAXES.items()
        }
    if given.json:
        print_json(told)
        return
    print(f"| found of those that change values | {' | '.join(CHANGES)} |")
    print(f"|{'---|' * (len(CHANGES) + 1)}")
    for name, by_change in told.items():
        cells = [
            f"{found['found'] / max(1, found['found'] + found['silent']):.1%}"
            for found in by_change.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
