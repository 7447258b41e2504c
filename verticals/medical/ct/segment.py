"""Body, airway, lungs and bone by HU thresholds and connected components.

Deterministic and without a network. Which structure a voxel may belong to is decided on a
coarse isotropic grid; which voxels belong to it is decided by thresholds on the native grid
(:mod:`plinth.verticals.medical.ct.analysis`), so that volumes keep the native resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from plinth.engine.mapped import trim
from plinth.engine.parallel import spread
from plinth.verticals.medical.ct.airway import airway, labels_in_plane, voxels_of
from plinth.verticals.medical.ct.missing import opaque_ml
from plinth.verticals.medical.volumes.components import components
from plinth.verticals.medical.volumes.distance import box_of, closed, deep, dilated, eroded, near
from plinth.verticals.medical.volumes.orientation import Orientation
from plinth.verticals.medical.volumes.resample import Grid, fit_spacing, resample
from plinth.verticals.medical.volumes.volume import Volume

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]

COARSE_MM = 2.0
TISSUE_HU, LUNG_HU, BONE_HU = -500, -400, 226
COARSE_BONE_HU = 200
COARSE_LUNG_HU, LUNG_EDGE_HU = -180, -350
"""Lung is below the first on the coarse grid, and below the second at its native edge: lung that is
dense in its dependent part belongs to it, though only what is below ``LUNG_HU`` is air-filled."""

TOUCH_MM2 = 100.0
OPENING_MM, CLOSING_MM = 4.0, 12.0
MIN_BODY, MIN_LUNG_ML, MIN_BONE_ML, MIN_OPENED_ML = 0.2, 100.0, 0.5, 20.0
GAS_HU, FIRM_HU = -960.0, -500.0
"""Mean density of a lung's core: gas in bowel or stomach is below, stool and fat above."""

MIN_SHARE, MIN_RADIUS_MM, NEAR_AIRWAY_MM = 0.15, 25.0, 20.0
"""Lungs fill this share of the body in some axial plane. Each is seen from the top of the field of
view, lies near the airway, or holds a ball of this radius; bowel does none of these."""

CUT_MM = 6.0
"""Lung-like air outside the body this near to a lung: the field of view cuts the lung."""


INSIDE, BODY, RIGHT, LEFT, RIGHT_CORE, LEFT_CORE, AIRWAY, BONE = (1 << n for n in range(8))
"""Bits of :attr:`Regions.bits`: where a structure may be; ``INSIDE`` and ``*_CORE`` where it is."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Where structures may be, on the coarse grid.

    Args:
        grid: the coarse grid over the native one.
        bits: (z, y, x) uint8 on the coarse grid, axes as the native array's.
        touching: borders of the field of view that the lungs reach: ``"superior"``,
            ``"inferior"``, ``"sides"``.
        split: how the lungs were told apart: ``"components"``, ``"erosion"``, ``"midline"``
            or ``"none"``.
        opaque: (right, left) mL between a lung and its ribs that ought to be lung, at least.
    """

    grid: Grid
    bits: Bits
    touching: tuple[str, ...]
    split: str
    opaque: tuple[float, float]


def regions(volume: Volume, orientation: Orientation) -> Regions:
    """Find the regions of a CT volume.

    Args:
        volume: HU.
        orientation: of its array.
    """
    x, y, z = volume.spacing
    grid = fit_spacing(volume.shape, (z, y, x), (COARSE_MM,) * 3)
    hu = cast(Float, orientation.to_patient(resample(volume.voxels, grid, "area").numpy()))
    tissue, body = _body(hu)

    def lungs_and_airway() -> tuple[Bits, tuple[Bool, Bool], str]:
        bits = np.zeros(hu.shape, np.uint8)
        tubes = airway((hu < LUNG_HU) & body, COARSE_MM)
        wide = dilated(tubes)
        _put(bits, wide, AIRWAY)
        sides, split = _lungs(hu, (hu < COARSE_LUNG_HU) & body & ~wide, body, tubes)
        airy = hu < LUNG_HU
        for side, may, core in ((sides[0], RIGHT, RIGHT_CORE), (sides[1], LEFT, LEFT_CORE)):
            if side.any():
                _mark(bits, side, airy, body, (may, core))
        _part(bits, *sides)
        return bits, sides, split

    def around_them() -> tuple[Bits, float]:
        bits = np.zeros(hu.shape, np.uint8)
        _put(bits, eroded(body), INSIDE)
        _put(bits, dilated(body | tissue), BODY)
        _put(bits, dilated(_bone(hu, body)), BONE)
        return bits, _opened_ml(_lung_like(hu, body), tissue)

    steps: tuple[Callable[[], Any], ...] = (lungs_and_airway, around_them)
    (bits, sides, split), (around, opened) = spread(lambda step: step(), steps)
    trim()  # of what two threads held and let go
    bits |= around
    native = np.ascontiguousarray(orientation.from_patient(bits))
    opaque = tuple(
        opaque_ml((bits & core) > 0, (bits & BONE) > 0, COARSE_MM, right=core == RIGHT_CORE)
        for core in (RIGHT_CORE, LEFT_CORE)
    )
    touching = _touching(sides[0] | sides[1], _lung_like(hu, body), opened)
    return Regions(grid, native, touching, split, (opaque[0], opaque[1]))


def _put(bits: Bits, mask: Bool, bit: int) -> None:
    """Set a bit where a mask is."""
    bits |= mask.view(np.uint8) * np.uint8(bit)


def _ball(radius_mm: float, spacing: float = COARSE_MM) -> float:
    return radius_mm / spacing


def _body(hu: Float) -> tuple[Bool, Bool]:
    """Tissue of the body without couch and clothes, and the body with its air-filled holes.

    Opening by OPENING_MM parts the body from the couch; in each axial plane, air that does
    not reach the edge of the image is inside.
    """
    dense = hu > TISSUE_HU
    if not dense.any():
        return dense, dense
    core = deep(dense, _ball(OPENING_MM))
    labels, count = components(core)
    if count == 0:
        return np.zeros_like(dense), np.zeros_like(dense)
    sizes = voxels_of(labels, count)
    sizes[0] = 0
    keep = sizes >= MIN_BODY * sizes.max()
    kept: Bool = keep[labels]
    tissue = dense & near(kept, _ball(OPENING_MM) + 1)
    return tissue, tissue | _holes(tissue)


def _holes(tissue: Bool) -> Bool:
    labels, count = labels_in_plane(~tissue)
    outside = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outside[np.unique(edge)] = True
    outside[0] = True
    return cast(Bool, ~outside[labels])


def _bone(hu: Float, body: Bool) -> Bool:
    labels, count = components((hu > COARSE_BONE_HU) & body, np.ones((3, 3, 3)))
    sizes = voxels_of(labels, count) * COARSE_MM**3 / 1000
    sizes[0] = 0
    return (sizes >= MIN_BONE_ML)[labels]


# -- lungs -----------------------------------------------------------------------------------
def _lungs(hu: Float, air: Bool, body: Bool, tubes: Bool) -> tuple[tuple[Bool, Bool], str]:
    """Air-filled right and left lung, and how they were told apart; never other air."""
    none = np.zeros_like(air)
    labels, count = components(air)
    if count == 0:
        return (none, none), "none"
    sizes = voxels_of(labels, count) * COARSE_MM**3 / 1000
    sizes[0] = 0
    middle = _middle(body)
    large = np.flatnonzero(sizes >= MIN_LUNG_ML)
    parts = [part for part in (labels == label for label in large) if _is_lung(hu, part, tubes)]
    del labels  # before lungs are parted, which takes as much again
    if not parts or not _fills_the_chest(reduce(np.logical_or, parts), body):
        return (none, none), "none"
    right, left, split = none.copy(), none.copy(), "components"
    for part in parts:
        columns = part.sum(axis=(0, 1))
        across = float(columns[: int(middle)].sum() / columns.sum())
        if 0.15 < across < 0.85:
            (one, other), split = _parted(part, middle)
            right |= one
            left |= other
        elif across >= 0.5:
            right |= part
        else:
            left |= part
    return (right, left), split


def _is_lung(hu: Float, part: Bool, tubes: Bool) -> bool:
    """Density, and place or size, of one component of air inside the body."""
    box = box_of(part, 1)
    core = deep(part[box], 2)
    mean = float(hu[box][core].mean()) if core.any() else float(hu[part].mean())
    if not GAS_HU < mean < FIRM_HU:
        return False
    if part[-1].sum() * COARSE_MM**2 > TOUCH_MM2 or deep(part[box], _ball(MIN_RADIUS_MM)).any():
        return True
    return bool((near(tubes, _ball(NEAR_AIRWAY_MM)) & part).any())


def _fills_the_chest(lungs: Bool, body: Bool) -> bool:
    """In some axial plane the lungs are a good share of the body."""
    filled, area = (np.array([np.count_nonzero(plane) for plane in mask]) for mask in (lungs, body))
    return float((filled / np.maximum(area, 1)).max()) >= MIN_SHARE


def _middle(body: Bool) -> float:
    """Column of the body's centre; columns ascend towards patient left."""
    columns = body.sum(axis=(0, 1))
    return float((columns * np.arange(columns.size)).sum() / max(1, columns.sum()))


def _parted(lungs: Bool, middle: float) -> tuple[tuple[Bool, Bool], str]:
    """One component as two lungs: eroded until it parts, each voxel to the nearer piece."""
    box = box_of(lungs)
    inside = lungs[box]
    for radius in (1.0, 2.0, 3.0, 4.0, 6.0):
        labels, count = components(deep(inside, radius))
        if count < 2:
            continue
        sizes = voxels_of(labels, count)[1:]
        first, second = (int(n) + 1 for n in np.argsort(sizes)[::-1][:2])
        if sizes[second - 1] < 0.2 * sizes[first - 1]:
            continue
        right, left = sorted((first, second), key=lambda n: np.nonzero(labels == n)[2].mean())
        seeds = np.where((labels == right) | (labels == left), labels, 0)
        nearest = ndimage.distance_transform_edt(
            seeds == 0, return_distances=False, return_indices=True
        )
        owner = np.zeros(lungs.shape, labels.dtype)
        owner[box] = seeds[tuple(nearest)]
        return (lungs & (owner == right), lungs & (owner == left)), "erosion"
    columns = np.arange(lungs.shape[2]) < middle
    return (lungs & columns, lungs & ~columns), "midline"


def _mark(bits: Bits, lung: Bool, airy: Bool, body: Bool, names: tuple[int, int]) -> None:
    """Close a lung over vessels and nodules; mark where its edge may be and where it is.

    It is where the closed lung is more than a voxel deep, where closing added to it, and where
    it is dense for more than the one voxel that the pleura blurs.
    """
    may, core = names
    box = box_of(lung, int(CLOSING_MM / COARSE_MM) + 3)
    part, inside, here = lung[box], body[box], bits[box]
    whole = closed(part, _ball(CLOSING_MM)) & inside & ((here & AIRWAY) == 0) | part
    labels, count = components(~whole)
    outside = np.zeros(count + 1, bool)
    for axis in range(3):
        for edge in (0, -1):
            outside[np.unique(labels.take(edge, axis))] = True
    whole |= ~outside[labels]
    dense = (whole & ~part) | (part & ~dilated(airy[box] & part))
    _put(here, eroded(whole) | dense, core)
    _put(here, dilated(whole), may)


def _part(bits: Bits, right: Bool, left: Bool) -> None:
    """Where both lungs may be, the one whose air is nearer is."""
    both = ((bits & RIGHT) > 0) & ((bits & LEFT) > 0)
    if not both.any():
        return
    box = box_of(both, 6)
    nearer = ndimage.distance_transform_edt(~right[box]) <= ndimage.distance_transform_edt(
        ~left[box]
    )
    here, doubt = bits[box], both[box]
    here[doubt & nearer] &= 255 - LEFT - LEFT_CORE
    here[doubt & ~nearer] &= 255 - RIGHT - RIGHT_CORE


def _lung_like(hu: Float, body: Bool) -> Bool:
    """Air as dense as lung outside of the body."""
    return (hu > GAS_HU) & (hu < FIRM_HU) & ~body


def _opened_ml(lung_like: Bool, tissue: Bool) -> float:
    """The largest part of such air that lies amid tissue."""
    amid, count = components(eroded(lung_like) & (_between(tissue, 1) | _between(tissue, 2)))
    return float(voxels_of(amid, count)[1:].max(initial=0) * COARSE_MM**3 / 1000)


def _touching(lungs: Bool, lung_like: Bool, opened: float) -> tuple[str, ...]:
    """Borders of the field of view that the lungs reach; a few stray voxels do not count.

    Where the border, straight or round, opens a lung in an axial plane, that plane's lung is not
    inside the body any more: it is found as lung-like air beside the lungs, or amid tissue.

    Args:
        lungs: both.
        lung_like: of :func:`_lung_like`.
        opened: mL of it amid tissue.
    """
    least = TOUCH_MM2 / COARSE_MM**2
    found = []
    if lungs[-1].sum() > least:
        found.append("superior")
    if lungs[0].sum() > least:
        found.append("inferior")
    sides = (lungs[:, 0], lungs[:, -1], lungs[:, :, 0], lungs[:, :, -1])
    aside = lungs
    for _ in range(round(CUT_MM / COARSE_MM)):
        aside = dilated(aside)
    beside = lung_like & aside
    if max(float(one.sum()) for one in (*sides, beside)) > least or opened > MIN_OPENED_ML:
        found.append("sides")
    return tuple(found)


def _between(tissue: Bool, axis: int) -> Bool:
    """Voxels with tissue before and behind them along an axis; a mattress has none behind."""
    before = np.logical_or.accumulate(tissue, axis)
    return before & np.flip(np.logical_or.accumulate(np.flip(tissue, axis), axis), axis)
