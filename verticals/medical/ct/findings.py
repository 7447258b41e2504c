"""One measured number with its unit and method, and lung densitometry from a histogram."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

EMPHYSEMA_HU = -950
PERCENTILE = 15.0


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


def density(key: str, title: str, histogram: npt.NDArray[np.int64], lowest: int) -> list[Finding]:
    """Mean density, emphysema index and 15th percentile of air-filled lung.

    Args:
        key: first part of the findings' keys.
        title: first words of their titles.
        histogram: voxels by HU rounded to integers; bin n holds ``lowest + n``.
        lowest: HU of bin 0.
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
    voxels = "air-filled voxels (below -400 HU) of the lung, airway left out"
    return [
        finding(f"{key}_density", f"{title}, mean density", mean, "HU", f"mean of {voxels}"),
        finding(
            f"{key}_laa950",
            f"{title}, emphysema index LAA-950",
            low,
            "%",
            f"share below {EMPHYSEMA_HU} HU of {voxels}",
        ),
        finding(
            f"{key}_perc15",
            f"{title}, 15th percentile (Perc15)",
            perc,
            "HU",
            f"HU below which 15 % of {voxels} lie",
        ),
    ]
