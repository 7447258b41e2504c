"""Where the slices of a series really lie, and what is odd about it.

Only Image Position (Patient), Image Orientation (Patient) and Pixel Spacing are trusted
(PS3.3 C.7.6.2.1.1): never file names, Instance Number, Slice Location, Spacing Between Slices or
Slice Thickness, and never Gantry/Detector Tilt, which the standard says is "not intended for
mathematical computations" (C.8.2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.header import Frame
from plinth.verticals.medical.volumes.volume import Affine, Issue

Vector = npt.NDArray[np.float64]

SAME_PLACE_MM = 0.005
"""Positions closer than this are the same position."""

DRIFT_MM = 0.1
"""In-plane drift over the whole stack below which slices count as stacked straight."""

STEP_MM, STEP_SHARE = 0.01, 0.01
"""A step may differ from the mean by the larger of these (mm, share of the mean)."""


@dataclass(frozen=True)
class Stack:
    """Slices in ascending order along their common normal.

    Args:
        frames: one per position.
        repeats: (slice, frame) pairs that lie at a position already taken.
        axes: (3, 3) columns: unit row direction, column direction and normal, LPS.
        pixel: (x, y) mm between columns and between rows.
        positions: (n, 3) LPS mm of the centres of the first voxels.
        issues: what is odd, with mm.
        straight: no in-plane drift: the slices are stacked along the normal.
        even: all steps are equal.
        gaps: (slice before, slices missing) pairs.
    """

    frames: tuple[Frame, ...]
    repeats: tuple[tuple[int, Frame], ...]
    axes: Vector
    pixel: tuple[float, float]
    positions: Vector
    issues: tuple[Issue, ...]
    straight: bool
    even: bool
    gaps: tuple[tuple[int, int], ...]

    @property
    def regular(self) -> bool:
        """An affine describes the slices exactly: nothing to resample."""
        return self.straight and self.even

    @property
    def depths(self) -> Vector:
        """(n,) mm along the normal, the first slice at 0."""
        depths: Vector = (self.positions - self.positions[0]) @ self.axes[:, 2]
        return depths

    @property
    def drifts(self) -> Vector:
        """(n, 2) mm in-plane (row direction, column direction), the first slice at 0."""
        drifts: Vector = (self.positions - self.positions[0]) @ self.axes[:, :2]
        return drifts

    @property
    def step(self) -> float:
        """Mean step in mm along the normal; thickness, or 1 mm, for a single slice."""
        count = len(self.frames)
        if count > 1:
            return float(self.depths[-1]) / (count - 1)
        return self.frames[0].thickness or 1.0

    def affine(self) -> Affine:
        """(4, 4) voxel index (i, j, k) to LPS mm, for a regular stack.

        The third column is (last - first) / (n - 1) of the positions themselves.
        """
        matrix = np.eye(4)
        matrix[:3, 0] = self.axes[:, 0] * self.pixel[0]
        matrix[:3, 1] = self.axes[:, 1] * self.pixel[1]
        count = len(self.frames)
        if count > 1:
            matrix[:3, 2] = (self.positions[-1] - self.positions[0]) / (count - 1)
        else:
            matrix[:3, 2] = self.axes[:, 2] * self.step
        matrix[:3, 3] = self.positions[0]
        return matrix


def orientation_axes(frame: Frame) -> Vector:
    """(3, 3) columns: orthonormal row direction, column direction and normal.

    Raises:
        InputError: when Image Orientation (Patient) is not two orthogonal unit vectors.
    """
    assert frame.orientation is not None
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 1e-2 or abs(lengths[1] - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise InputError(
            f"{frame.header.source.name}: Image Orientation (Patient) is not two orthogonal unit "
            f"vectors (lengths {lengths[0]:.4f} and {lengths[1]:.4f}, product {row @ column:.4f})",
            field="ImageOrientationPatient",
            hint="ask the sender for the original images",
            reason="bad_orientation",
        )
    row = row / lengths[0]
    column = column - row * (row @ column)
    column = column / np.linalg.norm(column)
    return np.column_stack([row, column, np.cross(row, column)])


def stack(frames: Sequence[Frame]) -> Stack:
    """Sort frames of one orientation along their normal and judge the result.

    Args:
        frames: all placed, of one orientation, size and pixel spacing; in any order.

    Raises:
        InputError: bad orientation or spacing, or different images at one depth.
    """
    first = min(frames, key=lambda frame: frame.key)
    axes = orientation_axes(first)
    pixel = _pixel(first)
    places = np.array([frame.position for frame in frames])
    keys = [
        (float(depth), frame.key) for depth, frame in zip(places @ axes[:, 2], frames, strict=True)
    ]
    order = sorted(range(len(frames)), key=lambda n: keys[n])
    kept, repeats = _unique([frames[n] for n in order], places[order], axes)
    positions = np.array([frame.position for frame in kept])
    return _judge(kept, repeats, axes, pixel, positions)


def _pixel(frame: Frame) -> tuple[float, float]:
    assert frame.spacing is not None
    rows, columns = frame.spacing
    if not (0 < rows < 1e3 and 0 < columns < 1e3):
        raise InputError(
            f"{frame.header.source.name}: Pixel Spacing is {rows} and {columns}, not mm above 0",
            field="PixelSpacing",
            hint="ask the sender for the original images",
            reason="bad_spacing",
        )
    return columns, rows


def _unique(
    frames: list[Frame], places: Vector, axes: Vector
) -> tuple[list[Frame], list[tuple[int, Frame]]]:
    """Split sorted frames into one per position and the repeats of a position."""
    kept: list[int] = []
    repeats = []
    for n, frame in enumerate(frames):
        if not kept:
            kept.append(n)
            continue
        offset = places[n] - places[kept[-1]]
        if np.linalg.norm(offset) < SAME_PLACE_MM:
            repeats.append((len(kept) - 1, frame))
        elif offset @ axes[:, 2] < SAME_PLACE_MM:
            away = float(np.linalg.norm(offset))
            raise InputError(
                f"{frames[kept[-1]].header.source.name} and {frame.header.source.name} lie at one "
                f"depth but {away:.2f} mm apart in their plane",
                field="ImagePositionPatient",
                hint="they are not one stack of slices; load them as separate series",
                reason="same_depth",
            )
        else:
            kept.append(n)
    return [frames[n] for n in kept], repeats


def _judge(
    frames: list[Frame],
    repeats: list[tuple[int, Frame]],
    axes: Vector,
    pixel: tuple[float, float],
    positions: Vector,
) -> Stack:
    issues = []
    if repeats:
        slices = tuple(sorted({k for k, _ in repeats}))
        issues.append(Issue("duplicate", f"{len(repeats)} images repeat a position", None, slices))
    straight, even = True, True
    gaps: tuple[tuple[int, int], ...] = ()
    if len(frames) == 1:
        issues.append(Issue("single_slice", _single(frames[0]), frames[0].thickness))
    else:
        relative = positions - positions[0]
        lean = _lean(relative @ axes[:, :2], relative @ axes[:, 2])
        straight = lean is None
        found, gaps = _steps(relative @ axes[:, 2])
        even = not found
        issues += ([lean] if lean else []) + found
    return Stack(
        tuple(frames), tuple(repeats), axes, pixel, positions, tuple(issues), straight, even, gaps
    )


def _single(frame: Frame) -> str:
    thickness = frame.thickness
    if thickness is None:
        return "one slice only, without Slice Thickness: 1 mm is assumed"
    return f"one slice only: its thickness of {thickness:g} mm stands for the spacing"


def _lean(drifts: Vector, depths: Vector) -> Issue | None:
    """The in-plane drift of the stack, if it matters."""
    largest = float(np.linalg.norm(drifts, axis=1).max())
    if largest <= DRIFT_MM:
        return None
    slope = drifts[-1] / depths[-1]
    residual = float(np.linalg.norm(drifts - depths[:, None] * slope, axis=1).max())
    total = float(np.linalg.norm(drifts[-1]))
    angle = math.degrees(math.atan2(total, float(depths[-1])))
    if residual > DRIFT_MM:
        text = f"slices are displaced in their plane, by up to {largest:.2f} mm, not along a line"
        return Issue("tilt", text, largest)
    text = (
        f"the stack leans {angle:.2f} degrees from the slices' normal (gantry tilt): "
        f"the last slice lies {total:.2f} mm off the first one's axis"
    )
    return Issue("tilt", text, total)


def _steps(depths: Vector) -> tuple[list[Issue], tuple[tuple[int, int], ...]]:
    """Gaps, else uneven steps, of ascending depths."""
    steps = np.diff(depths)
    mean = float(steps.mean())
    off = float(np.abs(steps - mean).max())
    ideal = np.arange(len(depths)) * mean
    astray = float(np.abs(depths - ideal).max())
    if off <= max(STEP_MM, STEP_SHARE * mean) and astray <= max(DRIFT_MM, 0.05 * mean):
        return [], ()
    gaps = _gaps(steps)
    issues = []
    for k, missing in gaps:
        text = (
            f"{missing} slice{'s' * (missing > 1)} missing between slices {k} and {k + 1}: "
            f"{steps[k]:.3f} mm where {np.median(steps):.3f} mm is usual"
        )
        issues.append(Issue("gap", text, float(steps[k]), (k, k + 1)))
    rest = np.delete(steps, [k for k, _ in gaps])
    spread = float(np.abs(rest - rest.mean()).max())
    if not gaps or spread > max(STEP_MM, STEP_SHARE * float(rest.mean())):
        text = f"steps between slices vary from {rest.min():.3f} to {rest.max():.3f} mm"
        issues.append(Issue("spacing", text, float(np.ptp(rest))))
    return issues, gaps


def _gaps(steps: Vector) -> tuple[tuple[int, int], ...]:
    """Steps that stand out from both neighbouring runs of equal steps.

    One or two steps, at least 1.5 times the steps on either side, are missing slices; longer
    runs are another spacing, and a usual step beside a lone shorter one is as it should be.
    Returns (slice before, slices missing) pairs.
    """
    usual = float(np.median(steps))
    runs: list[tuple[int, int]] = []
    for k, step in enumerate(steps):
        if runs and abs(step - steps[runs[-1][0]]) <= max(STEP_MM, 0.02 * step):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((k, 1))
    found = []
    for n, (start, count) in enumerate(runs):
        sides = [
            (float(steps[runs[m][0]]), runs[m][1]) for m in (n - 1, n + 1) if 0 <= m < len(runs)
        ]
        beside, times = max(sides, default=(usual, 1))
        if not sides or count > len(sides) or steps[start] < 1.5 * beside:
            continue
        if times == 1 and steps[start] < 1.5 * usual:
            continue
        for k in range(start, start + count):
            found.append((k, max(1, round(float(steps[k]) / beside) - 1)))
    return tuple(found)


def even_step(stack: Stack) -> float:
    """The step in mm for evenly spaced slices: the finest one that is common in the stack."""
    steps = np.diff(stack.depths)
    if not len(steps) or stack.even:
        return stack.step
    typical = float(np.median(steps))
    if stack.gaps:
        return float(np.median(np.delete(steps, [k for k, _ in stack.gaps])))
    common = [
        float(step)
        for step in steps
        if (np.abs(steps - step) <= max(STEP_MM, 0.02 * float(step))).sum() >= 3
    ]
    return min([typical, *common])
