"""Attribute values straight from the bytes of a data set, read leniently.

Decimal Strings longer than the 16 bytes of PS3.5 6.2 and padded with anything are common, and
their digits are good; pydicom's own conversion would warn, round or drop them.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
import warnings
from typing import Any, cast

from pydicom import Dataset
from pydicom.tag import BaseTag, Tag

from plinth.verticals.medical.source import MALFORMED, Unreadable

MARKS = (
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "EchoTime",
    "EffectiveEchoTime",
    "EchoNumbers",
    "DiffusionBValue",
    "NominalPercentageOfCardiacPhase",
    "NominalCardiacTriggerDelayTime",
    "TriggerTime",
    "InversionTime",
    "KVP",
    "StackID",
    "AcquisitionNumber",
    "FrameType",
    "ImageType",
    "ComplexImageComponent",
    "DiffusionGradientOrientation",
    "ConvolutionKernel",
    "FrameReferenceTime",
    "RescaleType",
    "FrameAcquisitionDateTime",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "FilterType",
    "SliceThickness",
    "ReconstructionDiameter",
    "ScanOptions",
    "FlipAngle",
    "RepetitionTime",
    "ContentTime",
)
"""Attributes that tell repeated positions apart, the most telling first."""

NUMBERS = (
    *("EchoTime", "EchoNumbers", "TriggerTime", "InversionTime", "KVP", "AcquisitionNumber"),
    *("TemporalPositionIdentifier", "FrameReferenceTime", "SliceThickness"),
    *("ReconstructionDiameter", "FlipAngle", "RepetitionTime"),
)
"""Those that are Decimal or Integer Strings, which say one number in several ways."""

SEPARATE = (
    *("KVP", "EchoNumbers", "TemporalPositionIdentifier", "TemporalPositionIndex"),
    *("DiffusionBValue", "ConvolutionKernel", "StackID"),
)
"""Attributes whose values never share a volume, whether or not positions repeat."""

INTERLEAVED = (
    *("AcquisitionNumber", "ImageType", "FrameType", "ComplexImageComponent", "RescaleType"),
    *("EchoTime", "EffectiveEchoTime", "InversionTime", "FlipAngle", "RepetitionTime"),
    *("FilterType", "SliceThickness", "ReconstructionDiameter", "ScanOptions"),
)
"""Attributes whose values never share a volume where their slices lie between one another."""

PATIENT = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate")
"""Attributes that say who was imaged; only their digest is kept."""

ORIGIN = (
    *("SeriesNumber", "StudyID", "AccessionNumber", "StudyDate", "StudyTime", "SeriesDate"),
    *("SeriesTime", "Manufacturer", "ManufacturerModelName", "StationName", "ProtocolName"),
    *("SeriesDescription", "KVP", "ConvolutionKernel", "PatientSex", "PatientAge"),
)
"""Attributes equal in all images of a series; they stand in for an absent UID."""

KEYWORDS = (
    *(*PATIENT, *ORIGIN, "InstanceNumber", "ImagesInAcquisition", "ContrastBolusAgent"),
    *("SOPClassUID", "SOPInstanceUID", "Modality", "BurnedInAnnotation"),
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "Units", "LossyImageCompression"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber"),
    "ContrastBolusAgentSequence",
)

TAGS = {keyword: Tag(keyword) for keyword in dict.fromkeys((*KEYWORDS, *MARKS))}
OVERLAY_BITS = tuple(Tag(0x6000 + 2 * n, 0x0102) for n in range(16))
"""Overlay Bit Position, above 0 where an overlay lies in bits of the pixels (retired in 2004)."""

READ: list[BaseTag | int] = [*TAGS.values(), *OVERLAY_BITS]
"""The tags that are read of a file before its pixels."""


def plain(dataset: Dataset, keyword: str) -> str:
    """The value as text whatever its VR, for comparing; empty when absent."""
    tag = TAGS[keyword]
    if tag not in dataset:
        return ""
    value = dataset.get_item(tag).value
    if isinstance(value, bytes):
        binary = keyword in ("TemporalPositionIndex", "DiffusionBValue") or keyword.startswith(
            ("DiffusionGradient", "Effective", "NominalCardiac", "NominalPercentage")
        )
        return value.hex() if binary else value.decode("latin-1").strip(" \0")
    return "" if value is None else str(value)


def spelt(keyword: str, value: str) -> str:
    """A number the one way, however it is written: ``120`` for ``120.0``; other text as it is."""
    try:
        return f"{float(value):.9g}" if keyword in NUMBERS else value
    except ValueError:
        return value


def digest(dataset: Dataset, keywords: tuple[str, ...]) -> str:
    """A stand-in for values that must not be kept; empty when all of them are."""
    told = {keyword: _spoken(dataset, keyword).rstrip("^").casefold() for keyword in keywords}
    values = [spelt(keyword, value) for keyword, value in told.items()]
    if not any(values):
        return ""
    return hashlib.blake2b("\0".join(values).encode(), digest_size=12).hexdigest()


def _spoken(dataset: Dataset, keyword: str) -> str:
    """Text as its character set means it: one name in two of them is one name."""
    raw = plain(dataset, keyword)
    if raw.isascii() and "\x1b" not in raw:
        return raw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, which hold the text
        try:
            told = str(dataset[TAGS[keyword]].value)
        except MALFORMED:
            return raw
    return unicodedata.normalize("NFC", told).strip(" \0")


def whole(dataset: Dataset, keyword: str) -> int | None:
    """An Integer String; ``None`` when absent or not one, as for information only."""
    value = plain(dataset, keyword)
    return int(value) if value.removeprefix("-").isdecimal() and len(value) < 12 else None


def text(dataset: Dataset, keyword: str) -> str | None:
    """A text value, trimmed; ``None`` when absent or empty."""
    return plain(dataset, keyword) or None


def texts(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    """A multi-valued text, each value trimmed."""
    whole = plain(dataset, keyword)
    return tuple(part.strip() for part in whole.split("\\")) if whole else ()


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """Decimal or Integer Strings of any length as floats; empty when absent.

    Raises:
        Unreadable: when a value is no finite number.
    """
    tag = TAGS[keyword]
    if tag not in dataset:
        return ()
    value = dataset.get_item(tag).value
    if value is None or value == "" or value == b"":
        return ()
    try:
        if isinstance(value, bytes):
            parts = [part.strip(b" \0") for part in value.split(b"\\")]
            found = tuple(float(part) for part in parts if part)
        else:
            alone = isinstance(value, str) or not hasattr(value, "__iter__")
            found = tuple(float(str(part)) for part in ([value] if alone else value))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise Unreadable(f"{keyword} is no finite number")
    return found


def integer(dataset: Dataset, keyword: str | BaseTag, *, signed: bool = False) -> int | None:
    """A 16-bit binary integer; ``None`` when absent."""
    tag = TAGS[keyword] if isinstance(keyword, str) else keyword
    if tag not in dataset:
        return None
    element = dataset.get_item(tag)
    value = element.value
    if isinstance(value, bytes):
        if len(value) < 2:
            return None
        order = "little" if getattr(element, "is_little_endian", True) else "big"
        return int.from_bytes(value[:2], cast(Any, order), signed=signed)
    if value is None or value == "":
        return None
    return int(value)
