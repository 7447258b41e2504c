"""Put the slices of a leaning or unevenly spaced stack onto an orthogonal, even grid."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.geometry import Stack, even_step
from plinth.verticals.medical.volumes.volume import Affine, Array

MAX_GROWTH = 6.0
"""A regridded volume may have at most this many times the voxels of its source."""

Float = npt.NDArray[np.float32]


def regrid(voxels: Array, stack: Stack, max_bytes: int) -> tuple[Array, Affine, tuple[int, ...]]:
    """Trilinear values on an orthogonal grid at the slices' true places.

    The grid has the slices' directions and pixel spacing; it spans every slice in the plane
    and, along the normal, the first to the last slice in equal steps. Each slice is moved by
    its own in-plane drift, then neighbours along the normal are blended.

    Args:
        voxels: (n, y, x) int16 or float32, in the order of ``stack``.
        stack: the true places.
        max_bytes: what the result may take.

    Returns:
        Voxels (z, y, x) of the same dtype (int16 rounded to nearest), their (4, 4) affine to
        LPS mm, and the planes that lie in a gap, where slices are missing. Where no slice
        reaches, the lowest value of the source stands.

    Raises:
        InputError: when the result would be absurdly large.
    """
    depths, drifts = stack.depths, stack.drifts / np.array(stack.pixel)
    if stack.straight:
        drifts = np.zeros_like(drifts)
    low = drifts.min(axis=0)
    rows, columns = voxels.shape[1:]
    width, height = (
        size + math.ceil(float(extent) - 1e-3)
        for size, extent in zip((columns, rows), np.ptp(drifts, axis=0), strict=True)
    )
    count = max(2, round(float(depths[-1]) / even_step(stack)) + 1)
    _check_size((count, height, width), voxels, max_bytes)
    step = float(depths[-1]) / (count - 1)
    fill = float(voxels.min())
    out: Array = np.empty((count, height, width), dtype=voxels.dtype)
    placed: dict[int, Float] = {}
    gaps, filled = {before for before, _ in stack.gaps}, list[int]()
    for n in range(count):
        below, share = _bracket(depths, n * step)
        wanted = {below} if share == 0 else {below, below + 1}
        placed = {k: image for k, image in placed.items() if k in wanted}
        for k in wanted - placed.keys():
            placed[k] = _moved(voxels[k], drifts[k] - low, (height, width), fill)
        if share and below in gaps:
            filled.append(n)
        plane = placed[below]
        if share:
            plane = plane + np.float32(share) * (placed[below + 1] - plane)
        out[n] = np.rint(plane) if out.dtype == np.int16 else plane
    return out, _affine(stack, low, step), tuple(filled)


def _check_size(wanted: tuple[int, int, int], source: Array, max_bytes: int) -> None:
    count = math.prod(wanted)
    grown = count > MAX_GROWTH * source.size and count > 1 << 22
    if grown or count * source.dtype.itemsize > max_bytes:
        raise InputError(
            f"an orthogonal grid of {wanted} voxels would be needed for {source.shape}: the "
            "slices are scattered",
            field="ImagePositionPatient",
            hint="check that the images belong to one stack",
            reason="scattered",
        )


def _bracket(depths: npt.NDArray[np.float64], depth: float) -> tuple[int, float]:
    """The slice at or below ``depth`` and the share of the one above."""
    below = int(np.clip(np.searchsorted(depths, depth, side="right") - 1, 0, len(depths) - 1))
    if below == len(depths) - 1:
        return below, 0.0
    share = float((depth - depths[below]) / (depths[below + 1] - depths[below]))
    if share < 1e-6:
        return below, 0.0
    return (below + 1, 0.0) if share > 1 - 1e-6 else (below, share)


def _moved(
    image: Array, offset: npt.NDArray[np.float64], shape: tuple[int, int], fill: float
) -> Float:
    """The image on a larger canvas, moved by (x, y) pixels, bilinear."""
    canvas = np.full(shape, fill, dtype=np.float32)
    x, y = (max(0.0, float(value)) for value in np.round(offset, 4))
    column, row = int(x), int(y)
    moved = _slide(_slide(image.astype(np.float32), y - row, 0, fill), x - column, 1, fill)
    height, width = min(moved.shape[0], shape[0] - row), min(moved.shape[1], shape[1] - column)
    canvas[row : row + height, column : column + width] = moved[:height, :width]
    return canvas


def _slide(image: Float, share: float, axis: int, fill: float) -> Float:
    """Move by a fraction of a pixel along an axis; one pixel longer."""
    if share == 0:
        return image
    edges = [(0, 0), (0, 0)]
    edges[axis] = (1, 1)
    wide = np.pad(image, edges, constant_values=fill)
    before = wide[:-1] if axis == 0 else wide[:, :-1]
    after = wide[1:] if axis == 0 else wide[:, 1:]
    slid: Float = after + np.float32(share) * (before - after)
    return slid


def _affine(stack: Stack, low: npt.NDArray[np.float64], step: float) -> Affine:
    matrix = np.eye(4)
    x, y = stack.pixel
    matrix[:3, :3] = stack.axes * np.array([x, y, step])
    matrix[:3, 3] = stack.positions[0] + stack.axes[:, :2] @ (low * np.array([x, y]))
    return matrix
