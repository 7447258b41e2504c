"""What all DICOM objects made from a series share: cleaned headers, the device, why one is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom import Dataset

from plinth import __version__
from plinth.engine import InputError
from plinth.verticals.medical.volumes.volume import Volume

TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
COPIED = (
    *(*TYPE_2, "StudyInstanceUID", "SpecificCharacterSet", "PatientAge", "PatientIdentityRemoved"),
    *("DeidentificationMethod", "FrameOfReferenceUID", "PositionReferenceIndicator"),
)
"""What an object made by hand takes over from its first image."""
VALID = {
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "PatientBirthDate": re.compile(r"\d{8}"),
    "PatientSex": re.compile(r"[FMO]"),
    "StudyDate": re.compile(r"\d{8}"),
    "StudyTime": re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?"),
}


def source_headers(volume: Volume) -> list[Dataset]:
    """The headers of a volume's images, in slice order: all fit to refer to, the first to copy.

    Args:
        volume: read from DICOM.

    Raises:
        InputError: it was not.
    """
    headers = volume.series.headers()
    if not headers:
        raise InputError("the volume was not read from DICOM images", reason="no_source")
    return [clean_header(headers[0]), *headers[1:]]


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
