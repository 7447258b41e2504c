"""Nodules: what the network is shown, and what is measured where it answers.

The network says where; the size is measured on the native voxels by the half-maximum rule: a
voxel belongs to the nodule when it is nearer to the nodule's density than to the lung's around
it. Half of a blurred edge lies on each side of that surface, whatever the blur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from scipy import ndimage
from torch import Tensor

from plinth.verticals.medical.ct.analysis import LUNG_LEFT, LUNG_RIGHT, NODULE, Analysis
from plinth.verticals.medical.ct.segment import LEFT, RIGHT
from plinth.verticals.medical.nodules.network import windowed
from plinth.verticals.medical.volumes.components import components
from plinth.verticals.medical.volumes.labelled import Box, Patch
from plinth.verticals.medical.volumes.resample import Grid, fit_spacing, resample
from plinth.verticals.medical.volumes.volume import Volume

PAD_MM = 18.0
EDGE_MM = 2.0
RING_MM = (3.0, 6.0)
LUNG_TOP_HU = -600
MIN_VOXELS, MAX_CANDIDATES = 3, 200
FULL = np.ones((3, 3, 3), bool)

Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]


class Nodule(BaseModel):
    """One candidate found by the network and measured on the native voxels.

    Args:
        number: from 1, largest first.
        side: ``"right"`` or ``"left"`` lung.
        volume_mm3: voxels inside the half-maximum surface times the voxel's volume.
        diameter_mm: of the sphere of that volume.
        mean_hu: mean of these voxels.
        centre_lps_mm: (x, y, z) of their centroid, patient LPS.
        confidence: mean of the network's nodule probability over the candidate, 0.5 to 1 in
            practice; it ranks candidates and is no calibrated probability of disease.
        slice: number of the slice through the centroid, from 1, along the stack's normal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    side: str
    volume_mm3: float
    diameter_mm: float
    mean_hu: float
    centre_lps_mm: tuple[float, float, float]
    confidence: float
    slice: int


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a candidate must reach to be told.

    Args:
        diameter_mm: equivalent diameter.
        confidence: 0 to 1.
    """

    diameter_mm: float = 4.0
    confidence: float = 0.5


@dataclass(frozen=True, eq=False)
class NetworkInput:
    """The lungs' part of a volume as the network sees it.

    Args:
        box: (z, y, x) native voxels it covers.
        grid: the working grid over that box.
        rows: (1, Z, Y, X) float32 in 0..1 (``network.windowed``).
    """

    box: Box
    grid: Grid
    rows: Tensor


def prepare_input(volume: Volume, analysis: Analysis, spacing_mm: float) -> NetworkInput | None:
    """The box of the lungs, padded by PAD_MM and resampled; None without lungs.

    Args:
        volume: HU.
        analysis: its lungs.
        spacing_mm: the network's working spacing, isotropic.
    """
    lungs = _lungs(analysis.labels)
    if not any(span.stop for span in lungs):
        return None
    x, y, z = volume.spacing
    mm = (z, y, x)
    box = cast(
        Box,
        tuple(
            slice(max(0, s.start - round(PAD_MM / d)), min(n, s.stop + round(PAD_MM / d)))
            for s, n, d in zip(lungs, volume.shape, mm, strict=True)
        ),
    )
    part = volume.voxels[box]
    grid = fit_spacing(part.shape, mm, (spacing_mm,) * 3)
    return NetworkInput(box, grid, windowed(resample(part, grid, "area"))[None])


def _lungs(labels: Labels) -> Box:
    """The box of the lungs, found plane by plane; of no voxels where there are none."""
    flat = np.zeros(labels.shape[1:], bool)
    planes = []
    for k, plane in enumerate(labels):
        lung = (plane == LUNG_RIGHT) | (plane == LUNG_LEFT)
        if lung.any():
            planes.append(k)
            flat |= lung
    rows, columns = np.flatnonzero(flat.any(axis=1)), np.flatnonzero(flat.any(axis=0))
    z, y, x = (
        slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0)
        for hit in (np.array(planes), rows, columns)
    )
    return z, y, x


@dataclass(frozen=True, eq=False)
class Candidates:
    """Where the network answered "nodule", candidate by candidate.

    Args:
        labels: (Z, Y, X) uint8 on the working grid: number of the candidate from 1, 0 elsewhere.
        boxes: of the candidates, in the order of their numbers.
        dropped: smaller candidates beyond MAX_CANDIDATES that are left out.
    """

    labels: Labels
    boxes: list[Box]
    dropped: int


def find_candidates(answer: Tensor) -> Candidates:
    """The connected candidates of the network's answer, largest first.

    Args:
        answer: (Z, Y, X) uint8 labels on the working grid; above 0 is nodule.
    """
    labels, count = components(answer.numpy() > 0, FULL)
    sizes = np.zeros(count + 1, np.int64)
    for plane in labels:  # indices of all voxels at once take eight bytes each
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = 0
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] >= MIN_VOXELS]
    kept = order[:MAX_CANDIDATES]
    numbers = np.zeros(count + 1, np.uint8)
    numbers[kept] = np.arange(1, len(kept) + 1)
    numbered = np.empty(labels.shape, np.uint8)
    for into, plane in zip(numbered, labels, strict=True):
        np.take(numbers, plane, out=into)
    del labels
    boxes = [cast(Box, box) for box in ndimage.find_objects(numbered)]
    return Candidates(numbered, boxes, len(order) - len(kept))


def recheck(network_input: NetworkInput, found: Candidates, window: tuple[int, int, int]) -> Tensor:
    """One window of the view around each candidate, so that none is judged at a window's edge.

    Args:
        network_input: what the network was shown.
        found: its candidates.
        window: (z, y, x) voxels of the windows.

    Returns:
        (candidates, 1, z, y, x) float32.
    """
    rows = torch.zeros(len(found.boxes), 1, *window)
    for row, box in zip(rows, found.boxes, strict=True):
        here = _window(box, window, found.labels.shape)
        part = network_input.rows[(slice(None), *here)]
        row[:, : part.shape[1], : part.shape[2], : part.shape[3]] = part
    return rows


def confidences(logits: Tensor, found: Candidates) -> list[float]:
    """Mean nodule probability over each candidate, as the second look sees it.

    Args:
        logits: (candidates, 2, z, y, x), the network's answer to :func:`recheck`.
        found: the candidates.
    """
    window = (logits.shape[2], logits.shape[3], logits.shape[4])
    means = []
    for number, (row, box) in enumerate(zip(logits, found.boxes, strict=True), start=1):
        mask = found.labels[_window(box, window, found.labels.shape)] == number
        probabilities = torch.sigmoid(row[1].float() - row[0].float()).numpy()
        part = probabilities[: mask.shape[0], : mask.shape[1], : mask.shape[2]]
        means.append(float(part[mask].mean()) if mask.any() else 0.0)
    return means


def _window(box: Box, window: tuple[int, int, int], shape: tuple[int, ...]) -> Box:
    """The window around the middle of a box, moved inside the grid where it can be."""
    z, y, x = (
        slice(start, min(size, start + width))
        for start, width, size in (
            (max(0, min((s.start + s.stop - width) // 2, size - width)), width, size)
            for s, width, size in zip(box, window, shape, strict=True)
        )
    )
    return z, y, x


def measure(
    volume: Volume,
    analysis: Analysis,
    network_input: NetworkInput,
    found: Candidates,
    probabilities: list[float],
    thresholds: Thresholds,
) -> tuple[list[Nodule], list[Patch]]:
    """Measure the network's candidates.

    Args:
        volume: HU.
        analysis: its lungs.
        network_input: what the network was shown.
        found: the candidates of its answer.
        probabilities: their confidences.
        thresholds: what a candidate must reach to be told.

    Returns:
        The nodules, largest first, and where they lie over the labels: nodule n as ``NODULE`` + n
        - 1, a smaller one over a larger.
    """
    told: list[tuple[Box, Bool, dict[str, Any]]] = []
    spacing, grid = volume.spacing[::-1], network_input.grid
    lungs = _sides(analysis)
    for number, at in enumerate(found.boxes, start=1):
        box = _on_native(grid, found.labels, number, at)
        if box is None or probabilities[number - 1] < thresholds.confidence:
            continue
        wide = _widened(box, grid.native, spacing)
        here = _absolute(wide, network_input.box)
        lung = analysis.regions.grid.to_native(lungs, here)
        candidate = grid.to_native(found.labels, wide) == number
        if np.count_nonzero(candidate & (lung > 0)) < 0.5 * np.count_nonzero(candidate):
            continue
        mask = _half_maximum(volume.voxels[here], candidate, lung > 0, spacing)
        facts = _facts(volume, here, mask, lung)
        if facts["diameter_mm"] >= thresholds.diameter_mm:
            told.append((here, mask, facts | {"confidence": round(probabilities[number - 1], 3)}))
    told.sort(key=lambda one: -one[2]["volume_mm3"])
    patches = [Patch(here, mask, NODULE + n) for n, (here, mask, _) in enumerate(told)]
    return [Nodule(number=n, **facts) for n, (*_, facts) in enumerate(told, start=1)], patches


def _sides(analysis: Analysis) -> Labels:
    """Lungs with their edges on the coarse grid: 1 right, 2 left."""
    coarse = np.zeros_like(analysis.regions.bits)
    coarse[(analysis.regions.bits & LEFT) > 0] = 2
    coarse[(analysis.regions.bits & RIGHT) > 0] = 1
    return coarse


def _on_native(grid: Grid, labels: Labels, number: int, box: Box) -> Box | None:
    """The native voxels whose nearest one of a grid has a label; ``None`` where there are none.

    Args:
        grid: of the labels.
        labels: (Z, Y, X) on it.
        number: the label.
        box: around it, on the grid.
    """
    spans = []
    for nearest, span in zip(grid.nearest(), box, strict=True):
        within = np.flatnonzero((nearest >= span.start) & (nearest < span.stop))
        if not len(within):
            return None
        spans.append(slice(int(within[0]), int(within[-1]) + 1))
    around = (spans[0], spans[1], spans[2])
    found = ndimage.find_objects((grid.to_native(labels, around) == number).astype(np.uint8))
    return _absolute(cast(Box, found[0]), around) if found else None


def _widened(box: tuple[slice, ...], shape: tuple[int, ...], spacing: tuple[float, ...]) -> Box:
    margin = RING_MM[1] + 1
    z, y, x = (
        slice(max(0, s.start - math.ceil(margin / d)), min(n, s.stop + math.ceil(margin / d)))
        for s, n, d in zip(box, shape, spacing, strict=True)
    )
    return z, y, x


def _absolute(box: Box, base: Box) -> Box:
    z, y, x = (slice(b.start + s.start, b.start + s.stop) for s, b in zip(box, base, strict=True))
    return z, y, x


def _half_maximum(
    hu: npt.NDArray[Any], candidate: Bool, lung: Bool, spacing: tuple[float, ...]
) -> Bool:
    """Voxels near the candidate that are denser than halfway between lung and nodule."""
    away = ndimage.distance_transform_edt(~candidate, sampling=spacing)
    ring = (away > RING_MM[0]) & (away <= RING_MM[1]) & lung & (hu < LUNG_TOP_HU)
    around = float(np.median(hu[ring])) if ring.any() else -850.0
    depth = ndimage.distance_transform_edt(candidate, sampling=spacing)
    core = candidate & (depth >= 0.5 * depth.max())
    inside = float(np.median(hu[core]))
    if inside <= around:
        return candidate
    dense = (away <= EDGE_MM) & (hu > (around + inside) / 2) & (lung | candidate)
    labels, _ = ndimage.label(dense, FULL)
    sizes = np.bincount(labels[candidate].ravel(), minlength=2)
    sizes[0] = 0
    if not sizes.any():
        return candidate
    return cast(Bool, labels == int(sizes.argmax()))


def _facts(volume: Volume, here: Box, mask: Bool, lung: Labels) -> dict[str, Any]:
    at = np.argwhere(mask)
    centre = at.mean(axis=0) + [s.start for s in here]
    cubic = len(at) * volume.voxel_volume_mm3
    x, y, z = (round(float(v), 2) for v in volume.index_to_lps(centre[::-1]))
    sides = np.bincount(lung[mask], minlength=3)
    return {
        "side": "right" if sides[1] >= sides[2] else "left",
        "volume_mm3": round(cubic, 1),
        "diameter_mm": round((6 * cubic / math.pi) ** (1 / 3), 2),
        "mean_hu": round(float(volume.voxels[here][mask].mean()), 1),
        "centre_lps_mm": (x, y, z),
        "slice": round(float(centre[0])) + 1,
    }
