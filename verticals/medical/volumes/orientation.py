"""Volumes seen along patient axes, whatever way their slices were cut."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.verticals.medical.volumes.volume import Affine

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Orientation:
    """How the axes of an array (z, y, x) lie in the patient, to the nearest axis.

    Args:
        axes: array axes that run along patient superior, posterior and left.
        flips: which of these run the other way.
        lean: degrees between the worst axis and its patient axis.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    lean: float

    @classmethod
    def of(cls, affine: Affine) -> Orientation:
        """The orientation of an array whose index (i, j, k) = (x, y, z) ``affine`` takes to LPS."""
        direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        best = max(
            permutations(range(3)), key=lambda p: sum(abs(direction[a, p[a]]) for a in range(3))
        )
        cosines = [float(direction[lps, best[lps]]) for lps in (2, 1, 0)]
        z, y, x = (2 - best[lps] for lps in (2, 1, 0))
        down, front, right = (cosine < 0 for cosine in cosines)
        lean = float(np.degrees(np.arccos(min(1.0, min(abs(c) for c in cosines)))))
        return cls((z, y, x), (down, front, right), lean)

    def to_patient(self, array: Array) -> Array:
        """A view (superior, posterior, left), each axis ascending, of an array (z, y, x)."""
        turned = array.transpose(self.axes)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    def from_patient(self, array: Array) -> Array:
        """The inverse of :meth:`to_patient`, also a view."""
        back = array[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]
        return back.transpose(tuple(int(i) for i in np.argsort(self.axes)))

    def spacing(self, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        """(superior, posterior, left) mm of a spacing given as (x, y, z)."""
        z, y, x = (spacing[2 - axis] for axis in self.axes)
        return z, y, x
