"""What all DICOM objects made from a series share: cleaned headers, the device, why one is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from pydicom import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

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
COPIED = (
    *(*TYPE_2, "StudyInstanceUID", "SpecificCharacterSet", "PatientAge", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "FrameOfReferenceUID"),
)
"""What an object made by hand takes over from its first image."""
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
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    for element in header:
        if element.VR == "PN" and element.value and "^" not in str(element.value):
            element.value = f"{element.value}^"  # one component, said as PS3.5 6.2.1.2 allows
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
def derived(kind: str) -> Iterator[None]:
    """A block that makes an object from source headers; what these do not allow is told.

    Args:
        kind: of object, such as ``"DICOM SEG"``.

    Raises:
        InputError: instead of what the library raises, whose message may repeat values of the
            header.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the source's headers do not allow a {kind} ({type(error).__name__})",
            reason="source_header",
            hint="check the patient, study and frame of reference attributes of the images",
        ) from error
