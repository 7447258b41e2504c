"""What all DICOM objects made from a series share: cleaned headers, the device, why one is not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from pydicom import Dataset
from pydicom.charset import convert_encodings, default_encoding, python_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VM, keyword_for_tag
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import DS

from plinth import __version__
from plinth.engine import InputError
from plinth.verticals.medical.output.standard_tables import read_in_parts
from plinth.verticals.medical.volumes.volume import SeriesFacts, Volume

TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    "PositionReferenceIndicator",
)
SHARED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
"""Identifiers that all images of a series share, and that objects made of them need."""
OWN_UIDS = ("SOPClassUID", "SOPInstanceUID")
OF_SLIDES = ("ImageOrientationSlide", "ImageCenterPointCoordinatesSequence")
"""By these highdicom takes an image for one of a microscope."""
NEEDED = (
    *(*SHARED_UIDS, *OWN_UIDS, "SpecificCharacterSet", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
)
"""Without these nothing can be made of an image; all else is left out where it cannot be read."""
COPIED = (
    *(*TYPE_2, "StudyInstanceUID", "SpecificCharacterSet", "PatientAge", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "FrameOfReferenceUID"),
)
"""What an object made by hand takes over from its first image."""
LISTED = 5
"""Attributes at fault that a message names."""
SHORT_TEXT = 1024
"""Characters of a value of VR ST."""
VALID = {
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "PatientBirthDate": re.compile(r"\d{8}"),
    "PatientSex": re.compile(r"[FMO]"),
    "StudyDate": re.compile(r"\d{8}"),
    "StudyTime": re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?"),
}


STORAGE = {
    "CT": CTImageStorage,
    "MR": MRImageStorage,
    "PT": PositronEmissionTomographyImageStorage,
}
"""SOP class of an image that does not say its own, by modality."""


_READ: WeakKeyDictionary[Volume, tuple[Dataset, ...]] = WeakKeyDictionary()
"""Cleaned headers by the volume that lives."""


def source_headers(volume: Volume) -> list[Dataset]:
    """The headers of a volume's images, in slice order: all fit to refer to, the first to copy.

    They are read once for all objects that are made of a volume.

    Where anonymisers left an identifier empty stands one made of the series' id: the same in all
    objects made of the series, in every run, and of no other series.

    Args:
        volume: read from DICOM.

    Raises:
        InputError: it was not, or does not say what kind of images they are.
    """
    kept = _READ.get(volume)
    if kept is not None:
        return list(kept)
    facts = volume.series
    headers = facts.headers()
    if not headers:
        raise InputError("the volume was not read from DICOM images", reason="no_source")
    for number, header in enumerate(headers):
        for keyword in SHARED_UIDS:
            if not header.get(keyword):
                setattr(header, keyword, generate_uid(entropy_srcs=[facts.id, keyword]))
        if not header.get("SOPInstanceUID"):
            header.SOPInstanceUID = generate_uid(entropy_srcs=[facts.id, str(number)])
        if not header.get("SOPClassUID"):
            header.SOPClassUID = _storage(facts.modality)
        if not _holds(header, Tag("SpacingBetweenSlices"), written=False):
            header.pop("SpacingBetweenSlices", None)
        if not _holds(header, Tag("SliceThickness"), written=False):
            header.SliceThickness = DS(
                volume.spacing[2], auto_format=True
            )  # a SEG's voxels have one
    clean_header(headers[0])
    _READ[volume] = tuple(headers)
    return headers


def absent_uids(facts: SeriesFacts) -> str:
    """Which identifiers the images of a series lack, in words; empty where none is."""
    uids = {
        "Study Instance UID": facts.study_instance_uid,
        "Series Instance UID": facts.series_instance_uid,
        "SOP Instance UID": all(facts.sop_instance_uids),
        "Frame of Reference UID": facts.frame_of_reference_uid,
    }
    return ", ".join(name for name, value in uids.items() if facts.sources and not value)


def _storage(modality: str) -> UID:
    if modality not in STORAGE:
        raise InputError(
            f"the images are of modality {modality or 'unknown'} and without SOP Class UID",
            reason="source_header",
        )
    return STORAGE[modality]


def slice_headers(volume: Volume, headers: list[Dataset]) -> list[Dataset] | None:
    """The header of the image behind each slice, or ``None`` when slices were interpolated.

    Args:
        volume: read from DICOM.
        headers: its :func:`source_headers`.
    """
    if volume.slice_uids is None:
        return None
    files = dict(zip(dict.fromkeys(volume.series.sources), headers, strict=True))
    return [files[source] for source in volume.series.sources]


def clean_header(header: Dataset) -> Dataset:
    """A header fit to copy from: type 2 attributes present, invalid values left out."""
    _leave_out(header)
    _spell_characters(header)
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    studies = header.get("ReferencedStudySequence") or []
    if not all(item.get("ReferencedSOPClassUID") for item in studies):
        del header.ReferencedStudySequence  # type 1 in each item (PS3.3 Table 10-11)
    if header.get("PatientIdentityRemoved") == "YES" and not header.get("DeidentificationMethod"):
        header.DeidentificationMethod = "not stated by the source"  # type 1C (PS3.3 C.7.1.1)
    for keyword, pattern in VALID.items():
        value = str(header.get(keyword) or "")
        if value and not pattern.fullmatch(value):
            setattr(header, keyword, "")
    return header


def _leave_out(header: Dataset) -> None:
    """What cannot be read and nothing depends on; a name of one component is said as such."""
    for keyword in OF_SLIDES:
        header.pop(keyword, None)
    for tag in list(header.keys()):
        if keyword_for_tag(tag) in NEEDED:
            continue
        if not _holds(header, tag):
            del header[tag]
            continue
        element = header[tag]
        if element.VR == "PN" and element.value and "^" not in str(element.value):
            element.value = f"{element.value}^"  # as PS3.5 6.2.1.2 allows


def made_by(model: str, series_number: int, description: str) -> dict[str, Any]:
    """A new object of a new series, and the device that made it, as highdicom takes them.

    Args:
        model: Manufacturer's Model Name: the rules or the network.
        series_number: Series Number.
        description: Series Description.
    """
    import highdicom  # heavy: only when an object is written

    read_in_parts()
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": series_number,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": "Plinth",
        "manufacturer_model_name": model[:64],
        "software_versions": __version__,
        "device_serial_number": "0",
        "series_description": description[:64],
    }


@contextmanager
def derived(kind: str, headers: Sequence[Dataset]) -> Iterator[None]:
    """A block that makes an object from source headers; what these do not allow is told.

    Where nothing in the headers is at fault, what was raised passes: a fault of ours or of a
    library, which whoever runs the study tells as such, without the values in its message.

    Args:
        kind: of object, such as ``"DICOM SEG"``.
        headers: that it is made from.

    Raises:
        InputError: names the attributes at fault, instead of what the library raises, whose message
            may repeat values of the header.
    """
    try:
        yield
    except InputError:
        raise
    except Exception:
        wrong = unusable(headers)
        if not wrong:
            raise
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise InputError(
            f"no {kind} can be made of the images: no valid {', '.join(wrong[:LISTED])}{more}",
            field=wrong[0],
            reason="source_header",
            hint="ask the sender for the original images",
        ) from None


def unusable(headers: Sequence[Dataset]) -> list[str]:
    """Names of the attributes of headers that hold nothing of their kind, or that must be there."""
    found: dict[str, None] = {}
    for header in headers:
        for tag in list(header.keys()):
            name = keyword_for_tag(tag) or str(tag)
            if name not in found and not _holds(header, tag):
                found[name] = None
        for keyword in (*SHARED_UIDS, *OWN_UIDS):
            if not UID(str(header.get(keyword) or "")).is_valid:
                found[keyword] = None
    return list(found)


def _holds(header: Dataset, tag: BaseTag, written: bool = True) -> bool:
    """An attribute can be read, has as many values as it may, and can be written too."""
    try:
        element = header[tag]
        if element.VR in ("DS", "IS"):
            for value in element.value if element.VM > 1 else [element.value or 0]:
                float(value)
        if element.VM > 1 and dictionary_has_tag(tag) and dictionary_VM(tag) == "1":
            return False
        if element.keyword == "SpecificCharacterSet":
            return all(map(_is_encoding, _texts(element.value)))
        if written:
            alone, buffer = Dataset(), DicomBytesIO()
            alone.add(element)
            buffer.is_little_endian, buffer.is_implicit_VR = True, False
            write_dataset(buffer, alone, header.get("SpecificCharacterSet") or default_encoding)
    except Exception:  # noqa: BLE001 - of whatever kind, it is no value
        return False
    return True


def _spell_characters(header: Dataset) -> None:
    """Say the character set as highdicom takes it; text in one that it does not know, in UTF-8.

    It knows no default set by an empty name, as Japanese studies have it, and no Korean one.
    """
    from highdicom.enum import SpecificCharacterSetValues  # heavy: only when an object is written

    told = _texts(header.get("SpecificCharacterSet"))
    if len(told) > 1 and not told[0]:
        told = ["ISO 2022 IR 6", *told[1:]]
        header.SpecificCharacterSet = told
    known = {one.value for one in SpecificCharacterSetValues}
    if told == [""]:
        header.pop("SpecificCharacterSet", None)
    elif not known.issuperset(told) and all(map(_is_encoding, told)):
        header.decode()
        header.SpecificCharacterSet = "ISO_IR 192"


def _is_encoding(name: str) -> bool:
    """A character set that pydicom knows, spelled as it should be or nearly so."""
    return name in python_encoding or convert_encodings(name) != [default_encoding]


def _texts(value: Any) -> list[str]:
    return [value or ""] if isinstance(value, str) or not value else [str(one) for one in value]
