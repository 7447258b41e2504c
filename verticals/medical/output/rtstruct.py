"""Labels as an RT Structure Set (PS3.3 A.19): closed planar contours in the slices' own planes.

A contour runs half way between the centres of voxels inside and outside, so that filling it by
voxel centres gives the labels back. A hole is joined to its outer contour by a line of no width
(keyhole), which every filling rule takes alike.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

from plinth.engine import InputError
from plinth.verticals.medical.output.derived import (
    COPIED,
    SHORT_TEXT,
    derived,
    made_by,
    slice_headers,
    source_headers,
)
from plinth.verticals.medical.output.report import Origin
from plinth.verticals.medical.volumes.volume import Volume

Labels = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Structure:
    """A label that becomes a region of interest.

    Args:
        label: its value in the label map.
        name: ROI Name.
    """

    label: int
    name: str


def write_rtstruct(
    volume: Volume,
    labels: Labels,
    structures: Sequence[Structure],
    model: str,
    origin: Origin,
    path: Path,
) -> None:
    """Write structures as contours on a volume's native grid.

    The file refers to the source images and carries the patient's identity as they do.

    Args:
        volume: whose images the structures are of.
        labels: (z, y, x).
        structures: those that have voxels are written.
        model: the rules or the network that made them.
        origin: how they did.
        path: the file.

    Raises:
        InputError: nothing to write, or no source images.
    """
    sources = source_headers(volume)
    with derived("RT Structure Set", sources):
        document = _head(sources[0], model, origin)
        document.ReferencedFrameOfReferenceSequence = DicomSequence([_frame_of_reference(sources)])
        _add_structures(document, volume, labels, structures, slice_headers(volume, sources))
    if not document.StructureSetROISequence:
        raise InputError("none of the structures was found", reason="empty")
    document.save_as(path, enforce_file_format=True)


def contours(mask: npt.NDArray[np.bool_]) -> Iterator[Points]:
    """The outlines of a mask's pieces, holes joined to them by keyholes.

    Args:
        mask: (rows, columns).

    Yields:
        (n, 2) column and row of each point, in pixels; the last point is not the first.
    """
    import contourpy  # only when contours are written

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    top, left = rows[0] - 1, columns[0] - 1
    cut = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    lines = contourpy.contour_generator(
        z=cut.astype(np.float32), name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    for points, offsets in zip(*lines.filled(0.5, np.inf), strict=True):
        rings = [_corners(points[start : end - 1]) for start, end in itertools.pairwise(offsets)]
        yield np.add(_keyholed(rings), (left, top))


def _corners(ring: Points) -> Points:
    """The points of a ring at which it turns."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    corners: Points = ring[turns]
    return corners


def _keyholed(rings: list[Points]) -> Points:
    """An outer ring that goes to each hole and back by the same line."""
    outer, holes = rings[0], rings[1:]
    for hole in holes:
        far = ((outer[:, None] - hole[None]) ** 2).sum(axis=2)
        at, start = np.unravel_index(int(far.argmin()), far.shape)
        around = np.roll(hole, -int(start), axis=0)
        outer = np.concatenate([outer[: at + 1], around, around[:1], outer[at:]])
    return outer


def _head(source: Dataset, model: str, origin: Origin) -> Dataset:
    about = made_by(model, 902, "Structures, research use only")
    now = datetime.now()
    made = Dataset()
    made.file_meta = FileMetaDataset()
    # A contour may be longer than the 64 KiB that the length of an explicit DS can say.
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = RTStructureSetStorage
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = about["sop_instance_uid"]
    for keyword in COPIED:
        if keyword in source:
            made[keyword] = source[keyword]
    made.Modality = "RTSTRUCT"
    made.SeriesInstanceUID, made.SeriesNumber = about["series_instance_uid"], 902
    made.SeriesDescription, made.InstanceNumber = about["series_description"], 1
    made.Manufacturer, made.ManufacturerModelName = "Plinth", model[:64]
    made.SoftwareVersions, made.OperatorsName = about["software_versions"], ""
    made.StructureSetLabel = "RESEARCH_ONLY"
    made.StructureSetDescription = origin.text(SHORT_TEXT)
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.StructureSetROISequence = DicomSequence()
    made.ROIContourSequence = DicomSequence()
    made.RTROIObservationsSequence = DicomSequence()
    return made


def _frame_of_reference(sources: list[Dataset]) -> Dataset:
    series = _item(
        SeriesInstanceUID=sources[0].SeriesInstanceUID,
        ContourImageSequence=DicomSequence([_reference(one) for one in sources]),
    )
    study = _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management, retired
        ReferencedSOPInstanceUID=sources[0].StudyInstanceUID,
        RTReferencedSeriesSequence=DicomSequence([series]),
    )
    return _item(
        FrameOfReferenceUID=sources[0].FrameOfReferenceUID,
        RTReferencedStudySequence=DicomSequence([study]),
    )


def _add_structures(
    document: Dataset,
    volume: Volume,
    labels: Labels,
    structures: Sequence[Structure],
    images: list[Dataset] | None,
) -> None:
    (frame,) = document.ReferencedFrameOfReferenceSequence
    for structure in structures:
        planes = [k for k, plane in enumerate(labels) if (plane == structure.label).any()]
        drawn = [
            _contour(volume, points, k, images[k] if images else None)
            for k in planes
            for points in contours(labels[k] == structure.label)
        ]
        if not drawn:
            continue
        number = len(document.StructureSetROISequence) + 1
        red, green, blue = colorsys.hsv_to_rgb((number * 0.61803) % 1, 0.75, 1.0)
        document.StructureSetROISequence.append(
            _item(
                ROINumber=number,
                ReferencedFrameOfReferenceUID=frame.FrameOfReferenceUID,
                ROIName=structure.name[:64],
                ROIGenerationAlgorithm="AUTOMATIC",
            )
        )
        document.ROIContourSequence.append(
            _item(
                ROIDisplayColor=[round(255 * value) for value in (red, green, blue)],
                ContourSequence=DicomSequence(drawn),
                ReferencedROINumber=number,
            )
        )
        document.RTROIObservationsSequence.append(
            _item(
                ObservationNumber=number,
                ReferencedROINumber=number,
                RTROIInterpretedType="",
                ROIInterpreter="",
            )
        )


def _contour(volume: Volume, points: Points, k: int, image: Dataset | None) -> Dataset:
    index = np.column_stack([points, np.full(len(points), k)])
    item = _item(
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
        ContourData=[f"{value:.4f}" for value in volume.index_to_lps(index).ravel()],
    )
    if image is not None:
        reference = _reference(image)
        if "NumberOfFrames" in image:
            reference.ReferencedFrameNumber = volume.series.frame_numbers[k]
        item.ContourImageSequence = DicomSequence([reference])
    return item


def _reference(image: Dataset) -> Dataset:
    return _item(
        ReferencedSOPClassUID=image.SOPClassUID, ReferencedSOPInstanceUID=image.SOPInstanceUID
    )


def _item(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made
