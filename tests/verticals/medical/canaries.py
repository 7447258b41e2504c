"""Canaries: names, dates and numbers in every attribute, to be found again nowhere."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.datadict import DicomDictionary
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from plinth.verticals.medical.privacy.kept import NUMBERS

NAME, NUMBER, DATE = "Zanzibar", 48151623, "19230704"
VALUES: dict[str, Any] = {
    **dict.fromkeys(("LO", "SH", "ST", "LT", "UT", "UC", "UR"), f"{NAME}-{NUMBER}"),
    "AE": NAME,
    "CS": f"{NAME.upper()}_{NUMBER}"[:16],
    "PN": f"{NAME}^{NUMBER}",
    "DA": DATE,
    "DT": f"{DATE}101112",
    "UI": f"1.2.{NUMBER}.{DATE}",
    "IS": NUMBER,
    "DS": NUMBER,
    "UL": NUMBER,
    "SL": NUMBER,
    "FD": float(NUMBER),
    "FL": float(NUMBER),
    **dict.fromkeys(("OB", "UN"), f"{NAME}{NUMBER}{DATE}".encode()),
}
CANARIES = (
    *(NAME.lower().encode(), str(NUMBER).encode(), DATE.encode()),
    *(struct.pack(f"<{code}", NUMBER) for code in "Ifd"),
)
NEEDED = {
    *("SOPClassUID", "Modality", "PhotometricInterpretation", "PixelData", "BurnedInAnnotation"),
    *("FloatPixelData", "DoubleFloatPixelData", "PixelPresentation", "NumberOfFrames", "ImageType"),
    *(
        "RescaleType",
        "PatientID",
        "SOPInstanceUID",
        "SpecificCharacterSet",
        "DataSetTrailingPadding",
    ),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SeriesDescription"),
    *("ModalityLUTSequence", "AcquisitionNumber", "KVP", "Units"),
}
"""Without these, or with others, a file is another image or none."""


def planted(image: Dataset, k: int) -> None:
    """Canaries in every attribute of the dictionary, in items, private attributes and overlays."""
    for number, (vr, _, _, retired, keyword) in DicomDictionary.items():
        tag = Tag(number)
        if not keyword or keyword in NEEDED | NUMBERS or tag.group in (0x0000, 0x0002, 0x0004):
            continue
        if vr in VALUES:
            image[tag] = DataElement(tag, vr, VALUES[vr])
        elif vr == "SQ" and not retired:
            image[tag] = DataElement(tag, "SQ", Sequence([nested()]))
    image.PatientID, image.PatientSex = f"{NAME}-{NUMBER}", "F"
    image.SeriesInstanceUID = f"1.2.{NUMBER}.1"
    image.SOPInstanceUID = f"1.2.{NUMBER}.2.{k}"
    image.SeriesDescription = f"for {NAME}"
    block = image.private_block(0x0029, f"{NAME} PRIVATE", create=True)
    block.add_new(1, "LO", f"{NAME}-{NUMBER}")
    block.add_new(2, "SQ", [nested()])
    image.add_new(0x60003000, "OB", VALUES["OB"])
    image.add_new(0x60001500, "LO", VALUES["LO"])


def nested() -> Dataset:
    item = Dataset()
    item.PatientName, item.PatientBirthDate = VALUES["PN"], DATE
    item.ReferencedSOPInstanceUID = VALUES["UI"]
    item.ContentSequence = [Dataset()]
    item.ContentSequence[0].TextValue = VALUES["UT"]
    item.private_block(0x0029, f"{NAME} PRIVATE", create=True).add_new(1, "LO", VALUES["LO"])
    return item


def found_in(data: bytes) -> list[bytes]:
    return [canary for canary in CANARIES if canary in data or canary in data.lower()]


def in_preamble(path: Path) -> None:
    """Canaries in the first 128 bytes of a file, which are not part of its data set."""
    data = path.read_bytes()
    path.write_bytes(f"{NAME}{NUMBER}".encode().ljust(128, b"\0") + data[128:])
