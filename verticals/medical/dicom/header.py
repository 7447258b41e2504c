"""What the loader reads of a file before its pixels: one Header, and one Frame per image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, cast

from pydicom import Dataset, dcmread
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.elements import (
    MARKS,
    ORIGIN,
    OVERLAY_BITS,
    PATIENT,
    READ,
    TAGS,
    digest,
    integer,
    numbers,
    plain,
    spelt,
    text,
    texts,
    whole,
)
from plinth.verticals.medical.dicom.kinds import derived_kind
from plinth.verticals.medical.source import (
    DEFLATED,
    MALFORMED,
    Capped,
    Source,
    Unreadable,
    damaged,
    inflate,
    is_deflated,
)
from plinth.verticals.medical.volumes.volume import Window

IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
PIXEL_TAGS = (0x7FE00010, 0x7FE00009, 0x7FE00008)
PIXEL_VRS = tuple(vr + b"\0\0" for vr in (b"OW", b"OB", b"OF", b"OD", b"UN"))
UNDEFINED = 0xFFFFFFFF
MAX_FRAMES = 1 << 16
BITS = ("BitsAllocated", "BitsStored", "PixelRepresentation")
Values = dict[str, tuple[float, ...]]
ROUNDED = 1e-5
"""Difference, also as a share, of a number that is told twice with more or fewer digits."""
FRAME_BYTES = 64
"""Least bytes that a frame of a multi-frame image takes in its file."""


@dataclass(frozen=True, slots=True, repr=False)
class ConcatenationPart:
    """One file of several that hold one multi-frame image together (PS3.3 C.7.6.16.2.2.4).

    Args:
        uid: Concatenation UID, equal in all of them.
        number: In-concatenation Number, from 1.
        total: how many there are, ``None`` where it is not said.
    """

    uid: str
    number: int
    total: int | None


@dataclass(frozen=True, slots=True, repr=False)
class Header:
    """Facts of one file.

    Args:
        source: the file.
        size: its bytes (of the inflated data set for a deflated file).
        syntax: Transfer Syntax UID.
        patient: digest of who was imaged; equal for equal patients, empty when nothing says.
        origin: digest of the attributes that are equal in all images of a series.
        instance_number: Instance Number, if it is one.
        images_in_acquisition: Images in Acquisition.
        contrast: a Contrast/Bolus Agent is named, or coded.
        kind: what a CT image shows instead of attenuation, such as a projection.
        offset: byte where the pixel data's value starts.
        length: declared bytes of it; ``UNDEFINED`` when encapsulated.
        floating: the pixels are Float or Double Float Pixel Data.
        frames: Number of Frames.
        padding: Pixel Padding Value and Range Limit, stored values, lower one first.
        units: Units of a PET image, such as BQML.
        lossy: Lossy Image Compression says that values were changed.
        unsaid: attributes without which stored bits are no values (PS3.3 C.7.6.3), and which
            the file lacks.
        part: which file it is of several that hold one multi-frame image.
        overlaid: an overlay lies in bits of the pixels that are no part of the values.
    """

    source: Source
    size: int
    syntax: str
    offset: int
    length: int
    floating: bool
    sop_class: str
    sop_uid: str
    modality: str
    patient: str
    origin: str
    instance_number: int | None
    images_in_acquisition: int | None
    contrast: bool
    kind: str | None
    study_uid: str
    series_uid: str
    frame_of_reference: str
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None
    modality_lut: bool
    thickness: float | None
    image_type: tuple[str, ...]
    windows: tuple[Window, ...]
    burned_in: str | None
    units: str | None
    lossy: bool = False
    unsaid: tuple[str, ...] = ()
    part: ConcatenationPart | None = None
    overlaid: bool = False

    @property
    def encapsulated(self) -> bool:
        """The pixel data are compressed fragments."""
        return self.length == UNDEFINED

    @property
    def frame_bytes(self) -> int:
        """Bytes of one uncompressed frame."""
        return self.rows * self.columns * self.samples * (self.bits_allocated // 8)


@dataclass(frozen=True, slots=True)
class Frame:
    """One 2D image: a file, or one frame of a multi-frame file.

    Args:
        header: facts of its file.
        index: frame number from 0.
        position: Image Position (Patient), LPS mm.
        orientation: Image Orientation (Patient): row direction, column direction.
        spacing: Pixel Spacing: (row step, column step) = (y, x) mm (PS3.3 10.7.1.3).
        slope: Rescale Slope.
        intercept: Rescale Intercept.
        rescaled: the image gives both, slope and intercept, and so means its values.
        half_rescaled: it gives one of the two.
        marks: attributes that may tell repeats of a position apart.
    """

    header: Header = field(repr=False)
    index: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float
    intercept: float
    rescaled: bool
    half_rescaled: bool
    marks: dict[str, str] = field(repr=False)

    @property
    def placed(self) -> bool:
        """It says where it lies in the patient."""
        return None not in (self.position, self.orientation, self.spacing)

    @property
    def kind(self) -> str | None:
        """What it shows instead of attenuation, such as a projection; of a frame by Frame Type."""
        told = self.marks.get("FrameType", "").split("\\")
        return self.header.kind or derived_kind(tuple(one.strip() for one in told), "", "")

    @property
    def kernel(self) -> str | None:
        """Convolution Kernel, of the file or of the frame."""
        return self.marks.get("ConvolutionKernel")

    @property
    def thickness(self) -> float | None:
        """Slice Thickness in mm, of the file or of the frame, for information only."""
        return self.header.thickness or _millimetres(self.marks.get("SliceThickness", ""))

    @property
    def key(self) -> tuple[str, int, str]:
        """Orders equal positions the same way on every run."""
        return self.header.sop_uid, self.index, self.header.source.name

    @property
    def units(self) -> str:
        """Of the modality values: those of PET (PS3.3 C.8.9.1.1.3), else Rescale Type.

        CT may leave the Rescale Type out for HU (PS3.3 C.8.2.1).
        """
        header = self.header
        if header.modality == "PT" and header.units:
            return header.units
        assumed = "HU" if header.modality == "CT" and self.rescaled else ""
        told = self.marks.get("RescaleType", assumed)
        return "HU" if told.upper() == "HU" else told


def read_frames(source: Source) -> list[Frame]:
    """The images of a file; headers only.

    Returns:
        One Frame, or one per frame of a multi-frame object; empty when the file is DICOM
        without image attributes.

    Raises:
        InputError: not DICOM (reason ``"not_dicom"``; ``"empty_file"``: no bytes) or damaged.
    """
    with source.open() as (stream, size):
        try:
            dataset, syntax, stream, size = _parse(source, stream, size)
            header = _header(dataset, source, size, syntax, _pixel_element(stream, syntax, size))
            if header is None:
                return []
            return list(_frames(dataset, header))
        except MALFORMED as error:
            raise damaged(source, error) from None


def _parse(source: Source, stream: IO[bytes], size: int) -> tuple[Dataset, str, IO[bytes], int]:
    start = stream.read(1024)
    stream.seek(0)
    if start[128:132] != b"DICM" and not _bare(start):
        empty = "it is empty" if size == 0 else "no DICM prefix"
        raise InputError(
            f"{source.name} is not DICOM: {empty}",
            field=source.name,
            hint="give DICOM files (PS3.10)",
            reason="not_dicom" if size else "empty_file",
        )
    if is_deflated(stream):
        inflated, _ = inflate(stream)
        dataset = read_dataset(inflated, False, True, stop_when=_at_pixels, specific_tags=READ)
        return dataset, DEFLATED, inflated, len(inflated.getbuffer())
    dataset = dcmread(Capped(stream), stop_before_pixels=True, force=True, specific_tags=READ)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", "") or "").strip()
    if not syntax:
        implicit, little = dataset.original_encoding
        syntax = IMPLICIT if implicit else ("1.2.840.10008.1.2.1" if little else BIG_ENDIAN)
    return dataset, syntax, stream, size


def _at_pixels(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag in PIXEL_TAGS


def _bare(start: bytes) -> bool:
    """Starts like a data set without preamble: group 0002 or 0008, little endian."""
    return len(start) > 8 and start[0] in (2, 8) and start[1] == 0 and start[3] == 0


def _pixel_element(stream: IO[bytes], syntax: str, size: int) -> tuple[int, int, bool] | None:
    """Offset and declared length of the pixel data's value, and whether it is floating.

    Whether a VR stands before the length is read from the bytes: files that declare implicit VR
    and are explicit, or the reverse, are common.
    """
    order = cast(Any, "big" if syntax == BIG_ENDIAN else "little")
    start, at = stream.read(12), stream.tell()
    group, element = (int.from_bytes(start[n : n + 2], order) for n in (0, 2))
    if group != 0x7FE0 or len(start) < 8:
        return None
    floating = element != 0x0010
    after_vr = int.from_bytes(start[8:12], order)
    if start[4:8] in PIXEL_VRS and (after_vr == UNDEFINED or at + after_vr <= size):
        return at, after_vr, floating
    if start[4:8] in PIXEL_VRS and syntax != IMPLICIT:
        return at, after_vr, floating  # cut short
    return at - len(start) + 8, int.from_bytes(start[4:8], order), floating


def _header(
    dataset: Dataset, source: Source, size: int, syntax: str, pixels: tuple[int, int, bool] | None
) -> Header | None:
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    sop_class = text(dataset, "SOPClassUID") or ""
    if pixels is None and not rows and not _is_scan(sop_class):
        return None
    if not rows or not columns:
        raise Unreadable("no Rows or Columns")
    if pixels is None:
        raise Unreadable("an image without pixel data")
    allocated = integer(dataset, "BitsAllocated") or 16
    stored = integer(dataset, "BitsStored") or allocated
    high = integer(dataset, "HighBit")
    signed = integer(dataset, "PixelRepresentation") == 1
    return Header(
        source=source,
        size=size,
        syntax=syntax,
        offset=pixels[0],
        length=pixels[1],
        floating=pixels[2],
        sop_class=sop_class,
        sop_uid=text(dataset, "SOPInstanceUID") or "",
        modality=text(dataset, "Modality") or "",
        patient=digest(dataset, PATIENT),
        origin=digest(dataset, ORIGIN),
        instance_number=whole(dataset, "InstanceNumber"),
        images_in_acquisition=whole(dataset, "ImagesInAcquisition"),
        contrast=text(dataset, "ContrastBolusAgent") is not None
        or bool(_items(dataset, "ContrastBolusAgentSequence")),
        kind=derived_kind(
            texts(dataset, "ImageType"), text(dataset, "SeriesDescription") or "", sop_class
        ),
        study_uid=text(dataset, "StudyInstanceUID") or "",
        series_uid=text(dataset, "SeriesInstanceUID") or "",
        frame_of_reference=text(dataset, "FrameOfReferenceUID") or "",
        rows=rows,
        columns=columns,
        frames=_number_of_frames(dataset, size - pixels[0]),
        samples=integer(dataset, "SamplesPerPixel") or 1,
        photometric=text(dataset, "PhotometricInterpretation") or "MONOCHROME2",
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else high,
        signed=signed,
        padding=_padding(dataset, signed),
        modality_lut=TAGS["ModalityLUTSequence"] in dataset,
        thickness=_thickness(dataset),
        image_type=texts(dataset, "ImageType"),
        windows=_windows(dataset),
        burned_in=text(dataset, "BurnedInAnnotation"),
        units=text(dataset, "Units"),
        lossy=text(dataset, "LossyImageCompression") == "01",
        part=_concatenation_part(dataset),
        overlaid=any(integer(dataset, tag) for tag in OVERLAY_BITS),
        unsaid=() if pixels[2] else tuple(k for k in BITS if integer(dataset, k) is None),
    )


def _is_scan(sop_class: str) -> bool:
    """A CT, MR or PET image: without a size or pixel data, its file ends too early."""
    storage = "1.2.840.10008.5.1.4.1.1."
    return sop_class in {storage + end for end in ("2", "2.1", "4", "4.1", "128", "130")}


def _number_of_frames(dataset: Dataset, room: int) -> int:
    """Number of Frames, as far as ``room`` bytes of pixel data can hold them."""
    count = int(_first(numbers(dataset, "NumberOfFrames"), 1))
    if count > MAX_FRAMES:
        raise Unreadable(f"{count} frames, at most {MAX_FRAMES} are read")
    if count > 1 and count * FRAME_BYTES > room:
        raise Unreadable(f"{count} frames in {room} bytes of pixel data")
    return max(1, count)


def _thickness(dataset: Dataset) -> float | None:
    """Slice Thickness in mm, for information only: a bad one is as good as none."""
    return _millimetres(plain(dataset, "SliceThickness"))


def _millimetres(told: str) -> float | None:
    try:
        size = float(told)
    except ValueError:
        return None
    return size if 0 < size < 1e3 else None


def _concatenation_part(dataset: Dataset) -> ConcatenationPart | None:
    uid = text(dataset, "ConcatenationUID")
    number = integer(dataset, "InConcatenationNumber")
    if uid is None or number is None:
        return None
    return ConcatenationPart(uid, number, integer(dataset, "InConcatenationTotalNumber"))


def _padding(dataset: Dataset, signed: bool) -> tuple[int, int] | None:
    value = integer(dataset, "PixelPaddingValue", signed=signed)
    if value is None:
        return None
    limit = integer(dataset, "PixelPaddingRangeLimit", signed=signed)
    other = value if limit is None else limit
    return min(value, other), max(value, other)


def _windows(dataset: Dataset) -> tuple[Window, ...]:
    function = (text(dataset, "VOILUTFunction") or "LINEAR").lower()
    try:
        pairs = zip(numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth"), strict=False)
        return tuple(Window(center, width, function) for center, width in pairs)
    except Unreadable:
        return ()


def _frames(dataset: Dataset, header: Header) -> Iterator[Frame]:
    """Geometry per frame, of its own functional groups or of the shared ones, never of both.

    Raises:
        Unreadable: groups for another number of frames, or that contradict the shared ones: which
            is right nobody can tell (PS3.3 C.7.6.16.1.1 allows a macro in one of the two).
    """
    base = {
        "position": numbers(dataset, "ImagePositionPatient"),
        "orientation": numbers(dataset, "ImageOrientationPatient"),
        "spacing": numbers(dataset, "PixelSpacing"),
        "slope": numbers(dataset, "RescaleSlope"),
        "intercept": numbers(dataset, "RescaleIntercept"),
    }
    marks = _marks(dataset)
    shared = _items(dataset, "SharedFunctionalGroupsSequence")
    if len(shared) > 1:
        raise Unreadable(f"{len(shared)} items of shared functional groups, expected one")
    groups = _items(dataset, "PerFrameFunctionalGroupsSequence")
    if groups and len(groups) != header.frames:
        raise Unreadable("functional groups and Number of Frames disagree")
    if not groups and header.frames > 1:
        base = base | {"position": ()}
    for_all: Values = {}
    for macro in shared:
        _take(macro, for_all, marks)
    base = base | for_all
    for index in range(header.frames):
        values, own = (base, dict(marks)) if groups else (base, marks)
        if groups:
            told: Values = {}
            _take(groups[index], told, own)
            for name, value in told.items():
                if not _agree(value, for_all.get(name, value)):
                    raise Unreadable(
                        f"the {name} of frame {index + 1} is not that of the shared functional "
                        "groups, and one of the two is wrong"
                    )
            values = base | told
        yield _frame(header, index, values, own)


def _agree(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """The same numbers, but for how they were rounded."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=ROUNDED, abs_tol=ROUNDED)
        for a, b in zip(one, other, strict=True)
    )


MACROS = {
    0x00209113: (("position", "ImagePositionPatient"),),
    0x00209116: (("orientation", "ImageOrientationPatient"),),
    0x00289110: (("spacing", "PixelSpacing"),),
    0x00289145: (("slope", "RescaleSlope"), ("intercept", "RescaleIntercept")),
}
"""What is read of Plane Position, Plane Orientation, Pixel Measures and Pixel Value Transformation
Sequence (PS3.3 C.7.6.16.2), and from nowhere else: private sequences repeat these attributes with
other meanings."""


def _take(group: Dataset, values: Values, marks: dict[str, str]) -> None:
    """What the macros of functional groups say: all that belongs together, or none of it."""
    for element in group:
        if element.tag.is_private or element.VR != "SQ" or not element.value:
            continue
        item, names = element.value[0], MACROS.get(int(element.tag), ())
        if names and len(element.value) > 1:
            raise Unreadable(f"{len(element.value)} items of {element.keyword}, expected one")
        found = {name: numbers(item, keyword) for name, keyword in names}
        if any(found.values()):
            values.update(found)
        marks.update(_marks(item))


def _frame(header: Header, index: int, values: Values, marks: dict[str, str]) -> Frame:
    for name, said in (("slope", "Rescale Slope"), ("intercept", "Rescale Intercept")):
        if len(values[name]) > 1:
            raise Unreadable(f"{said} has {len(values[name])} values, expected one")

    def exactly(name: str, count: int) -> tuple[float, ...] | None:
        return values[name] if len(values[name]) == count else None

    return Frame(
        header=header,
        index=index,
        position=exactly("position", 3),
        orientation=exactly("orientation", 6),
        spacing=exactly("spacing", 2),
        slope=_first(values["slope"], 1.0),
        intercept=_first(values["intercept"], 0.0),
        rescaled=bool(values["slope"] and values["intercept"]),
        half_rescaled=bool(values["slope"]) != bool(values["intercept"]),
        marks=marks,
    )


def _marks(dataset: Dataset) -> dict[str, str]:
    found = {}
    for keyword in MARKS:
        value = plain(dataset, keyword)
        if value:
            found[keyword] = spelt(keyword, value)
    return found


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    tag = TAGS[keyword]
    return list(dataset[tag].value or []) if tag in dataset else []


def _first(values: tuple[float, ...], default: Any = None) -> Any:
    return values[0] if values else default
