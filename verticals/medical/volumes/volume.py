"""The volume every part of the medical vertical works on, and what is said about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from plinth.verticals.medical.volumes.terms import KERNEL, known

if TYPE_CHECKING:
    from pydicom import Dataset

    from plinth.verticals.medical.source import Source

Status = Literal[
    "ok",
    "single_slice",
    "duplicates_dropped",
    "mixed_split",
    "partial",
    "gaps_filled",
    "resampled_spacing",
    "resampled_tilt",
    "resampled_tilt_spacing",
    "unlike_neighbours",
]
"""What was done to make a volume, or found in it, least to most serious; the worst that applies."""

SEVERITY: tuple[Status, ...] = (
    "ok",
    "single_slice",
    "duplicates_dropped",
    "mixed_split",
    "partial",
    "gaps_filled",
    "resampled_spacing",
    "resampled_tilt",
    "resampled_tilt_spacing",
    "unlike_neighbours",
)

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]


REFERENCE = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"),
    *("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("Rows", "Columns", "Modality", "InstanceNumber"),
)
"""Attributes that an object which refers to an image reads of it."""


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing found in the geometry of a series.

    Args:
        kind: ``tilt``, ``spacing``, ``gap``, ``duplicate``, ``mixed``, ``no_position``,
            ``single_slice``, ``partial``, ``damaged``, ``alternating``, ``unlike``, ``padding``,
            ``units``, ``window``, ``left_out``, ``part``, ``identity`` or ``lossy``; the last seven
            are notes that concern no voxel's place and never refuse a series.
        message: a sentence for the user, with numbers in mm.
        mm: the size of it in mm (drift, deviation, width of a gap), where there is one.
        slices: indices of the slices concerned, in the order along the normal.
    """

    kind: str
    message: str
    mm: float | None = None
    slices: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        mm = None if self.mm is None else round(self.mm, 4)
        return {
            "kind": self.kind,
            "message": self.message,
            "mm": mm,
            "slices": list(self.slices),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in the geometry of a series and what was done about it.

    Args:
        status: the most serious thing that was done; ``"ok"`` when nothing was.
        issues: everything found, with numbers in mm.
    """

    status: Status = "ok"
    issues: tuple[Issue, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing was repaired, dropped or resampled."""
        return self.status == "ok"

    @property
    def resampled(self) -> bool:
        """The voxels are interpolated: slice k is no longer the k-th image of the series."""
        return self.status.startswith("resampled") or self.status == "gaps_filled"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: ``status``, whether that is ``"ok"``, and ``issues``."""
        issues = [issue.as_dict() for issue in self.issues]
        return {"status": self.status, "ok": self.ok, "issues": issues}


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a series (VOI LUT module, PS3.3 C.11.2), in modality units.

    Args:
        center: Window Center.
        width: Window Width.
        function: ``"linear"``, ``"linear_exact"`` or ``"sigmoid"`` (VOI LUT Function).
    """

    center: float
    width: float
    function: str = "linear"


HOW_TO_SAY_HU = (
    "send the scanner's own images; where its conformance statement says that they are HU, set "
    "Rescale Type (0028,1054) to HU, with slope and intercept, in a copy"
)
"""What to do about CT whose unit is not HU."""


@dataclass(frozen=True)
class SeriesFacts:
    """What is known of the series behind a volume. Holds no name, date or patient number.

    Args:
        id: stable, short, free of personal data; names files and journal entries.
        modality: Modality, such as ``"CT"``.
        sop_class_uid: SOP Class UID of the images.
        rows: number of rows (y) of the images.
        columns: number of columns (x) of the images.
        spacing: (x, y, z) mm of the source images; z is the mean step along the normal.
        number_of_slices: images (or frames) used, after duplicates were dropped.
        units: of the modality values: ``"HU"``, another Rescale Type, or ``""`` if unknown.
        slice_thickness: Slice Thickness in mm, which says nothing about the spacing; ``None``
            where the images differ in it.
        kernel: Convolution Kernel.
        photometric: ``"MONOCHROME2"``, or ``"MONOCHROME1"`` where low values are white.
        image_type: Image Type, value by value.
        transfer_syntax_uid: how the pixel data were stored.
        windows: windows stored with the first image.
        burned_in: Burned In Annotation (0028,0301): ``"YES"``, ``"NO"`` or ``None``.
        study_instance_uid: Study Instance UID.
        series_instance_uid: Series Instance UID.
        frame_of_reference_uid: Frame of Reference UID, if any.
        sop_instance_uids: per source slice, in ascending order along the normal.
        frame_numbers: per source slice, counted from 1, for multi-frame objects.
        positions: per source slice, Image Position (Patient) in LPS mm.
        sources: per source slice, where the image lies.
    """

    id: str
    modality: str
    sop_class_uid: str
    rows: int
    columns: int
    spacing: tuple[float, float, float]
    number_of_slices: int
    units: str = ""
    slice_thickness: float | None = None
    kernel: str | None = None
    contrast: bool = False
    kind: str | None = None
    photometric: str = "MONOCHROME2"
    image_type: tuple[str, ...] = ()
    transfer_syntax_uid: str = field(default="", repr=False)
    windows: tuple[Window, ...] = field(default=(), repr=False)
    burned_in: str | None = None
    study_instance_uid: str = field(default="", repr=False)
    series_instance_uid: str = field(default="", repr=False)
    frame_of_reference_uid: str | None = field(default=None, repr=False)
    sop_instance_uids: tuple[str, ...] = field(default=(), repr=False)
    frame_numbers: tuple[int, ...] = field(default=(), repr=False)
    positions: tuple[tuple[float, float, float], ...] = field(default=(), repr=False)
    sources: tuple[Source, ...] = field(default=(), repr=False)

    @property
    def told_units(self) -> str:
        """The unit of the values, in words, for a message."""
        if self.units == "US":
            return "of no stated unit (Rescale Type US, unspecified)"
        return f"in {self.units}" if self.units else "in no known unit (no Rescale Slope and Type)"

    @property
    def files(self) -> tuple[str, ...]:
        """Per source slice, the file's name (``archive.zip:member`` inside an archive)."""
        return tuple(source.name for source in self.sources)

    def headers(self) -> list[Dataset]:
        """The source images' data sets without pixel data, one per file, in slice order.

        The first is whole; the others hold what a reference to an image and its place needs, as
        patient, study and series are the same. They hold the patient's identity: for writing
        derived objects, not for logs.
        """
        first, *others = dict.fromkeys(self.sources) or (None,)
        if first is None:
            return []
        whole = first.dataset(pixels=False)
        return [whole, *(source.dataset(pixels=False, only=REFERENCE) for source in others)]

    def public(self) -> dict[str, Any]:
        """What a report may print: no UID, no file name, no position."""
        return {
            "id": self.id,
            "modality": self.modality,
            "rows": self.rows,
            "columns": self.columns,
            "slices": self.number_of_slices,
            "units": self.units,
            "spacing_mm": [round(value, 4) for value in self.spacing],
            "slice_thickness_mm": self.slice_thickness,
            "kernel": known(self.kernel, KERNEL) if self.kernel else self.kernel,
            "contrast": self.contrast,
        }


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels with their true place in the patient.

    Args:
        voxels: (z, y, x) int16 or float32, modality units (HU for CT).
        affine: (4, 4) float64, voxel index (i = x column, j = y row, k = z slice), voxel
            centres, to patient LPS in mm (PS3.3 C.7.6.2.1.1). Right-handed; its columns are
            orthogonal to within a drift of 0.1 mm over the whole volume.
        verdict: what was found in the geometry and done about it.
        series: facts of the series it was read from.
        filled: slices k that were interpolated where images are missing; no measurement counts
            them.
    """

    voxels: Array
    affine: Affine
    verdict: Verdict
    series: SeriesFacts
    filled: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) voxels."""
        z, y, x = self.voxels.shape
        return z, y, x

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(x, y, z) mm between voxel centres."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def origin(self) -> tuple[float, float, float]:
        """LPS mm of the centre of voxel (0, 0, 0)."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def direction(self) -> npt.NDArray[np.float64]:
        """(3, 3) unit vectors of i, j and k in LPS, as columns."""
        columns: npt.NDArray[np.float64] = self.affine[:3, :3].copy()
        columns /= np.linalg.norm(columns, axis=0)
        return columns

    @property
    def voxel_volume_mm3(self) -> float:
        """mm³ of one voxel."""
        return abs(float(np.linalg.det(self.affine[:3, :3])))

    @property
    def slice_uids(self) -> tuple[str, ...] | None:
        """SOP Instance UID of each slice k, or ``None`` when slices were interpolated."""
        return None if self.verdict.resampled else self.series.sop_instance_uids

    def index_to_lps(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Voxel indices (..., 3) in the order (i, j, k), fractions allowed, to LPS mm."""
        ijk = np.asarray(points, dtype=np.float64)
        return ijk @ self.affine[:3, :3].T + self.affine[:3, 3]

    def lps_to_index(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """LPS mm (..., 3) to fractional voxel indices (..., 3) in the order (i, j, k)."""
        mm = np.asarray(points, dtype=np.float64)
        return (mm - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def __repr__(self) -> str:
        x, y, z = self.spacing
        return (
            f"Volume({self.voxels.dtype} {self.shape} zyx, {x:.3f} x {y:.3f} x {z:.3f} mm, "
            f"{self.series.modality}, verdict {self.verdict.status!r})"
        )
