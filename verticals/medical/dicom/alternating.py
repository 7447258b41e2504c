"""Slices unlike their neighbours: two reconstructions in turn, or a slice that is not of the stack.

No header tells of these. In a stack of one reconstruction a slice is as noisy as its neighbours,
and more like each of them than they are like one another. Where every second slice is of another
kernel, dose or time, or a slice is of another patient or rescale, that is not so.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from plinth.verticals.medical.volumes.volume import Array

LEAST = 8
"""Slices below which nothing is said."""

STEADY = 0.9
"""Share of the slices that must differ from both neighbours in the same sense."""

NOISE, LEVEL = 0.12, 5.0
"""Least log ratio of the noise of odd and even slices, and difference of their soft tissue in HU.
In real series of one reconstruction the middle is below 0.01, single slices below 0.07."""

LIKENESS, DIP = 0.9, 0.55
"""How much a slice's neighbours differ over how much it differs from them. Contents alternate where
nearly all slices lie below the first; a single one below it, and below this share of what its
neighbours have, is not of the stack. Real series lie at 1 or above."""

TISSUE = (-200, 300)
"""HU between which the level of a slice is taken."""

SAMPLES, ENOUGH = 1 << 14, 64
"""Pixels of a slice that are looked at, about; and of soft tissue in one place, at least."""

Numbers = npt.NDArray[np.float64]
Rows = list[Array]


def unlike_neighbours(voxels: Array, *, hounsfield: bool) -> tuple[str | None, tuple[int, ...]]:
    """How odd and even slices differ, and which single slices are unlike both neighbours.

    Args:
        voxels: (z, y, x) as decoded, in the order along the normal.
        hounsfield: the values are HU.

    Returns:
        A clause, ``None`` where odd and even slices are of one kind; and the slices. Nothing is
        found in fewer than 8 slices.
    """
    if len(voxels) < LEAST:
        return None, ()
    step = max(1, voxels[0].size // SAMPLES)
    rows = [plane[::step] for plane in voxels]
    likeness = _likeness(rows)
    if (likeness < LIKENESS).mean() >= STEADY:
        times = 1 / max(float(np.median(likeness)), 0.01)
        told = f"a slice is {times:.2f} times less like the next one than like the one after it"
        return told, ()
    beside = np.sqrt(likeness[:-2] * likeness[2:])
    dips = (likeness[1:-1] < LIKENESS) & (likeness[1:-1] < DIP * beside)
    return _differ(rows, hounsfield), tuple(int(k) + 2 for k in np.flatnonzero(dips))


def _differ(rows: Rows, hounsfield: bool) -> str | None:
    """How odd and even slices differ in noise or level."""
    noise = _noise(rows)
    if noise is not None:
        told = np.log(noise)
        ratio = abs(_in_turn(told[1:-1] - (told[:-2] + told[2:]) / 2))
        if ratio >= NOISE:
            return f"their noise differs by a factor of {np.exp(ratio):.2f}"
    level = _level(rows) if hounsfield else None
    apart = 0.0 if level is None else abs(_in_turn(level))
    return f"their soft tissue differs by {apart:.0f} HU" if apart >= LEVEL else None


def _noise(rows: Rows) -> Numbers | None:
    """Mean second difference along the rows, without edges; ``None`` where a slice has none."""
    some = np.concatenate([_bends(plane) for plane in rows[:: max(1, len(rows) // 8)]])
    most = 5 * float(np.median(some)) if some.size else 0.0
    found = []
    for plane in rows:
        bends = _bends(plane)
        small = bends[bends < most]
        if not small.size:
            return None
        found.append(float(small.mean()))
    return np.array(found)


def _bends(plane: Array) -> npt.NDArray[np.float32]:
    """Second differences along the rows, without sign, those that are not 0."""
    bends: npt.NDArray[np.float32] = np.abs(np.diff(plane.astype(np.float32), 2, axis=1))
    return bends[bends > 0]


def _level(rows: Rows) -> Numbers | None:
    """How far soft tissue of each slice but the ends lies above the mean of both neighbours.

    The median over the places that are soft tissue in all three: what a slice holds besides does
    not count, which changes from one to the next where they lie far apart. ``None`` where three
    slices share no soft tissue.
    """
    low, high = TISSUE
    soft = [(plane > low) & (plane < high) for plane in rows]
    found = []
    for n in range(1, len(rows) - 1):
        shared = soft[n - 1] & soft[n] & soft[n + 1]
        if np.count_nonzero(shared) < ENOUGH:
            return None
        before, here, after = (rows[k][shared].astype(np.float32) for k in (n - 1, n, n + 1))
        found.append(float(np.median(here - (before + after) / 2)))
    return np.array(found)


def _in_turn(bends: Numbers) -> float:
    """How far odd slices lie from even ones, if nearly all do so in the same sense; else 0.

    Args:
        bends: of each slice but the ends, what it has above the mean of its neighbours.
    """
    signed = bends.copy()
    signed[1::2] *= -1
    middle = float(np.median(signed))
    same = float((np.sign(signed) == np.sign(middle)).mean())
    return middle if same >= STEADY else 0.0


def _likeness(rows: Rows) -> Numbers:
    """Of each slice but the first and last: see ``LIKENESS``; 1 where nothing differs."""
    near = np.array([_apart(one, other) for one, other in pairwise(rows)])
    far = np.array([_apart(one, other) for one, other in zip(rows, rows[2:], strict=False)])
    nearer = np.minimum(near[:-1], near[1:])
    return np.where(nearer > 0, far / np.where(nearer > 0, nearer, 1), 1.0)


def _apart(one: Array, other: Array) -> float:
    return float(np.abs(one.astype(np.float32) - other).mean(dtype=np.float64))
