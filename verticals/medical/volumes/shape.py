"""Size and values of a region of voxels, by the definitions of pyradiomics and IBSI.

The surface is that of marching cubes on the region's voxels, so that every corner of a triangle
lies half way between a voxel inside and one outside. Which triangles a cube of eight voxels has
depends on which of the eight lie inside: area and volume follow from how often each of the 256
cases occurs, and no mesh is held. (scikit-image, whose tables are others, has 0.2 % more surface on
a real region; pyradiomics itself does not build on the Python of today.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from plinth.engine.parallel import spread
from plinth.verticals.medical.volumes.distance import box_of

Mask = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]

PART = 512
"""Points whose distances to all others are held at once."""

FEW, MANY = 64, 4096
"""Points of which all pairs are looked at without a choice among them, and without a hull."""

SMALL = 1 << 18
"""Voxels of a box whose parts are not worth a second thread."""

TINY = 1e-9
"""Share by which a bound gives way, so that rounding makes none too tight."""

DIRECTIONS = np.pi / 32 * np.arange(32)
"""Angles at which the width of a plane's points is taken: none is farther from the direction of a
diameter than half of their step."""

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 3), (3, 0))
"""Steps to the lines that a line's end is held against, on either side of it."""

BIN_WIDTH = 25.0
"""Of the histogram behind entropy and uniformity, in the values' unit."""

CORNERS = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0))
"""(z, y, x) of a cube's corners, in the order of their bits in a case."""

EDGES = (
    (0, 1),
    (1, 2),
    (2, 3),
    (3, 0),
    (4, 5),
    (5, 6),
    (6, 7),
    (7, 4),
    *((n, n + 4) for n in range(4)),
)
"""The two corners of each edge; its middle is a corner of triangles."""

TRIANGLES = """
083 190 183198 12a 08312a 92a029 2832a8a98 b23 b2008b 190b23 b2119b98b 3a1ba3 a1008a8ba 9033b9ba9
98aba8 478 043473 190478 194147173 12a478 34730412a 92a902478 2a9297273479 478b23 b47b24204
190478b23 47b94bb29192 3a1ba3478 ba114b10447b 4789033b9ba9 47b4b99ba 954 954083 054015 854835315
12a954 08312a954 2a5542240 2a5325354834 954b23 b2008b954 054015b23 215258b28548 3a1ba3954
549a1008a8ba 54050ba5bb03 548a58ba8 789579 309539357 780017715 157173 78957912a 12a309395357
0288258572a5 2a5253357 579789b23 579972209b27 b23018178157 21b17b157 7895793a1ba3 5705097b0a10ba0
ba003ba50078570 ba557b 65a 08365a 19065a 18319865a 165126 165126083 965906026 598582526832 b2365a
b2008b65a 190b2365a b2119b98b65a 63b653513 08b0b50515b6 63b036065059 65969bb98 47865a 04347365a
19047865a 19414717365a 478165126 043473165126 478965906026 739479329596269 b2347865a b47b2420465a
190b2347865a 47b94bb2919265a 47863b653513 51b5b610b47b04b 47863b036065059 65969b4797b9 a4964a
a4964a083 01aa60640 18316886461a 149124264 149124264083 024426 832824426 b23a4964a b2008ba4964a
b2301aa60640 64161a148b2118b 964369139b63 18b081b61149641 63b036640 86468b 67a78a89a 67a0a709a073
67a1a7178018 67a1a7173 126168189678 269129679309739 078706602 273267 b2367a78a89a 207b2709767a9a7
67a1a7178018b23 b2117ba61167 896678169b63136 09167b 07870603bb60 67b
"""
"""Edges, in hexadecimal, that three by three are the triangles of the cases 1 to 127, after the
table of P. Bourke (Polygonising a scalar field, 1994) as pyradiomics 2 and 3 have it. The other
cases have those of the voxels outside, turned over."""


@dataclass(frozen=True)
class Shape:
    """Size of a region.

    Args:
        voxels: how many it has.
        volume_mm3: of its voxels (IBSI YEKZ, pyradiomics VoxelVolume).
        mesh_volume_mm3: inside its surface (IBSI RNU0, MeshVolume).
        surface_mm2: area of its surface (IBSI C0JK, SurfaceArea).
        sphericity: surface of the sphere of the mesh's volume over its own (IBSI QCFX).
        diameter_mm: largest distance between two corners of the surface (IBSI L0JK,
            Maximum3DDiameter).
        diameter_slice_mm: the largest in one plane of rows and columns (Maximum2DDiameterSlice).
        diameter_column_mm: in one plane of slices and columns, all of one row index
            (Maximum2DDiameterColumn).
        diameter_row_mm: in one plane of slices and rows, all of one column index
            (Maximum2DDiameterRow).
    """

    voxels: int
    volume_mm3: float
    mesh_volume_mm3: float
    surface_mm2: float
    sphericity: float
    diameter_mm: float
    diameter_slice_mm: float
    diameter_column_mm: float
    diameter_row_mm: float


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ValueStatistics:
    """First-order statistics of the values in a region, in their unit (pyradiomics firstorder).

    Args:
        mean: of all voxels.
        standard_deviation: of the population.
        minimum: smallest.
        percentile_10: interpolated linearly, as the other percentiles.
        median: 50th percentile.
        percentile_90: 90th percentile.
        maximum: largest.
        interquartile_range: 75th less 25th percentile.
        mean_absolute_deviation: from the mean.
        skewness: third standardised moment; 0 where all values are equal.
        kurtosis: fourth standardised moment, 3 for a normal distribution.
        entropy: bits, of a histogram with bins of 25 that begin at a multiple of 25.
        uniformity: sum of the squared shares of its bins.
    """

    mean: float
    standard_deviation: float
    minimum: float
    percentile_10: float
    median: float
    percentile_90: float
    maximum: float
    interquartile_range: float
    mean_absolute_deviation: float
    skewness: float
    kurtosis: float
    entropy: float
    uniformity: float


def shape_of(mask: Mask, spacing: tuple[float, float, float]) -> Shape:
    """Measure a region.

    Args:
        mask: (z, y, x) of an orthogonal grid, with at least one voxel inside; not copied where
            it is the box around the region with a margin of one voxel.
        spacing: (x, y, z) mm.
    """
    inside = _cut(mask)
    count = int(np.count_nonzero(inside))
    step = np.array(spacing[::-1], float)
    ends = [_ends(inside, axis) for axis in range(3)]
    parts: list[Callable[[], Any]] = [
        lambda: _surface(inside, step),
        *(partial(_widest, inside, ends, axis, step) for axis in range(3)),
        lambda: _farthest(_corners(ends) * step),
    ]
    threads = 1 if inside.size < SMALL else None
    (area, volume), in_slice, in_column, in_row, widest = spread(
        lambda part: part(), parts, threads
    )
    return Shape(
        voxels=count,
        volume_mm3=count * float(step.prod()),
        mesh_volume_mm3=volume,
        surface_mm2=area,
        sphericity=(36 * math.pi * volume**2) ** (1 / 3) / area,
        diameter_mm=widest,
        diameter_slice_mm=in_slice,
        diameter_column_mm=in_column,
        diameter_row_mm=in_row,
    )


def values_of(values: npt.NDArray[np.generic]) -> ValueStatistics:
    """Statistics of the values of a region's voxels.

    Args:
        values: (n,) finite numbers, n at least 1.
    """
    return statistics_of(*_counted([values]))


def values_within(
    voxels: npt.NDArray[np.generic], mask: Mask
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Distinct values of the voxels in a region, ascending, and how often each occurs.

    Args:
        voxels: (z, y, x) finite numbers.
        mask: (z, y, x), the region.
    """
    return _counted(plane[inside] for plane, inside in zip(voxels, mask, strict=True))


def statistics_of(found: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> ValueStatistics:
    """Statistics of values that are counted.

    Args:
        found: the distinct values, ascending, at least one.
        counts: how often each occurs.
    """
    total = int(counts.sum())
    mean = float((found * counts).sum() / total)
    apart = found - mean
    spread, skew, tails = (float((apart**n * counts).sum() / total) for n in (2, 3, 4))
    tenth, quarter, half, most, nearly = (
        _percentile(found, counts, share) for share in (0.10, 0.25, 0.50, 0.75, 0.90)
    )
    shares = _bins(found, counts) / total
    return ValueStatistics(
        mean=mean,
        standard_deviation=math.sqrt(spread),
        minimum=float(found[0]),
        percentile_10=tenth,
        median=half,
        percentile_90=nearly,
        maximum=float(found[-1]),
        interquartile_range=most - quarter,
        mean_absolute_deviation=float((np.abs(apart) * counts).sum() / total),
        skewness=skew / spread**1.5 if len(found) > 1 else 0.0,
        kurtosis=tails / spread**2 if len(found) > 1 else 0.0,
        entropy=max(0.0, -float((shares * np.log2(shares)).sum())),
        uniformity=float((shares**2).sum()),
    )


# -- surface and volume --------------------------------------------------------------------------
def _cut(mask: Mask) -> Mask:
    """The box around a region, with a margin of one voxel on all sides."""
    box = box_of(mask)
    ends = zip(box, mask.shape, strict=True)
    if all(span.start == 1 and span.stop == size - 1 for span, size in ends):
        return mask
    return np.pad(mask[box], 1)


@cache
def _cases() -> tuple[Points, npt.NDArray[np.intp]]:
    """Triangles (n, 3, 3) of all cases as points (z, y, x) in the cube, and the case of each."""
    corners = np.array(CORNERS, float)
    middles = [(corners[a] + corners[b]) / 2 for a, b in EDGES]
    triangles, cases = [], []
    for case, row in enumerate(TRIANGLES.split(), 1):
        points = [middles[int(edge, 16)] for edge in row]
        for a, b, c in zip(points[::3], points[1::3], points[2::3], strict=True):
            triangles += [(a, b, c), (c, b, a)]
            cases += [case, 255 - case]
    return np.array(triangles), np.array(cases)


def _surface(inside: Mask, step: Points) -> tuple[float, float]:
    """Area of the surface, mm², and the volume in it, mm³ (the divergence theorem on p / 3).

    A triangle of area vector a with a corner at p, in the cube at o, adds (p + o) · a / 3. The sums
    over p · a and over a are those of a case; how often and where it occurs is counted.
    """
    triangles, cases = _cases()
    corner = triangles * step
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]) / 2

    def by_case(each: Points) -> Points:
        return np.bincount(cases, each, minlength=256).astype(np.float64)

    areas = by_case(np.linalg.norm(normal, axis=1))
    own = by_case((corner[:, 0] * normal).sum(axis=1))
    along = [by_case(normal[:, axis]) * step[axis] for axis in range(3)]
    area = volume = 0.0
    for z, (case, y, x) in enumerate(_cubes(inside)):
        counts = np.bincount(case, minlength=256)
        area += float(counts @ areas)
        volume += float(counts @ (own + z * along[0]))
        volume += float(np.bincount(case, y, minlength=256) @ along[1])
        volume += float(np.bincount(case, x, minlength=256) @ along[2])
    return area, abs(volume) / 3


def _cubes(inside: Mask) -> Iterator[tuple[npt.NDArray[np.intp], ...]]:
    """By slice: case, row and column of each cube that the surface passes through."""
    below = _squares(inside[0])
    for plane in inside[1:]:
        above = _squares(plane)
        case = below | (above << 4)
        below = above
        y, x = np.nonzero((case + np.uint8(1)) > 1)  # neither 0 nor 255
        yield case[y, x].astype(np.intp), y, x


def _squares(plane: Mask) -> npt.NDArray[np.uint8]:
    """What each square of four voxels of a plane adds to the case of a cube that stands on it."""
    voxels = plane.view(np.uint8)
    rows, columns = voxels.shape[0] - 1, voxels.shape[1] - 1
    square = np.zeros((rows, columns), np.uint8)
    for bit, (_, dy, dx) in enumerate(CORNERS[:4]):
        square |= voxels[dy : dy + rows, dx : dx + columns] << bit
    return square


# -- diameters -----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Ends:
    """First and last voxel of a region on each line along an axis; 0 where a line has none.

    Args:
        first: index of the first, by the other two axes in their order. The region does not
            touch the array's border, so that 0 is no voxel's.
        last: index of the last.
    """

    first: Indices
    last: Indices

    @property
    def turned(self) -> _Ends:
        """With the other two axes exchanged."""
        return _Ends(self.first.T, self.last.T)


def _ends(inside: Mask, axis: int) -> _Ends:
    lines = np.moveaxis(inside, axis, -1)
    first = lines.argmax(axis=-1)
    last = np.where(first > 0, lines.shape[-1] - 1 - lines[..., ::-1].argmax(axis=-1), 0)
    return _Ends(first, last)


def _corners(ends: list[_Ends]) -> Points:
    """Corners (z, y, x) of a region's surface, of those that lie between two others only some.

    A corner on a straight line with, or beyond, two others at the same distance on either side of
    it is between them or inside: none of it is an end of the largest distance.

    Args:
        ends: along z, y and x.
    """
    points = []
    for axis, one in enumerate(ends):
        found = one.first > 0
        for index, beyond, outward in ((one.first, -0.5, 1), (one.last, 0.5, -1)):
            kept = found.copy()
            for u, v in NEIGHBOURS:
                _drop_between(kept, found, index * outward, u, v)
            across = np.argwhere(kept).astype(float)
            points.append(np.insert(across, axis, index[kept] + beyond, axis=1))
    return np.concatenate(points)


def _drop_between(kept: Mask, found: Mask, height: Indices, u: int, v: int) -> None:
    """Leave out what is not below the middle of its neighbours at (u, v) and (-u, -v)."""
    rows, columns = (n - 2 * abs(step) for n, step in zip(kept.shape, (u, v), strict=True))
    if rows < 1 or columns < 1:
        return

    def at(array: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
        top, left = abs(u) + side * u, abs(v) + side * v
        return array[top : top + rows, left : left + columns]

    between = 2 * at(height, 0) >= at(height, 1) + at(height, -1)
    at(kept, 0)[between & at(found, 1) & at(found, -1)] = False


def _farthest(points: Points) -> float:
    """Largest distance of two points."""
    if len(points) > FEW:
        points = _at_ends(points)
    if len(points) > MANY:
        flat = "QJ" if points.shape[1] == 2 else None  # all may lie on one line
        points = points[ConvexHull(points, qhull_options=flat).vertices]
    parts = np.array_split(points, 1 + len(points) // PART)
    return max(float(cdist(part, points).max()) for part in parts)


def _at_ends(points: Points) -> Points:
    """Those that can be an end of the largest distance.

    It is at least as long as the distance of two points at the ends of some direction; what is
    nearer than that to every corner of the box around all is no end of it.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    least = 0.0
    for direction in _directions(points.shape[1]):
        along = points @ direction
        apart = points[along.argmax()] - points[along.argmin()]
        least = max(least, float(apart @ apart) * (1 - TINY))
    reach = np.maximum(points - low, high - points)
    kept: Points = points[(reach**2).sum(axis=1) >= least]
    return kept


@cache
def _directions(axes: int) -> Points:
    """(n, axes): along the edges and diagonals of a grid, in half of the space."""
    reach = 2 if axes == 2 else 1
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1.0)] * axes), axis=-1)
    grid = grid.reshape(-1, axes)
    return grid[len(grid) // 2 + 1 :]


def _widest(inside: Mask, ends: list[_Ends], axis: int, step: Points) -> float:
    """Largest distance of two corners of the surface that lie in one plane across an axis.

    They lie in planes through voxel centres, and half way between two of these, where a voxel in
    the region meets one outside. Planes in which none can be longer than the best are passed over.

    Args:
        inside: (z, y, x).
        ends: along z, y and x.
        axis: across the planes.
        step: (z, y, x) mm.
    """
    across = np.delete(step, axis)
    # By plane: the ends along its rows, and along its columns.
    along_rows = (ends[2], ends[2].turned, ends[1].turned)[axis]
    along_columns = (ends[1], ends[0], ends[0].turned)[axis]
    planes = np.moveaxis(inside, axis, 0)
    best = 0.0
    for most, k, on_faces in sorted(_bounds(along_rows, across), reverse=True):
        if most <= best:
            break
        if on_faces:
            points = _row_ends(planes[k] ^ planes[k + 1])
        else:
            points = _outline(along_rows, along_columns, k)
        if len(points):
            best = max(best, _farthest(points * across))
    return best


def _bounds(ends: _Ends, across: Points) -> Iterator[tuple[float, int, bool]]:
    """By plane, and by pair of planes beside each other, how long a distance in it is at most.

    It is the largest width in the directions that :data:`DIRECTIONS` holds, and at most 0.2 % more
    than the distance. Corners lie half a voxel beyond the voxels' centres along an axis; between
    two planes they lie above a voxel of either.

    Args:
        ends: along the rows of the planes: (planes, rows).
        across: mm from row to row, and from column to column.

    Returns:
        The bound, the plane, or the first of the pair, and whether it is one of a pair.
    """
    hit = ends.first > 0
    rows = np.arange(hit.shape[1]) * across[0]
    first, last = ends.first * across[1], ends.last * across[1]
    widest, between = np.zeros(len(hit)), np.zeros(len(hit) - 1)
    for angle in DIRECTIONS:
        down, along = math.cos(angle), math.sin(angle)
        high = np.where(hit, rows * down + last * along, -np.inf).max(axis=1)
        low = np.where(hit, rows * down + first * along, np.inf).min(axis=1)
        beyond = max(abs(down) * across[0], along * across[1])
        np.maximum(widest, high - low + beyond, out=widest)
        both = np.maximum(high[1:], high[:-1]) - np.minimum(low[1:], low[:-1])
        np.maximum(between, both, out=between)
    loose = (1 + TINY) / math.cos(float(DIRECTIONS[1]) / 2)
    filled = np.any(hit, axis=1)
    for k in np.flatnonzero(filled):
        yield float(widest[k]) * loose, int(k), False
    for k in np.flatnonzero(np.logical_or(filled[1:], filled[:-1])):
        yield float(between[k]) * loose, int(k), True


def _outline(along_rows: _Ends, along_columns: _Ends, k: int) -> Points:
    """First and last corner (row, column) of the surface on each row and column of a plane."""
    points = []
    for axis, one in ((1, along_rows), (0, along_columns)):
        at = np.flatnonzero(one.first[k])
        for index, beyond in ((one.first, -0.5), (one.last, 0.5)):
            pair = np.empty((len(at), 2))
            pair[:, axis], pair[:, 1 - axis] = index[k][at] + beyond, at
            points.append(pair)
    return np.concatenate(points)


def _row_ends(mask: Mask) -> Points:
    """First and last pixel (row, column) of each row that has any."""
    rows = np.flatnonzero(mask.any(axis=1))
    first = mask[rows].argmax(axis=1)
    last = mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)
    return np.concatenate([np.stack([rows, ends], axis=1) for ends in (first, last)]).astype(float)


# -- values --------------------------------------------------------------------------------------
def _counted(parts: Iterable[npt.NDArray[np.generic]]) -> tuple[Points, Counts]:
    """Distinct values of all parts, ascending, and how often each occurs."""
    table: Counts | None = None
    others = []
    for part in parts:
        if part.dtype != np.int16:
            others.append(part)
            continue
        if table is None:  # of all there can be, which needs no sorting
            table = np.zeros(65536, np.int64)
        for some in np.array_split(part, max(1, part.size >> 20)):
            table += np.bincount(some.view(np.uint16) ^ 0x8000, minlength=65536)
    if table is not None:
        (bins,) = np.nonzero(table)
        return bins.astype(np.float64) - 32768, table[bins]
    found, counts = np.unique(np.concatenate(others), return_counts=True)
    return found.astype(np.float64), counts


def _percentile(found: Points, counts: Counts, share: float) -> float:
    """By linear interpolation between the two values around it."""
    until = np.cumsum(counts)
    at = share * (int(until[-1]) - 1)
    below, above = np.searchsorted(until, [math.floor(at), math.ceil(at)], side="right")
    return float(found[below] + (at - math.floor(at)) * (found[above] - found[below]))


def _bins(found: Points, counts: Counts) -> Points:
    """Voxels in each bin of the histogram that has any."""
    _, which = np.unique(np.floor(found / BIN_WIDTH), return_inverse=True)
    return np.bincount(which, counts).astype(np.float64)
