"""What is measured in a CT volume: volumes, lung density, bone and noise.

Thresholds and their sources: lung densitometry below -950 HU and the 15th percentile as in
Gevenois et al. (AJRCCM 1996) and Parr et al. (Respir Res 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.engine import InputError
from plinth.engine.mapped import trim, zeros
from plinth.engine.parallel import spread
from plinth.verticals.medical.ct.findings import (
    NO_KERNEL,
    Finding,
    density,
    finding,
    tissue_noise,
    withheld,
)
from plinth.verticals.medical.ct.segment import (
    AIRWAY,
    BODY,
    BONE,
    BONE_HU,
    CLOSING_MM,
    COARSE_LUNG_HU,
    INSIDE,
    LEFT,
    LEFT_CORE,
    LUNG_EDGE_HU,
    LUNG_HU,
    MIN_LUNG_ML,
    RIGHT,
    RIGHT_CORE,
    TISSUE_HU,
    Regions,
    regions,
)
from plinth.verticals.medical.volumes.orientation import Orientation
from plinth.verticals.medical.volumes.terms import STAND_IN
from plinth.verticals.medical.volumes.volume import HOW_TO_SAY_HU, Volume

LUNG_RIGHT, LUNG_LEFT, BONE_LABEL, NODULE = 1, 2, 3, 4
"""Values of :attr:`Analysis.labels`; 0 is everything else, NODULE + n - 1 is nodule n."""

LOWEST = -1100
MIN_SLICES, MIN_EXTENT_MM = 8, 30.0
AIRY_HU, MIN_AIR = -300, 0.001
FRAMED = 0.5
"""Share of slices that have one tissue-like value at all corners, beyond which that is a frame."""
TOGETHER = 16
"""Planes that one thread counts before it takes others."""


NOISE_METHOD = (
    "median distance of a pixel between -20 and 120 HU from its four neighbours, as the standard "
    "deviation of white noise; 8 planes"
)
MAX_RATIO, MIN_RATIO = 1.35, 0.9
"""Right over left lung volume beyond which a part of one lung is probably missing."""

Bins = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]


@dataclass(eq=False)
class Analysis:
    """What was found in a volume by HU rules.

    Args:
        labels: (z, y, x) uint8 on the native grid: LUNG_RIGHT, LUNG_LEFT, BONE_LABEL; from
            NODULE on the nodules, once these are found.
        orientation: how the array lies in the patient.
        regions: the coarse regions the labels were refined from.
        findings: the numbers, with units and methods.
        warnings: what limits them, one sentence each.
    """

    labels: Labels
    orientation: Orientation
    regions: Regions
    findings: list[Finding] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_ct(volume: Volume) -> None:
    """Refuse what the HU rules say nothing about.

    Raises:
        InputError: not CT, too few slices, or values that are not HU.
    """
    modality = volume.series.modality
    if modality != "CT":
        raise InputError(
            f"series {volume.series.id} is {modality or 'of no modality'}, expected CT",
            field="Modality",
            hint="HU thresholds mean nothing on other modalities",
            reason="not_ct",
        )
    _check_kind(volume)
    slices, extent = volume.shape[0], volume.shape[0] * volume.spacing[2]
    if slices < MIN_SLICES or extent < MIN_EXTENT_MM:
        raise InputError(
            f"series {volume.series.id} has {slices} slices over {extent:.0f} mm, expected at "
            f"least {MIN_SLICES} over {MIN_EXTENT_MM:.0f} mm",
            field="NumberOfSlices",
            reason="too_thin",
        )
    sample = volume.voxels[:: max(1, slices // 32), ::4, ::4]
    dense = sample[sample > AIRY_HU]
    middle = float(np.median(dense)) if dense.size else float("nan")
    airy = 1 - dense.size / sample.size
    if -150 <= middle <= 500 and airy >= MIN_AIR and float(sample.min()) >= -10_000:
        _check_corners(volume)
        return
    raise InputError(
        f"series {volume.series.id} does not look like HU: {100 * airy:.1f} % of it lie below "
        f"{AIRY_HU} HU, expected at least {100 * MIN_AIR:g} %, and the median above is "
        f"{middle:.0f}, expected soft tissue (-150 to 500)",
        field="RescaleIntercept",
        hint="check Rescale Slope and Intercept; localisers and derived maps are not HU",
        reason="not_hu",
    )


def _check_corners(volume: Volume) -> None:
    """Refuse a round field of view in a frame of one value that counts as tissue.

    The air between body and frame would be air inside the body. Corners of a real image differ by
    their noise.
    """
    size = max(2, min(volume.shape[1:]) // 64)
    ends = (slice(None, size), slice(-size, None))
    blocks = [volume.voxels[:, rows, columns] for rows in ends for columns in ends]
    corners = np.stack(blocks, axis=1).reshape(len(volume.voxels), -1)
    value = float(corners[len(corners) // 2, 0])
    framed = int((corners == corners.dtype.type(value)).all(axis=1).sum())
    if value > TISSUE_HU and framed > FRAMED * len(corners):
        raise InputError(
            f"series {volume.series.id} is filled with {value:g} HU at the corners of {framed} of "
            f"{len(corners)} slices, which cannot be told from tissue: what lies outside of the "
            "field of view has to be air",
            field="PixelPaddingValue",
            hint="give the original images, or fill what lies outside with -1024 HU",
            reason="not_hu",
        )


def _check_kind(volume: Volume) -> None:
    facts = volume.series
    if facts.kind is not None:
        raise InputError(
            f"series {facts.id} is {facts.kind}: its values are not attenuation",
            field="ImageType",
            hint="give the original images of the scan",
            reason="derived",
        )
    if facts.units != "HU":
        raise InputError(
            f"series {facts.id} is {facts.told_units}, expected HU",
            field="RescaleType",
            hint=HOW_TO_SAY_HU,
            reason="not_hu",
        )


def analyse(volume: Volume, max_slice_spacing_mm: float = 3.0) -> Analysis:
    """Segment by rules and measure.

    Args:
        volume: HU, of a CT series.
        max_slice_spacing_mm: a step between slices above this draws a warning.

    Raises:
        InputError: see :func:`check_ct`; also when no body is found.
    """
    check_ct(volume)
    orientation = Orientation.of(volume.affine)
    found = regions(volume, orientation)
    z, y, x = found.grid.nearest()
    flat = np.bitwise_or.reduce(found.bits[np.unique(z)], axis=0)[y][:, x]
    if not (flat & INSIDE).any():
        raise InputError(
            f"no body was found in series {volume.series.id}", field="PixelData", reason="no_body"
        )
    labels = zeros(volume.shape)
    rows, columns = _box(flat)
    y, x = y[rows], x[columns]

    def add(planes: list[int]) -> _Counts:
        part = _Counts()
        for k in planes:
            bits = found.bits[z[k]].take(y, 0).take(x, 1)
            part.add(volume.voxels[k, rows, columns], bits, labels[k, rows, columns])
        return part

    filled = set(volume.filled)
    seen = [k for k in range(len(labels)) if k not in filled]
    thin = volume.voxels[:: max(1, volume.shape[0] // 8)]
    steps: list[Callable[[], Any]] = [partial(tissue_noise, thin)]
    steps += [partial(add, seen[n : n + TOGETHER]) for n in range(0, len(seen), TOGETHER)]
    noise, *parts = spread(lambda step: step(), steps)
    counts = _Counts()
    for part in parts:
        counts.merge(part)
    trim()  # of what the threads held and let go
    analysis = Analysis(labels, orientation, found)
    analysis.findings = [
        *_lung_findings(counts, volume, noise),
        *_volume_findings(counts, volume),
        finding("tissue_noise", "Noise in soft tissue", noise, "HU", NOISE_METHOD),
    ]
    analysis.warnings = _warnings(volume, orientation, found, counts, max_slice_spacing_mm)
    return analysis


@dataclass(eq=False)
class _Counts:
    """Voxels by structure, and HU histograms of the air-filled lungs."""

    body: int = 0
    bone: int = 0
    airway: int = 0
    lung: dict[int, int] = field(default_factory=lambda: {LUNG_RIGHT: 0, LUNG_LEFT: 0})
    air: dict[int, Bins] = field(
        default_factory=lambda: {
            side: np.zeros(LUNG_HU - LOWEST, np.int64) for side in (LUNG_RIGHT, LUNG_LEFT)
        }
    )

    def merge(self, other: _Counts) -> None:
        """Add what was counted elsewhere."""
        self.body += other.body
        self.bone += other.bone
        self.airway += other.airway
        for side in self.lung:
            self.lung[side] += other.lung[side]
            self.air[side] += other.air[side]

    def add(self, hu: npt.NDArray[Any], bits: Labels, labels: Labels) -> None:
        """Count one native plane (y, x) and write its labels, which are 0.

        A value that is not a number passes no threshold.
        """

        def has(bit: int) -> npt.NDArray[np.bool_]:
            found: npt.NDArray[np.bool_] = (bits & np.uint8(bit)) != 0
            return found

        body = has(INSIDE) | (has(BODY) & (hu > TISSUE_HU))
        bone = has(BONE)
        bone &= body
        bone &= hu >= BONE_HU
        tubes = has(AIRWAY)
        low, airy = (hu < LUNG_EDGE_HU) & ~tubes, hu < LUNG_HU
        sides = np.zeros_like(body)
        for side, may, core in (
            (LUNG_RIGHT, RIGHT, RIGHT_CORE),
            (LUNG_LEFT, LEFT, LEFT_CORE),
        ):
            whole = has(core) | (has(may) & low)
            self.lung[side] += int(np.count_nonzero(whole))
            labels[whole] = side
            sides |= whole
            whole &= airy
            self.air[side] += _histogram(hu[whole])
        bone &= ~sides
        labels[bone] = BONE_LABEL
        tubes &= hu < TISSUE_HU
        tubes &= ~(sides | bone)
        self.body += int(np.count_nonzero(body))
        self.bone += int(np.count_nonzero(bone))
        self.airway += int(np.count_nonzero(tubes))


def _histogram(hu: npt.NDArray[Any]) -> Bins:
    """Voxels by HU rounded to integers, from LOWEST to below LUNG_HU; what is lower is lowest."""
    whole = hu if hu.dtype.kind == "i" else np.rint(hu).astype(np.int32)
    return np.bincount(np.clip(whole, LOWEST, LUNG_HU - 1) - LOWEST, minlength=LUNG_HU - LOWEST)


def _box(bits: Labels) -> tuple[slice, slice]:
    """Rows and columns outside of which a plane (y, x) has no bit."""
    rows, columns = np.flatnonzero(np.any(bits, axis=1)), np.flatnonzero(np.any(bits, axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _lung_findings(counts: _Counts, volume: Volume, noise: float | None) -> list[Finding]:
    ml = volume.voxel_volume_mm3 / 1000
    right, left = (counts.lung[side] * ml for side in (LUNG_RIGHT, LUNG_LEFT))
    how = (
        f"lung-like components (below {COARSE_LUNG_HU} HU at 2 mm) of at least 100 mL inside the "
        f"body, closed by {CLOSING_MM:g} mm over vessels and nodules, edge at {LUNG_EDGE_HU} HU, "
        "airway left out"
    )
    total = f"{how}; total lung capacity only if the scan was taken in full inspiration"
    findings = [
        finding("lung_right_volume", "Right lung volume", right or None, "mL", how),
        finding("lung_left_volume", "Left lung volume", left or None, "mL", how),
        finding("lungs_volume", "Lung volume, both", (right + left) or None, "mL", total),
    ]
    bins = counts.air
    why_not = withheld(volume.series.kernel, noise)
    for key, title, histogram in (
        ("lung_right", "Right lung", bins[LUNG_RIGHT]),
        ("lung_left", "Left lung", bins[LUNG_LEFT]),
        ("lungs", "Both lungs", bins[LUNG_RIGHT] + bins[LUNG_LEFT]),
    ):
        findings += density(key, title, histogram, LOWEST, why_not)
    if right or left:
        air = counts.airway * ml or None
        method = (
            f"air (below {TISSUE_HU} HU) followed plane by plane from the upper trachea into the "
            "main bronchi, lungs left out"
        )
        findings.append(finding("airway_volume", "Trachea and main bronchi", air, "mL", method))
    return findings


def _volume_findings(counts: _Counts, volume: Volume) -> list[Finding]:
    ml = volume.voxel_volume_mm3 / 1000
    return [
        finding(
            "body_volume",
            "Body in the field of view",
            counts.body * ml,
            "mL",
            f"largest components above {TISSUE_HU} HU after parting the couch, holes filled by "
            "axial plane",
        ),
        finding(
            "bone_volume",
            "Bone",
            counts.bone * ml,
            "mL",
            f"voxels of at least {BONE_HU} HU in components of at least 0.5 mL; dense contrast "
            "medium counts as bone",
        ),
    ]


def _density_warnings(volume: Volume) -> list[str]:
    warnings = []
    kernel = volume.series.kernel or ""
    if kernel.upper() in NO_KERNEL or STAND_IN.fullmatch(kernel):
        warnings.append("the kernel is not known: LAA-950 and Perc15 depend on it")
    if volume.series.contrast:
        warnings.append("contrast medium raises lung density: indices do not compare with others")
    return warnings


def _opaque_warnings(found: Regions) -> list[str]:
    return [
        f"between the {side} lung and its ribs at least {volume:.0f} mL are dense (mass, "
        "consolidation or effusion at the wall): they are missing from the lung volume"
        for side, volume in zip(("right", "left"), found.opaque, strict=True)
        if volume
    ]


def _warnings(
    volume: Volume, orientation: Orientation, found: Regions, counts: _Counts, most: float
) -> list[str]:
    warnings = []
    step = round(volume.spacing[2], 1)
    if step > most:
        warnings.append(
            f"slices are {step:g} mm apart (more than {most:g} mm): small nodules can be missed "
            "and densitometry is averaged over thick slices"
        )
    if volume.filled:
        gap = len(volume.filled) * step
        warnings.append(
            f"{len(volume.filled)} slices ({gap:.1f} mm) are missing and were filled in for the "
            "pictures: no measurement and no segment counts them, so volumes are too small"
        )
    if orientation.lean > 20:
        warnings.append(
            f"slices lean {orientation.lean:.0f} degrees from the patient's axes: left and right, "
            "airway and couch follow the nearest axis"
        )
    right, left = counts.lung[LUNG_RIGHT], counts.lung[LUNG_LEFT]
    if not right and not left:
        warnings.append(
            f"no lungs of at least {MIN_LUNG_ML:g} mL each, as an infant's may not have, were "
            "found in the field of view: lung measurements are empty"
        )
    elif not (right and left):
        side = "right" if left else "left"
        warnings.append(
            f"no {side} lung of at least {MIN_LUNG_ML:g} mL was found: it is absent, collapsed, "
            "cut by the field of view or an infant's"
        )
    elif not MIN_RATIO <= right / left <= MAX_RATIO:
        side = "left" if right > left else "right"
        warnings.append(
            f"the right lung is {right / left:.2f} times the left: parts of the {side} lung that "
            f"are denser than {LUNG_HU} HU (mass, consolidation, effusion, collapse) may be missing"
        )
    warnings += _opaque_warnings(found)
    if right or left:
        warnings += _density_warnings(volume)
    if found.touching:
        where = " and ".join(found.touching)
        warnings.append(
            f"the lungs reach the border of the field of view ({where}): lung volumes are partial"
        )
    if found.split == "midline":
        warnings.append("the lungs could not be told apart and were cut at the body's middle")
    if (right or left) and not counts.airway:
        warnings.append("no airway was followed: airway air may count as lung")
    return warnings
