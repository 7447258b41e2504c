"""Write the phantom as a DICOM CT series, healthy or with the faults that series have."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from plinth.verticals.medical.phantom.chest import Phantom

Compression = Literal["none", "implicit", "rle", "jpegls"]

SYNTAX = {
    "none": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "rle": RLELossless,
    "jpegls": JPEGLSLossless,
}

INTERCEPT = -1024

WRITER = UID("2.25.178914586823160914372053372180561438012")
"""Implementation Class UID, fixed so that no library's version changes the bytes."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a written series.

    Args:
        missing: slices that are not written.
        duplicated: slices written a second time, with a new SOP Instance UID.
        shuffled: file names and Instance Numbers in random order.
    """

    missing: tuple[int, ...] = ()
    duplicated: tuple[int, ...] = ()
    shuffled: bool = False


def write_series(
    phantom: Phantom,
    folder: Path,
    *,
    compression: Compression = "none",
    faults: Faults | None = None,
    series: int = 1,
) -> list[Path]:
    """Write one CT series, one file per slice, and ``truth.json`` beside the folder's slices.

    Args:
        phantom: what is scanned and how.
        folder: created if absent.
        compression: ``"none"`` (explicit VR little endian), ``"implicit"`` (implicit VR),
            ``"rle"`` or ``"jpegls"`` (both lossless).
        faults: what to break.
        series: number of the series; another number gives other Series and SOP UIDs in the
            same study and frame of reference.

    Returns:
        The DICOM files, in the order of the slices (duplicates last).
    """
    faults = faults or Faults()
    folder.mkdir(parents=True, exist_ok=True)
    kept = [k for k in range(phantom.shape[2]) if k not in faults.missing]
    written = [*((k, 0) for k in kept), *((k, 1) for k in faults.duplicated)]
    numbers = np.arange(1, len(written) + 1)
    if faults.shuffled:
        numbers = np.random.default_rng(phantom.seed).permutation(numbers)
    files = []
    for (k, copy), number in zip(written, numbers, strict=True):
        image = _image(phantom, k, copy=copy, number=int(number), series=series)
        path = folder / f"slice_{number:04d}.dcm"
        _save(image, path, compression)
        files.append(path)
    (folder / "truth.json").write_text(json.dumps(phantom.truth(), indent=2) + "\n")
    return files


def datasets(phantom: Phantom, *, series: int = 1) -> Iterator[Dataset]:
    """The slices as uncompressed CT Image data sets, in order."""
    for k in range(phantom.shape[2]):
        yield _image(phantom, k, copy=0, number=k + 1, series=series)


def _save(image: Dataset, path: Path, compression: Compression) -> None:
    if compression in ("rle", "jpegls"):
        image.compress(SYNTAX[compression], generate_instance_uid=False)
    else:
        image.file_meta.TransferSyntaxUID = SYNTAX[compression]
    image.save_as(path, enforce_file_format=True)


def _uid(phantom: Phantom, *parts: object) -> str:
    """A UUID-derived UID (PS3.5 B.2), the same for the same phantom."""
    text = "/".join(map(str, (phantom.seed, *parts)))
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, 'plinth-phantom/' + text).int}"


def _image(phantom: Phantom, k: int, *, copy: int, number: int, series: int) -> Dataset:
    image = Dataset()
    _identify(image, phantom, series)
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = _uid(phantom, "image", series, k, copy)
    image.InstanceNumber = number
    _place(image, phantom, k)
    stored = np.clip(np.rint(phantom.slice_hu(k)) - INTERCEPT, 0, 4095).astype("<u2")
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = stored.shape
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 12, 11
    image.PixelRepresentation = 0
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = INTERCEPT, 1, "HU"
    image.WindowCenter, image.WindowWidth = 40, 400
    image.PixelData = stored.tobytes()
    image["PixelData"].VR = "OW"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = image.SOPClassUID
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID, meta.ImplementationVersionName = WRITER, "PLINTH_1"
    image.file_meta = meta
    return image


def _identify(image: Dataset, phantom: Phantom, series: int) -> None:
    """Patient, Study, Series, Equipment and CT modules (PS3.3 A.3.3)."""
    image.SpecificCharacterSet = "ISO_IR 192"
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.PatientName, image.PatientID = "Phantom^Chest", f"PHANTOM-{phantom.seed:04d}"
    image.PatientBirthDate, image.PatientSex = "", "O"
    image.StudyInstanceUID = _uid(phantom, "study")
    image.StudyDate, image.StudyTime = "20260101", "120000"
    image.SeriesDate, image.SeriesTime = "20260101", "120000"
    image.ContentDate, image.ContentTime = "20260101", "120000"
    image.AcquisitionDate, image.AcquisitionTime = "20260101", "120000"
    image.ReferringPhysicianName, image.StudyID, image.AccessionNumber = "", "1", ""
    image.StudyDescription = "Synthetic chest phantom"
    image.SeriesDescription = "Synthetic chest phantom, not a patient"
    image.Modality, image.BodyPartExamined = "CT", "CHEST"
    image.SeriesInstanceUID = _uid(phantom, "series", series)
    image.SeriesNumber, image.AcquisitionNumber = series, 1
    image.FrameOfReferenceUID = _uid(phantom, "frame")
    image.PositionReferenceIndicator = ""
    image.PatientPosition = "HFS"
    image.Manufacturer, image.ManufacturerModelName = "Plinth", "Chest phantom"
    image.SoftwareVersions = "1"
    image.KVP, image.ConvolutionKernel = "120", "NONE"
    image.BurnedInAnnotation = "NO"


def _place(image: Dataset, phantom: Phantom, k: int) -> None:
    """Image Plane module (PS3.3 C.7.6.2); pixel spacing is row step, then column step."""
    row, column, travel = phantom.axes.T
    x, y, z = phantom.spacing
    image.ImagePositionPatient = [_ds(value) for value in phantom.position(k)]
    image.ImageOrientationPatient = [_ds(value) for value in (*row, *column)]
    image.PixelSpacing = [_ds(y), _ds(x)]
    image.SliceThickness = _ds(z)
    image.SliceLocation = _ds(float(phantom.position(k) @ travel))
    image.GantryDetectorTilt = _ds(phantom.tilt)


def _ds(value: float) -> str:
    """A Decimal String of at most 16 bytes (PS3.5 6.2)."""
    for digits in range(14, 3, -1):
        text = f"{value + 0.0:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} does not fit a DS")
