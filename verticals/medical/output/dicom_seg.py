"""The labels as a DICOM Segmentation (PS3.3 A.51) beside its source images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless
from pydicom.valuerep import DS

from plinth.engine import InputError
from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE
from plinth.verticals.medical.output.derived import (
    SHORT_TEXT,
    derived,
    made_by,
    slice_headers,
    source_headers,
)
from plinth.verticals.medical.output.report import (
    RESEARCH_USE,
    RULES,
    CtArtefacts,
    CtReport,
    CtResult,
)
from plinth.verticals.medical.output.seg_frames import (
    matched,
    places_in,
    write_frames,
)
from plinth.verticals.medical.volumes.labelled import slices_with
from plinth.verticals.medical.volumes.volume import Volume

TOLERANCE_MM = 0.01
ORTHOGONAL = 1e-5
"""Largest product of two directions, below which highdicom takes them for orthogonal too."""
Labels = npt.NDArray[np.uint8]
SegType = Literal["binary", "labelmap"]


def write_segmentation(result: CtResult, path: Path, kind: SegType = "binary") -> None:
    """Write lungs and nodules as segments of one SEG, and check its geometry on disk.

    The file refers to the source instances and carries the patient's identity as they do, as
    a PACS needs it. Voxels of a nodule belong to its segment and not to the lung's.

    Args:
        result: the volume, its labels, and the network that found the nodules.
        path: the file.
        kind: of SEG.

    Raises:
        InputError: there is nothing to segment, there are no source images, or their headers
            are not good enough for an object that refers to them.
    """
    report, artefacts = result.response, result.artefacts
    values, segments = _segments(artefacts, report)
    if not segments:
        raise InputError("neither lungs nor nodules were found", reason="empty")
    about = made_by(RULES, 900, "CT analysis, research use only")
    save_seg(artefacts.volume, artefacts.analysis.labels, values, segments, about, path, kind)


def save_seg(
    volume: Volume,
    labels: Labels,
    values: Labels,
    segments: list[Any],
    about: dict[str, Any],
    path: Path,
    kind: SegType,
) -> None:
    """Write segments as one SEG on a volume's native grid, and check its geometry on disk.

    Args:
        volume: whose images the segments are of.
        labels: (z, y, x).
        values: in ``labels``, by segment.
        segments: their descriptions, in the order of their numbers from 1.
        about: from :func:`made_by`.
        path: the file.
        kind: ``"binary"``: a frame of bits for each segment and slice, read everywhere;
            ``"labelmap"``: one of numbers for each slice (PS3.3 A.51, since 2024), JPEG-LS.

    Raises:
        InputError: there are no source images, or their headers do not allow a SEG.
    """
    sources = source_headers(volume)
    images = slice_headers(volume, sources)
    with derived("DICOM SEG", sources):
        if kind == "binary" and images is not None and matched(volume, images) and len(images) > 1:
            sample = np.zeros((2, *volume.shape[1:]), np.uint8)  # two have a spacing
            sample.flat[: len(segments)] = np.arange(1, len(segments) + 1)
            head = _made(volume, images[:2], sample, segments, about, kind)
            write_frames(head, images, labels, values, path)
        else:
            numbers = np.zeros(256, np.uint8)
            numbers[values] = np.arange(1, len(values) + 1)
            _made(volume, sources, numbers[labels], segments, about, kind).save_as(path)
    check_geometry(path, volume)


def _made(
    volume: Volume,
    sources: list[Dataset],
    numbered: Labels,
    segments: list[Any],
    about: dict[str, Any],
    kind: SegType,
) -> Any:
    """A ``highdicom.seg.Segmentation``.

    Args:
        volume: of whose grid ``numbered`` are the first slices.
        sources: headers of the images.
        numbered: (z, y, x), 0 or the number of a segment.
        segments: as :func:`save_seg`.
        about: as :func:`save_seg`.
        kind: as :func:`save_seg`.
    """
    import highdicom  # heavy: only when a SEG is written

    placed: dict[str, Any]
    if _leans(volume):
        placed = {"pixel_array": numbered, **_planes(volume, len(numbered))}
    else:
        frame_of_reference = sources[0].FrameOfReferenceUID
        affine = highdicom_affine(volume)
        placed = {
            "pixel_array": highdicom.Volume(
                numbered, affine, "PATIENT", frame_of_reference_uid=frame_of_reference
            )
        }
    made = highdicom.seg.Segmentation(
        source_images=sources,
        **placed,
        segmentation_type=kind.upper(),
        transfer_syntax_uid=ExplicitVRLittleEndian if kind == "binary" else JPEGLSLossless,
        segment_descriptions=segments,
        content_label="SEGMENTATION",
        content_description=RESEARCH_USE[:64],
        **about,
    )
    measures = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    step = DS(volume.spacing[2], auto_format=True)
    if len(numbered) == 1:  # of which highdicom says 1 mm
        measures.SpacingBetweenSlices = step
    if measures.get("SliceThickness") is None:  # as in the frames of the source
        measures.SliceThickness = step
    return made


def _leans(volume: Volume) -> bool:
    """Slices stacked so little off their normal that it counts as straight, and highdicom minds."""
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > ORTHOGONAL)


def _planes(volume: Volume, count: int) -> dict[str, Any]:
    """The place of each of the first slices by itself, as highdicom takes it."""
    import highdicom  # heavy: only when a SEG is written

    x, y, z = volume.spacing
    row, column = (volume.affine[:3, k] / size for k, size in enumerate((x, y)))
    places = volume.index_to_lps(np.array([[0, 0, k] for k in range(count)], float))
    return {
        "plane_positions": [
            highdicom.PlanePositionSequence("PATIENT", place) for place in places.tolist()
        ],
        "plane_orientation": highdicom.PlaneOrientationSequence("PATIENT", [*row, *column]),
        "pixel_measures": highdicom.PixelMeasuresSequence((y, x), slice_thickness=z),
    }


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
    head = pydicom.dcmread(
        path, stop_before_pixels=True, specific_tags=["SharedFunctionalGroupsSequence"]
    )
    shared = head.SharedFunctionalGroupsSequence[0]
    measures = shared.PixelMeasuresSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    places = np.array(list(places_in(path)), float)
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


def _segments(artefacts: CtArtefacts, report: CtReport) -> tuple[Labels, list[Any]]:
    """Label of each segment, and the segments' descriptions in the order of their numbers."""
    values: list[int] = []
    segments: list[Any] = []
    known = np.arange(1, NODULE + len(report.nodules or []), dtype=np.uint8)
    for label in known[slices_with(artefacts.analysis.labels, known).any(axis=1)].tolist():
        description = _description(label, len(segments) + 1, report)
        if description is not None:
            segments.append(description)
            values.append(label)
    return np.array(values, np.uint8), segments


def _description(label: int, number: int, report: CtReport) -> Any:
    """A segment's description, or None for a label that is not written."""
    import highdicom
    from pydicom.sr.codedict import codes

    if label in (LUNG_RIGHT, LUNG_LEFT):
        right = label == LUNG_RIGHT
        name = "Right lung" if right else "Left lung"
        category = codes.SCT.AnatomicalStructure
        kind = highdicom.sr.CodedConcept("3341006" if right else "44029006", "SCT", name)
        maker, family = report.maker("lungs"), codes.DCM.MorphologicalOperations
    elif label >= NODULE and report.network is not None:
        name = f"Nodule candidate {label - NODULE + 1}"
        category, kind = codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Nodule
        maker = report.maker(f"nodule_{label - NODULE + 1}")
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
            name=maker.name[:64],
            version=maker.version[:64],
            family=family,
            parameters={"made": maker.origin.text(SHORT_TEXT)},
        ),
        tracking_id=name,
        tracking_uid=highdicom.UID(),
    )
