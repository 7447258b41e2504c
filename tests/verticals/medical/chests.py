"""Chest phantoms as volumes and as DICOM, and ways to look at what was measured in them."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from plinth.verticals.medical.ct.analysis import Analysis
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import Compression, Faults, write_series
from plinth.verticals.medical.vertical import phantom_volume
from plinth.verticals.medical.volumes.volume import Volume

SMALL = {"shape": (120, 96, 72), "spacing": (3.0, 3.0, 3.0)}


def chest(**changes: Any) -> Volume:
    """The chest phantom, small enough for a test, as a volume; the last ones are kept."""
    return _volume(Phantom(**{**SMALL, **changes}))


@lru_cache(8)
def _volume(phantom: Phantom) -> Volume:
    return phantom_volume(phantom)


def dicom_of(
    phantom: Phantom,
    folder: Path,
    compression: Compression = "none",
    faults: Faults | None = None,
    series: int = 1,
) -> Path:
    """A phantom as DICOM in ``folder``: written once, copied for every test that wants it."""
    shutil.copytree(_kept(phantom, compression, faults, series), folder, dirs_exist_ok=True)
    return folder


@cache
def _kept(phantom: Phantom, compression: Compression, faults: Faults | None, series: int) -> Path:
    write_series(
        phantom,
        folder := Path(_root().name) / str(_kept.cache_info().misses),
        compression=compression,
        faults=faults,
        series=series,
    )
    return folder


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="chests-", ignore_cleanup_errors=True)


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
