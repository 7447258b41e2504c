"""The frames of a binary SEG as bytes: those that highdicom writes, without its objects for each.

A SEG of a long series has many hundreds of frames that differ in a number, a place and a reference.
highdicom makes the head, and of one frame what all share; the rest is put together here. The
file is the same, byte by byte, as far as :func:`matched` says that it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydicom import DataElement, Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.valuerep import DS, format_number_as_ds

from plinth.verticals.medical.volumes.labelled import slices_with
from plinth.verticals.medical.volumes.volume import Volume

Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]
Head = Any
"""A ``highdicom.seg.Segmentation`` in Explicit VR Little Endian."""

FRAMES, PIXELS = 0x52009230, 0x7FE00010
"""Per-Frame Functional Groups Sequence and Pixel Data, the last elements of a SEG."""

SOP_CLASS, SOP_INSTANCE = 0x00081150, 0x00081155
"""Referenced SOP Class UID and Referenced SOP Instance UID."""

AT_ONCE = 8
"""Frames that are packed together, so that whatever their size they end at a byte."""

EXACT, EXACT_MM = 1e-5, 1e-3
"""How far direction and spacing, and places, of images may be off the volume's slices."""


def matched(volume: Volume, images: Sequence[Dataset] | None) -> bool:
    """Whether each slice of a volume is one single-frame image, in the same place.

    Args:
        volume: read from DICOM.
        images: the header of each slice's image; ``None`` where slices were interpolated.
    """
    if not images or any("NumberOfFrames" in one for one in images):
        return False
    shared = {
        (one.get("Rows"), one.get("Columns"), *(str(one.get(key)) for key in SHARED))
        for one in images
    }
    if len(shared) > 1 or len({one.SOPInstanceUID for one in images}) < len(images):
        return False
    first = images[0]
    orientation, spacing = first.get("ImageOrientationPatient"), first.get("PixelSpacing")
    places = [one.get("ImagePositionPatient") for one in images]
    if not orientation or not spacing or not all(places):
        return False
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    x, y, _ = volume.affine[:3, :3].T
    slices = np.arange(len(images))[:, None] * volume.affine[:3, 2] + volume.affine[:3, 3]
    off = max(
        float(np.abs(row * float(spacing[1]) - x).max()),
        float(np.abs(column * float(spacing[0]) - y).max()),
    )
    away = float(np.abs(np.array(places, float) - slices).max())
    return (first.Rows, first.Columns) == volume.shape[1:] and off < EXACT and away < EXACT_MM


SHARED = (
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ImageOrientationPatient", "PixelSpacing"),
)
"""What images of one SEG have in common."""


def write_frames(
    head: Head, images: Sequence[Dataset], labels: Labels, values: Labels, path: Path
) -> None:
    """Write a SEG: a head with its frames in place of what it had.

    Args:
        head: made by highdicom of the first images and slices; its first frame is of a segment in
            the first slice.
        images: :func:`matched`, by slice.
        labels: (z, y, x).
        values: in ``labels``, by segment.
        path: the file.
    """
    functional = head.PerFrameFunctionalGroupsSequence[0]
    held = slices_with(labels, values)
    places = np.array([one.ImagePositionPatient for one in images], float)
    order = [k for k in _sorted(images[0], places) if held[:, k].any()]
    _refer(head, images, places)
    reference = _Reference(functional.DerivationImageSequence[0])
    content = _encoded(functional["FrameContentSequence"])[: -2 * 4]  # ends with two numbers
    items, frames = [], []
    for number, value in enumerate(values, 1):
        segment = _segment(functional, number)
        for at, k in enumerate(order, 1):
            if held[number - 1, k]:
                indices = struct.pack("<LL", number, at)
                place = _sequence(0x00209113, _text(0x00200032, "DS", _decimals(images[k])))
                items.append(_item(reference.to(images[k]) + content + indices + place + segment))
                frames.append((k, value))
    head.NumberOfFrames = len(items)
    del head[FRAMES], head[PIXELS]
    head.save_as(path)
    size = -(-len(frames) * labels[0].size // 8)
    with path.open("ab") as file:
        file.write(_tag(FRAMES) + b"SQ\0\0" + struct.pack("<L", sum(map(len, items))))
        file.writelines(items)
        file.write(_tag(PIXELS) + b"OB\0\0" + struct.pack("<L", size + size % 2))
        file.writelines(_packed(labels, frames))
        file.write(b"\0" * (size % 2))


def _segment(functional: Dataset, number: int) -> bytes:
    """Which segment a frame is of; of a SEG's only segment that stands in the shared groups."""
    if "SegmentIdentificationSequence" not in functional:
        return b""
    functional.SegmentIdentificationSequence[0].ReferencedSegmentNumber = number
    return _encoded(functional["SegmentIdentificationSequence"])


def _sorted(image: Dataset, places: Points) -> list[int]:
    """The slices in the order of a SEG's frames: against the normal of rows and columns."""
    cosines = np.array(image.ImageOrientationPatient, float)
    along = places @ np.cross(cosines[3:], cosines[:3])
    return [int(k) for k in np.argsort(along)]


def _packed(labels: Labels, frames: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Pixel Data of one bit: each frame begins where the one before ends, within a byte too.

    Args:
        labels: (z, y, x).
        frames: slice and label of each.
    """
    for first in range(0, len(frames), AT_ONCE):
        together = [(labels[k] == value).ravel() for k, value in frames[first : first + AT_ONCE]]
        yield np.packbits(np.concatenate(together), bitorder="little").tobytes()


def _refer(head: Head, images: Sequence[Dataset], places: Points) -> None:
    """Let the head speak of all images of the series."""
    from highdicom.spatial import get_volume_positions  # heavy: only when a SEG is written

    references = []
    for image in images:
        one = Dataset()
        one.ReferencedSOPClassUID = image.SOPClassUID
        one.ReferencedSOPInstanceUID = image.SOPInstanceUID
        references.append(one)
    head.SourceImageSequence = references
    head.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references
    if "SpacingBetweenSlices" not in images[0]:
        measures = head.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        spacing, _ = get_volume_positions(places.tolist(), list(images[0].ImageOrientationPatient))
        if spacing is not None:
            measures.SpacingBetweenSlices = format_number_as_ds(spacing)


class _Reference:
    """The Derivation Image Sequence of a frame, as bytes.

    Args:
        derivation: its item in some frame, with one source image.
    """

    def __init__(self, derivation: Dataset) -> None:
        (source,) = derivation.SourceImageSequence
        others = [one for one in source if one.tag not in (SOP_CLASS, SOP_INSTANCE)]
        self._source = b"".join(map(_encoded, others))
        self._code = _encoded(derivation["DerivationCodeSequence"])

    def to(self, image: Dataset) -> bytes:
        """Made of an image."""
        uids = _text(SOP_CLASS, "UI", image.SOPClassUID) + _text(
            SOP_INSTANCE, "UI", image.SOPInstanceUID
        )
        return _sequence(0x00089124, _sequence(0x00082112, uids + self._source) + self._code)


def _decimals(image: Dataset) -> str:
    return "\\".join(str(DS(value, auto_format=True)) for value in image.ImagePositionPatient)


def _text(tag: int, vr: Literal["DS", "UI"], value: str) -> bytes:
    raw = value.encode("ascii")
    raw += (b"\0" if vr == "UI" else b" ") * (len(raw) % 2)
    return _tag(tag) + vr.encode() + struct.pack("<H", len(raw)) + raw


def _sequence(tag: int, item: bytes) -> bytes:
    """A sequence of one item."""
    whole = _item(item)
    return _tag(tag) + b"SQ\0\0" + struct.pack("<L", len(whole)) + whole


def _encoded(element: DataElement) -> bytes:
    part, buffer = Dataset(), DicomBytesIO()
    part.add(element)
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, part)
    return buffer.getvalue()


def _tag(tag: int) -> bytes:
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF)


def _item(value: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(value)) + value


def places_in(path: Path) -> Iterator[list[float]]:
    """Image Position (Patient) of each frame, as it stands in a file in Explicit VR Little Endian.

    Args:
        path: of a SEG.
    """
    from pydicom import dcmread

    raw = dcmread(path, specific_tags=[FRAMES], stop_before_pixels=True).get_item(FRAMES)
    if not isinstance(raw.value, bytes):
        for frame in raw.value:
            yield [float(value) for value in frame.PlanePositionSequence[0].ImagePositionPatient]
        return
    head = struct.pack("<HH", 0x0020, 0x0032) + b"DS"
    at = raw.value.find(head)
    while at >= 0:
        begin = at + 8
        (size,) = struct.unpack_from("<H", raw.value, at + 6)
        yield [float(value) for value in raw.value[begin : begin + size].split(b"\\")]
        at = raw.value.find(head, begin + size)
