"""A chest-like CT phantom with exactly known truth.

The body is a set of analytic solids in patient LPS mm: an elliptical-cylinder trunk with a
layer of fat, two lungs, spine, ribs, heart, aorta, trachea, lung vessels, a couch, and
spherical nodules. :func:`slice_hu` gives any slice, in any orientation; edges carry partial
volume. :func:`truth` gives volumes and places from formulas, never from voxels.
:mod:`plinth.verticals.medical.phantom.dicom` writes it as DICOM CT.

It looks like a chest to software; it is a measuring device, not anatomy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.verticals.medical.phantom.solids import (
    Capsule,
    Cylinder,
    Ellipsoid,
    RibCage,
    Slab,
    Solid,
    sphere,
)

Float = npt.NDArray[np.float32]

AIR, FAT, MUSCLE, LUNG, COUCH = -1000.0, -100.0, 50.0, -850.0, -300.0
BONE, RIB, BLOOD, VESSEL, SOLID, GROUND_GLASS = 300.0, 400.0, 180.0, 60.0, 40.0, -550.0


@dataclass(frozen=True, slots=True)
class Nodule:
    """A sphere inside a lung.

    Args:
        centre: (x, y, z) mm from the centre of the body, axes as LPS.
        diameter: mm.
        hu: CT number.
    """

    centre: tuple[float, float, float]
    diameter: float
    hu: float = SOLID


NODULES = (
    Nodule((-82.0, -30.0, 40.0), 8.0),
    Nodule((-95.0, 20.0, -10.0), 12.0),
    Nodule((-68.0, 30.0, -55.0), 6.0),
    Nodule((85.0, -35.0, -40.0), 16.0),
    Nodule((74.0, 30.0, 45.0), 10.0),
    Nodule((98.0, 10.0, 8.0), 20.0, GROUND_GLASS),
)

VESSELS = (
    ((-60.0, -12.0, 20.0), (-92.0, -2.0, 38.0), 2.5),
    ((-62.0, 0.0, -20.0), (-100.0, -18.0, -38.0), 2.0),
    ((-70.0, 24.0, 15.0), (-88.0, 42.0, 24.0), 1.5),
    ((60.0, -10.0, 22.0), (92.0, -22.0, 40.0), 2.5),
    ((62.0, 12.0, -18.0), (96.0, 26.0, -36.0), 2.0),
    ((66.0, -26.0, 12.0), (84.0, -44.0, 22.0), 1.5),
)


@dataclass(frozen=True)
class Phantom:
    """What is in the scanner and how it is scanned.

    Args:
        shape: (x, y, z) = columns, rows, slices.
        spacing: (x, y, z) mm; z is the step along ``travel``.
        seed: seed of the noise and of the UIDs.
        noise_hu: standard deviation of white Gaussian noise.
        nodules: spheres inside the lungs.
        rotation: degrees about patient x, y, z that turn the image axes (oblique planes).
        tilt: degrees of gantry tilt: the planes lean about the row axis while the table still
            travels along the untilted normal, so that the stack of slices is sheared.
        steps: mm between consecutive slices, (slices - 1) numbers, instead of spacing[2].
        centre: LPS mm of the centre of the body (off zero, to make origin faults visible).
    """

    shape: tuple[int, int, int] = (160, 160, 64)
    spacing: tuple[float, float, float] = (2.15, 2.15, 3.25)
    seed: int = 7
    noise_hu: float = 12.0
    nodules: tuple[Nodule, ...] = NODULES
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    tilt: float = 0.0
    steps: tuple[float, ...] | None = None
    centre: tuple[float, float, float] = (4.0, -12.0, -350.0)
    _solids: tuple[Solid, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.steps is not None and len(self.steps) != self.shape[2] - 1:
            raise ValueError(f"steps holds {len(self.steps)} numbers, not {self.shape[2] - 1}")
        object.__setattr__(self, "_solids", body(self.nodules))

    @classmethod
    def full(cls, **changes: Any) -> Phantom:
        """The clinical size: 200 slices of 512 x 512, 0.68 x 0.68 x 1.04 mm."""
        size = cls(shape=(512, 512, 200), spacing=(0.68, 0.68, 1.04))
        return replace(size, **changes)

    @cached_property
    def axes(self) -> npt.NDArray[np.float64]:
        """(3, 3) columns: unit vectors of row direction, column direction and travel, LPS."""
        turned = rotation_matrix(*self.rotation)
        lean = rotation_matrix(self.tilt, 0.0, 0.0)
        planes = turned @ lean
        axes: npt.NDArray[np.float64] = np.column_stack([planes[:, :2], turned[:, 2]])
        return axes

    @cached_property
    def offsets(self) -> npt.NDArray[np.float64]:
        """(z,) mm along ``travel`` of each slice, the middle of the stack at 0."""
        count = self.shape[2]
        steps = self.steps if self.steps is not None else (self.spacing[2],) * (count - 1)
        along: npt.NDArray[np.float64] = np.concatenate([[0.0], np.cumsum(steps)])
        along -= along[-1] / 2
        return along

    def position(self, k: int) -> npt.NDArray[np.float64]:
        """Image Position (Patient) of slice k: LPS mm of the centre of its first voxel."""
        row, column, travel = self.axes.T
        x, y, _ = self.shape
        corner = -(x - 1) / 2 * self.spacing[0] * row - (y - 1) / 2 * self.spacing[1] * column
        place: npt.NDArray[np.float64] = np.asarray(self.centre) + corner + self.offsets[k] * travel
        return place

    def slice_hu(self, k: int, *, noise: bool = True) -> Float:
        """Slice k: (y, x) float32 in HU, seeded noise included unless told otherwise."""
        image = self._render(k)
        if noise and self.noise_hu > 0:
            random = np.random.default_rng([self.seed, k])
            image += random.standard_normal(image.shape, dtype=np.float32) * self.noise_hu
        return image

    def _render(self, k: int) -> Float:
        row, column, _ = self.axes.T
        start = self.position(k) - np.asarray(self.centre)
        x = (np.arange(self.shape[0]) * self.spacing[0])[None, :]
        y = (np.arange(self.shape[1]) * self.spacing[1])[:, None]
        none = np.zeros((1, 1))
        points = [
            (
                start[axis]
                + (x * row[axis] if row[axis] else none)
                + (y * column[axis] if column[axis] else none)
            ).astype(np.float32)
            for axis in range(3)
        ]
        normal = np.cross(row, column)
        depth = abs(self.spacing[2] * float(normal @ self.axes[:, 2]))
        cell = np.column_stack(
            [row * self.spacing[0], column * self.spacing[1], normal * depth]
        ).astype(np.float32)
        image = np.full((self.shape[1], self.shape[0]), AIR, dtype=np.float32)
        for solid in self._solids:
            solid.paint(image, points, cell)
        return image

    def truth(self) -> dict[str, Any]:
        """Volumes (mm³), nodule centres (LPS mm) and diameters (mm), from formulas.

        Holds for stacks that cover both lungs; ``length_mm`` is the stack's extent, half a
        step added at each end.
        """
        nodules = [_nodule_truth(self, nodule) for nodule in self.nodules]
        lungs = {
            side: _lung_truth(self._solids, self.nodules, sign)
            for side, sign in (("right", -1), ("left", 1))
        }
        return {
            "what": "synthetic chest phantom, not a patient",
            "units": {"volume": "mm3", "length": "mm", "frame": "patient LPS"},
            "seed": self.seed,
            "noise_hu": self.noise_hu,
            "shape_xyz": list(self.shape),
            "spacing_xyz_mm": list(self.spacing),
            "body_centre_lps_mm": list(self.centre),
            "length_mm": round(float(np.ptp(self.offsets)) + self.spacing[2], 4),
            "body_area_mm2": round(math.pi * OUTER[0] * OUTER[1], 1),
            "lungs": lungs,
            "heart_mm3": round(_only(self._solids, "heart").volume, 1),
            "hu": {"lung": LUNG, "fat": FAT, "muscle": MUSCLE, "spine": BONE, "rib": RIB},
            "nodules": nodules,
        }


OUTER = (165.0, 115.0)
INNER = (150.0, 100.0)
LUNG_CENTRES = {"lung_right": (-82.0, 0.0, 0.0), "lung_left": (82.0, 0.0, 0.0)}
LUNG_RADII = (50.0, 72.0, 98.0)


def body(nodules: tuple[Nodule, ...] = NODULES) -> tuple[Solid, ...]:
    """The solids in painting order, in mm from the centre of the body."""
    vessels = tuple(
        Capsule(f"vessel_{n}", VESSEL, start, end, radius)
        for n, (start, end, radius) in enumerate(VESSELS)
    )
    return (
        Slab("couch", COUCH, (0.0, 130.0), (190.0, 6.0)),
        Cylinder("fat", FAT, (0.0, 0.0), OUTER),
        Cylinder("muscle", MUSCLE, (0.0, 0.0), INNER),
        RibCage("ribs", RIB, INNER, (0.955, 0.99), period=24.0, width=8.0),
        Cylinder("spine", BONE, (0.0, 70.0), (20.0, 18.0)),
        Cylinder("aorta", BLOOD, (18.0, 42.0), (11.0, 11.0)),
        Ellipsoid("heart", BLOOD, (8.0, -30.0, -20.0), (27.0, 34.0, 45.0)),
        Cylinder("trachea", AIR, (0.0, 22.0), (9.0, 9.0), bottom=10.0),
        *(Ellipsoid(name, LUNG, centre, LUNG_RADII) for name, centre in LUNG_CENTRES.items()),
        *vessels,
        *(sphere(f"nodule_{n}", s.hu, s.centre, s.diameter) for n, s in enumerate(nodules)),
    )


def rotation_matrix(x: float, y: float, z: float) -> npt.NDArray[np.float64]:
    """(3, 3) rotation by degrees about x, then y, then z."""
    ax, ay, az = np.radians([x, y, z])
    about_x = [[1, 0, 0], [0, math.cos(ax), -math.sin(ax)], [0, math.sin(ax), math.cos(ax)]]
    about_y = [[math.cos(ay), 0, math.sin(ay)], [0, 1, 0], [-math.sin(ay), 0, math.cos(ay)]]
    about_z = [[math.cos(az), -math.sin(az), 0], [math.sin(az), math.cos(az), 0], [0, 0, 1]]
    turned: npt.NDArray[np.float64] = np.array(about_z) @ np.array(about_y) @ np.array(about_x)
    return turned


def _only(solids: tuple[Solid, ...], name: str) -> Solid:
    return next(solid for solid in solids if solid.name == name)


def _nodule_truth(phantom: Phantom, nodule: Nodule) -> dict[str, Any]:
    centre = np.asarray(phantom.centre) + np.asarray(nodule.centre)
    return {
        "centre_lps_mm": [round(float(value), 4) for value in centre],
        "diameter_mm": nodule.diameter,
        "volume_mm3": round(math.pi / 6 * nodule.diameter**3, 3),
        "hu": nodule.hu,
        "lung": "left" if nodule.centre[0] > 0 else "right",
    }


def _lung_truth(
    solids: tuple[Solid, ...], nodules: tuple[Nodule, ...], sign: int
) -> dict[str, Any]:
    whole = _only(solids, "lung_left" if sign > 0 else "lung_right").volume
    inside = sum(math.pi / 6 * s.diameter**3 for s in nodules if sign * s.centre[0] > 0)
    vessels = sum(s.volume for s in solids if isinstance(s, Capsule) and sign * s.start[0] > 0)
    return {
        "volume_mm3": round(whole, 1),
        "air_filled_mm3": round(whole - inside - vessels, 1),
        "vessels_mm3": round(vessels, 1),
        "nodules_mm3": round(inside, 1),
    }
