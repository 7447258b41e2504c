"""Chest phantoms as volumes, and ways to look at what was measured in them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from plinth.verticals.medical.ct.analysis import Analysis
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.vertical import phantom_volume
from plinth.verticals.medical.volumes.volume import Volume

SMALL = {"shape": (120, 96, 72), "spacing": (3.0, 3.0, 3.0)}


def chest(**changes: Any) -> Volume:
    """The chest phantom, small enough for a test, as a volume."""
    return phantom_volume(Phantom(**{**SMALL, **changes}))


def values(analysis: Analysis) -> dict[str, float | None]:
    """What was measured, by key."""
    return {finding.key: finding.value for finding in analysis.findings}


def refilled(volume: Volume, where: np.ndarray, hu: float) -> Volume:
    """The volume with other HU at some voxels (z, y, x)."""
    voxels = volume.voxels.copy()
    voxels[where] = hu
    return replace(volume, voxels=voxels)


def turned(volume: Volume, axes: tuple[int, ...], flips: tuple[bool, ...]) -> Volume:
    """The same patient, read out along other array axes: transposed, then flipped.

    Args:
        volume: to turn.
        axes: of (z, y, x), in their new order.
        flips: of the new axes.
    """
    voxels = volume.voxels.transpose(axes)
    columns = volume.affine[:3, [2, 1, 0]][:, axes]
    origin = volume.affine[:3, 3].copy()
    for axis, flip in enumerate(flips):
        if flip:
            origin += columns[:, axis] * (voxels.shape[axis] - 1)
            columns[:, axis] *= -1
            voxels = np.flip(voxels, axis)
    affine = np.eye(4)
    affine[:3, :3] = columns[:, ::-1]
    affine[:3, 3] = origin
    return replace(volume, voxels=np.ascontiguousarray(voxels), affine=affine)
