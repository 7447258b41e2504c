"""Analytic solids with exact volumes, painted into slices with partial-volume edges."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Point = tuple[float, float, float]

Inside = Callable[[Float, Float, Float], npt.NDArray[np.bool_]]

FINE = 5
"""Sub-samples per axis of a voxel, for solids of only a few voxels across."""

AT_ONCE = 1 << 18
"""Sub-samples that are looked at together."""


@dataclass(frozen=True)
class Solid(ABC):
    """A region of one CT number.

    Args:
        name: what it is.
        hu: its CT number.
    """

    name: str
    hu: float

    @property
    @abstractmethod
    def volume(self) -> float:
        """mm³, from a formula; ``inf`` for solids without an end."""

    @abstractmethod
    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        """Share (y, x) of each voxel inside the solid, 0 to 1.

        Args:
            points: x, y and z of the voxel centres, mm; each (y, x), or of length 1 along an axis
                that it does not depend on.
            cell: (3, 3) columns: the voxel's edges, mm.
        """

    def box(self) -> tuple[Point, Point]:
        """Lower and upper corner, mm; infinite where the solid has no end."""
        return (-math.inf,) * 3, (math.inf,) * 3

    def paint(self, image: Float, points: Sequence[Float], cell: Float) -> None:
        """Blend the solid into ``image`` (y, x) HU, in place."""
        reach = np.abs(cell).sum(axis=1) / 2
        near: npt.NDArray[np.bool_] = np.ones((1, 1), dtype=bool)
        for axis, (low, high) in enumerate(zip(*self.box(), strict=True)):
            if math.isfinite(low) or math.isfinite(high):
                near = near & (points[axis] >= low - reach[axis])
                near &= points[axis] <= high + reach[axis]
        if not near.any():
            return
        near = np.broadcast_to(near, image.shape)
        rows = np.flatnonzero(near.any(axis=1))
        columns = np.flatnonzero(near.any(axis=0))
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        share = self.coverage([_within(axis, part) for axis in points], cell)
        image[part] += share * (np.float32(self.hu) - image[part])


def _within(axis: Float, part: tuple[slice, slice]) -> Float:
    """Coordinates of a part of an image; an axis that they do not depend on stays of length 1."""
    return axis[tuple(s if n > 1 else slice(None) for s, n in zip(part, axis.shape, strict=True))]


def _share(level: Float, gradient: Sequence[Float], cell: Float) -> Float:
    """Coverage of voxels by {level < 0}, exact for a plane met face on.

    ``level / |gradient|`` is the signed distance to first order; the width of the ramp is the
    voxel's extent along the gradient. Summed over voxels the error is of second order.
    """
    slope = sum(
        np.abs(sum(gradient[axis] * cell[axis, edge] for axis in range(3))) for edge in range(3)
    )
    share: Float = np.clip(0.5 - level / np.maximum(slope, np.float32(1e-9)), 0, 1)
    return share


@dataclass(frozen=True)
class Cylinder(Solid):
    """An elliptical cylinder along z, from ``bottom`` upwards without end.

    Args:
        centre: (x, y) mm.
        radii: half axes (x, y) mm.
        bottom: z of its lower face, mm.
    """

    centre: tuple[float, float]
    radii: tuple[float, float]
    bottom: float = -math.inf

    @property
    def volume(self) -> float:
        return math.inf

    def box(self) -> tuple[Point, Point]:
        (x, y), (a, b) = self.centre, self.radii
        return (x - a, y - b, self.bottom), (x + a, y + b, math.inf)

    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        u, v = (
            (points[axis] - np.float32(self.centre[axis])) / np.float32(self.radii[axis])
            for axis in range(2)
        )
        zero = np.zeros((), dtype=np.float32)
        gradient = [2 * u / np.float32(self.radii[0]), 2 * v / np.float32(self.radii[1]), zero]
        share = _share(u * u + v * v - 1, gradient, cell)
        if math.isfinite(self.bottom):
            up = [zero, zero, np.full((), -1, dtype=np.float32)]
            share = share * _share(np.float32(self.bottom) - points[2], up, cell)
        return share


@dataclass(frozen=True)
class Slab(Solid):
    """A box along z without end (the couch).

    Args:
        centre: (x, y) mm.
        half: half widths (x, y) mm.
    """

    centre: tuple[float, float]
    half: tuple[float, float]

    @property
    def volume(self) -> float:
        return math.inf

    def box(self) -> tuple[Point, Point]:
        (x, y), (a, b) = self.centre, self.half
        return (x - a, y - b, -math.inf), (x + a, y + b, math.inf)

    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        zero = np.zeros((), dtype=np.float32)
        share = np.ones((), dtype=np.float32)
        for axis in range(2):
            offset = points[axis] - np.float32(self.centre[axis])
            gradient = [zero, zero, zero]
            gradient[axis] = np.sign(offset)
            share = share * _share(np.abs(offset) - np.float32(self.half[axis]), gradient, cell)
        return np.asarray(share, dtype=np.float32)


@dataclass(frozen=True)
class RibCage(Solid):
    """Rings between two ellipses, repeated along z.

    Args:
        radii: half axes (x, y) mm of the ellipse of relative radius 1.
        shell: inner and outer relative radius.
        period: mm from ring to ring.
        width: mm of a ring along z.
    """

    radii: tuple[float, float]
    shell: tuple[float, float]
    period: float
    width: float

    @property
    def volume(self) -> float:
        return math.inf

    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        u, v = (points[axis] / np.float32(self.radii[axis]) for axis in range(2))
        zero = np.zeros((), dtype=np.float32)
        gradient = [2 * u / np.float32(self.radii[0]), 2 * v / np.float32(self.radii[1]), zero]
        square = u * u + v * v
        inner, outer = (_share(square - np.float32(r * r), gradient, cell) for r in self.shell)
        phase = np.abs(
            np.mod(points[2] + np.float32(self.period / 2), self.period) - self.period / 2
        )
        up = [zero, zero, np.ones((), dtype=np.float32)]
        ring = _share((phase - self.width / 2).astype(np.float32), up, cell)
        return (outer - inner) * ring


@dataclass(frozen=True)
class Ellipsoid(Solid):
    """An ellipsoid with axes along x, y, z.

    Args:
        centre: (x, y, z) mm.
        radii: half axes (x, y, z) mm.
    """

    centre: Point
    radii: Point

    @property
    def volume(self) -> float:
        return 4 / 3 * math.pi * math.prod(self.radii)

    def box(self) -> tuple[Point, Point]:
        low = tuple(c - r for c, r in zip(self.centre, self.radii, strict=True))
        high = tuple(c + r for c, r in zip(self.centre, self.radii, strict=True))
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        if min(self.radii) < 8 * float(np.abs(cell).sum(axis=1).max()):
            return _sampled(self._inside, points, cell)
        scaled = [
            (points[axis] - np.float32(self.centre[axis])) / np.float32(self.radii[axis])
            for axis in range(3)
        ]
        gradient = [2 * s / np.float32(r) for s, r in zip(scaled, self.radii, strict=True)]
        level = scaled[0] * scaled[0] + scaled[1] * scaled[1] + scaled[2] * scaled[2] - 1
        return _share(level, gradient, cell)

    def _inside(self, x: Float, y: Float, z: Float) -> npt.NDArray[np.bool_]:
        scaled = [
            (value - np.float32(centre)) / np.float32(radius)
            for value, centre, radius in zip((x, y, z), self.centre, self.radii, strict=True)
        ]
        inside: npt.NDArray[np.bool_] = scaled[0] ** 2 + scaled[1] ** 2 + scaled[2] ** 2 < 1
        return inside


def sphere(name: str, hu: float, centre: Point, diameter: float) -> Ellipsoid:
    """An ellipsoid with three equal axes."""
    return Ellipsoid(name, hu, centre, (diameter / 2,) * 3)


@dataclass(frozen=True)
class Capsule(Solid):
    """A straight tube with round ends (a vessel).

    Args:
        start: (x, y, z) mm of one end of its axis.
        end: the other end.
        radius: mm.
    """

    start: Point
    end: Point
    radius: float

    @property
    def volume(self) -> float:
        length = math.dist(self.start, self.end)
        return math.pi * self.radius**2 * length + 4 / 3 * math.pi * self.radius**3

    def box(self) -> tuple[Point, Point]:
        low = tuple(min(p) - self.radius for p in zip(self.start, self.end, strict=True))
        high = tuple(max(p) + self.radius for p in zip(self.start, self.end, strict=True))
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    def coverage(self, points: Sequence[Float], cell: Float) -> Float:
        return _sampled(self._inside, points, cell)

    def _inside(self, x: Float, y: Float, z: Float) -> npt.NDArray[np.bool_]:
        start = np.asarray(self.start, dtype=np.float32)
        axis = np.asarray(self.end, dtype=np.float32) - start
        offset = (x - start[0], y - start[1], z - start[2])
        along = sum(offset[n] * axis[n] for n in range(3)) / sum(axis * axis)
        along = np.clip(along, 0, 1)
        square = sum((offset[n] - along * axis[n]) ** 2 for n in range(3))
        inside: npt.NDArray[np.bool_] = square < np.float32(self.radius**2)
        return inside


def _sampled(inside: Inside, points: Sequence[Float], cell: Float) -> Float:
    """Coverage by FINE³ sub-samples of every voxel."""
    steps = (np.arange(FINE, dtype=np.float32) + 0.5) / FINE - 0.5
    a, b, c = (one.ravel() for one in np.meshgrid(steps, steps, steps, indexing="ij"))
    shifts = [cell[axis, 0] * a + cell[axis, 1] * b + cell[axis, 2] * c for axis in range(3)]
    total = np.zeros(np.broadcast_shapes(*(p.shape for p in points)), dtype=np.float32)
    part = max(1, AT_ONCE // max(1, total.size))
    for start in range(0, FINE**3, part):
        some = [points[axis] + shifts[axis][start : start + part, None, None] for axis in range(3)]
        total += inside(*some).sum(axis=0, dtype=np.float32)
    return total / np.float32(FINE**3)
