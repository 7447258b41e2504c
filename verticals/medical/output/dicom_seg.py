"""The labels as a DICOM Segmentation (PS3.3 A.51) beside its source images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from plinth import __version__
from plinth.engine import InputError
from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE
from plinth.verticals.medical.output.report import RULES, CtArtefacts, CtReport, CtResult
from plinth.verticals.medical.volumes.volume import Volume

TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
VALID = {
    "PatientAge": re.compile(r"\d{3}[DWMY]"),
    "PatientBirthDate": re.compile(r"\d{8}"),
    "PatientSex": re.compile(r"[FMO]"),
    "StudyDate": re.compile(r"\d{8}"),
    "StudyTime": re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?"),
}
TOLERANCE_MM = 0.01


def write_segmentation(result: CtResult, path: Path) -> None:
    """Write lungs and nodules as segments of one binary SEG, and check its geometry on disk.

    The file refers to the source instances and carries the patient's identity as they do, as
    a PACS needs it. Voxels of a nodule belong to its segment and not to the lung's.

    Args:
        result: the volume, its labels, and the network that found the nodules.
        path: the file.

    Raises:
        InputError: there is nothing to segment, there are no source images, or their headers
            are not good enough for an object that refers to them.
    """
    import highdicom  # heavy: only when a SEG is written

    report, artefacts = result.response, result.artefacts
    numbers, segments = _segments(artefacts, report)
    if not segments:
        raise InputError("neither lungs nor nodules were found", reason="empty")
    sources = [clean_header(header) for header in artefacts.volume.series.headers()]
    if not sources:
        raise InputError("the volume was not read from DICOM images", reason="no_source")
    volume = highdicom.Volume(
        numbers[artefacts.analysis.labels],
        highdicom_affine(artefacts.volume),
        "PATIENT",
        frame_of_reference_uid=artefacts.volume.series.frame_of_reference_uid,
    )
    try:
        seg = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=volume,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="Plinth",
            manufacturer_model_name=RULES,
            software_versions=__version__,
            device_serial_number="0",
            content_label="CT_ANALYSIS",
            content_description="Research use only, not for diagnosis",
            series_description="CT analysis, research use only",
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # The message may repeat values of the header.
        raise InputError(
            f"the source's headers do not allow a DICOM SEG ({type(error).__name__})",
            reason="source_header",
            hint="check the patient, study and frame of reference attributes of the images",
        ) from error
    seg.save_as(path)
    check_geometry(path, artefacts.volume)


def highdicom_affine(volume: Volume) -> npt.NDArray[np.float64]:
    """(4, 4) array index (slice, row, column) to LPS mm, as highdicom orders its indices."""
    affine = volume.affine.copy()
    affine[:3, :3] = volume.affine[:3, 2::-1]
    return affine


def check_geometry(path: Path, volume: Volume) -> None:
    """Read the frames' places back and hold them against the volume's slices.

    Raises:
        InputError: a frame does not lie on a slice; the file is removed.
    """
    import highdicom

    seg = highdicom.seg.segread(path)
    shared = seg.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    places = np.array(
        [
            frame.PlanePositionSequence[0].ImagePositionPatient
            for frame in seg.PerFrameFunctionalGroupsSequence
        ],
        float,
    )
    index = volume.lps_to_index(places)
    off = np.abs(index - np.rint(index * [0, 0, 1])) * volume.spacing
    row, column = (float(value) for value in measures.PixelSpacing)
    far = max(volume.shape) * max(
        float(np.abs(cosines[:3] * column - volume.affine[:3, 0]).max()),
        float(np.abs(cosines[3:] * row - volume.affine[:3, 1]).max()),
    )
    if max(float(off.max()), far) > TOLERANCE_MM:
        path.unlink()
        raise InputError(
            f"the DICOM SEG lies {max(float(off.max()), far):.3f} mm off its volume when read "
            "back, so it was removed",
            reason="geometry",
        )


def _segments(artefacts: CtArtefacts, report: CtReport) -> tuple[npt.NDArray[np.uint8], list[Any]]:
    """Segment number by label, and the segments' descriptions in the order of their numbers."""
    present = np.unique(artefacts.analysis.labels)
    numbers = np.zeros(256, np.uint8)
    segments: list[Any] = []
    for label in present[present > 0]:
        description = _description(int(label), len(segments) + 1, report)
        if description is not None:
            segments.append(description)
            numbers[label] = len(segments)
    return numbers, segments


def _description(label: int, number: int, report: CtReport) -> Any:
    """A segment's description, or None for a label that is not written."""
    import highdicom
    from pydicom.sr.codedict import codes

    network = report.network
    if label in (LUNG_RIGHT, LUNG_LEFT):
        right = label == LUNG_RIGHT
        name, tracking = ("Right lung" if right else "Left lung"), None
        category = codes.SCT.AnatomicalStructure
        kind = highdicom.sr.CodedConcept("3341006" if right else "44029006", "SCT", name)
        method, version = RULES, __version__
        family = codes.DCM.MorphologicalOperations
    elif label >= NODULE and network is not None:
        name = tracking = f"Nodule candidate {label - NODULE + 1}"
        category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Nodule
        method, version = f"Plinth {network.name}", network.version
        family = codes.DCM.ArtificialIntelligence
    else:
        return None
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=method, version=version, family=family
        ),
        tracking_id=tracking,
        tracking_uid=highdicom.UID() if tracking else None,
    )


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
