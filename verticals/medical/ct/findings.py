"""One measured number with its unit and method, and lung densitometry from a histogram."""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from plinth.verticals.medical.volumes.terms import KERNEL

EMPHYSEMA_HU = -950
PERCENTILE = 15.0
MAX_NOISE_HU = 45.0
"""Standard deviation above which noise alone pushes healthy lung (-860 HU) below -950 HU in more
than 2 % of voxels."""

SHARP = re.compile(
    r"[BHITU][a-z]?[5-9]\d.*|D|E|L|Y[A-D]|EB|FC[358]\d.*|LUNG|BONE.*|EDGE|HD ?LUNG|SHARP .*",
    re.IGNORECASE,
)
"""Convolution kernels for lung and bone: Siemens from 50, Philips D, E, L, Y, Canon FC30 to FC39,
FC50 to FC59 and FC80 to FC89, GE by name; and what a de-identified copy calls so."""

NO_KERNEL = ("", "NONE")


class Finding(BaseModel):
    """One measured number.

    Args:
        key: stable name, such as ``"lungs_volume"``.
        title: for people.
        value: the number, or ``None`` where there was nothing to measure.
        unit: ``mL``, ``HU``, ``%``, ``cm²``.
        method: how, with thresholds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    title: str
    value: float | None
    unit: str
    method: str


def finding(key: str, title: str, value: float | None, unit: str, method: str) -> Finding:
    """A finding, rounded to what is meaningful."""
    rounded = None if value is None else round(float(value), 2)
    return Finding(key=key, title=title, value=rounded, unit=unit, method=method)


def withheld(kernel: str | None, noise_hu: float | None) -> str | None:
    """Why LAA-950 and Perc15 say nothing about the lung here, or ``None``.

    Sharp kernels and noise widen the histogram, and both indices read its lower tail (Boedeker et
    al., Acad Radiol 2004).
    """
    name = (kernel or "").partition("\\")[0].strip()
    if SHARP.fullmatch(name):
        told = f" {name}" if KERNEL.fullmatch(name) else ""
        return f"the kernel{told} is sharp"
    if noise_hu is not None and noise_hu > MAX_NOISE_HU:
        return f"the noise is {noise_hu:.0f} HU (more than {MAX_NOISE_HU:.0f})"
    return None


def tissue_noise(planes: npt.NDArray[np.generic]) -> float | None:
    """Standard deviation of the noise in soft tissue, HU; ``None`` where there is too little.

    The median of a pixel's distance from the mean of its four neighbours, over 0.6745 and the
    square root of 1.25, which white noise would give.

    Args:
        planes: (n, y, x) HU.
    """
    hu = planes.astype(np.float32)
    inner = hu[:, 1:-1, 1:-1]
    around = (hu[:, :-2, 1:-1] + hu[:, 2:, 1:-1] + hu[:, 1:-1, :-2] + hu[:, 1:-1, 2:]) / 4
    soft = (around > -20) & (around < 120)
    if np.count_nonzero(soft) < 1000:
        return None
    typical = float(np.median(np.abs(inner - around)[soft]))
    return typical / (0.6745 * math.sqrt(1.25))


def density(
    key: str,
    title: str,
    histogram: npt.NDArray[np.int64],
    lowest: int,
    why_not: str | None = None,
) -> list[Finding]:
    """Mean density, emphysema index and 15th percentile of air-filled lung.

    Args:
        key: first part of the findings' keys.
        title: first words of their titles.
        histogram: voxels by HU rounded to integers; bin n holds ``lowest + n``.
        lowest: HU of bin 0.
        why_not: why the indices of the histogram's tail are withheld.
    """
    total = int(histogram.sum())
    mean = low = perc = None
    if total:
        middles = lowest + np.arange(histogram.size)
        cumulative = np.cumsum(histogram)
        mean = float((histogram * middles).sum() / total)
        low = 100.0 * float(cumulative[EMPHYSEMA_HU - lowest - 1]) / total
        index = int(np.searchsorted(cumulative, PERCENTILE / 100 * total))
        before = float(cumulative[index - 1]) if index else 0.0
        share = (PERCENTILE / 100 * total - before) / float(histogram[index])
        perc = lowest + index - 0.5 + share
    if why_not is not None:
        low = perc = None
    note = f"; withheld: {why_not}" if why_not is not None else ""
    voxels = "air-filled voxels (below -400 HU) of the lung, airway left out"
    return [
        finding(f"{key}_density", f"{title}, mean density", mean, "HU", f"mean of {voxels}"),
        finding(
            f"{key}_laa950",
            f"{title}, emphysema index LAA-950",
            low,
            "%",
            f"share below {EMPHYSEMA_HU} HU of {voxels}{note}",
        ),
        finding(
            f"{key}_perc15",
            f"{title}, 15th percentile (Perc15)",
            perc,
            "HU",
            f"HU below which 15 % of {voxels} lie{note}",
        ),
    ]
