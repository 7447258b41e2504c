"""The pictures as Secondary Capture images (PS3.3 A.8.1), marked not for diagnosis."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from plinth.verticals.medical.output.derived import SHORT_TEXT, derived, made_by, source_headers
from plinth.verticals.medical.output.report import RESEARCH_USE, Origin
from plinth.verticals.medical.volumes.volume import Volume

DIRECTIONS = {"axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F")}
"""Where rows and columns of a picture run in the patient."""


def write_captures(
    volume: Volume, pictures: dict[str, bytes], model: str, origin: Origin, folder: Path
) -> list[Path]:
    """Write each picture as a colour image of one new series; returns the files.

    They carry the patient's identity in their attributes, never in their pixels.

    Args:
        volume: whose images the pictures show.
        pictures: PNG files by name.
        model: the rules or the network whose result they show.
        origin: how they made it.
        folder: exists; the files are named as the pictures.

    Raises:
        InputError: there are no source images, or their headers do not allow it.
    """
    import highdicom  # heavy: only when images are written

    source, *_ = source_headers(volume)
    about = made_by(model, 903, "Key images, not for diagnosis")
    files = []
    for number, (name, data) in enumerate(pictures.items(), 1):
        with derived("secondary capture", [source]):
            image = highdicom.sc.SCImage.from_ref_dataset(
                ref_dataset=source,
                pixel_array=np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
                photometric_interpretation="RGB",
                bits_allocated=8,
                coordinate_system="PATIENT",
                patient_orientation=DIRECTIONS.get(name, DIRECTIONS["axial"]),
                transfer_syntax_uid=ExplicitVRLittleEndian,
                **about | {"sop_instance_uid": highdicom.UID(), "instance_number": number},
            )
        if name not in DIRECTIONS:  # several planes on one sheet
            image.PatientOrientation = []
        image.Laterality = ""  # type 2C: a chest has two sides
        image.ImageType = ["DERIVED", "SECONDARY"]
        image.BurnedInAnnotation = "NO"  # nothing in the pixels says who the patient is
        image.ImageComments = f"{name}: {RESEARCH_USE}"
        image.DerivationDescription = origin.text(SHORT_TEXT)
        files.append(folder / f"{name}.dcm")
        image.save_as(files[-1])
    return files
