"""Where labels lie in a volume, found plane by plane on as many threads as there are CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plinth.engine.parallel import spread

Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
Box = tuple[slice, slice, slice]
TOGETHER = 16
"""Planes that one thread looks at before it takes others."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A structure that lies over the labels of a volume.

    Args:
        box: the part of the volume that it lies in.
        mask: (z, y, x) of that part.
        label: of the structure.
    """

    box: Box
    mask: Bool
    label: int

    def put(self, labels: Labels) -> None:
        """Write it into the labels (z, y, x) of the whole volume."""
        labels[self.box][self.mask] = self.label


def mask_of(label: int, labels: Labels, box: Box, patches: Sequence[Patch]) -> Bool:
    """Where a part of the volume is of a label, with a margin of one voxel on all sides.

    Args:
        label: that is looked for.
        labels: (z, y, x).
        box: the part.
        patches: over the whole, in their order.
    """
    mask = np.zeros([span.stop - span.start + 2 for span in box], bool)
    part = mask[1:-1, 1:-1, 1:-1]
    np.equal(labels[box], label, out=part)
    for patch in patches:
        spans = list(zip(box, patch.box, strict=True))
        both = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in spans]
        if all(start < stop for start, stop in both):
            ours, theirs = (
                tuple(
                    slice(start - span[side].start, stop - span[side].start)
                    for (start, stop), span in zip(both, spans, strict=True)
                )
                for side in (0, 1)
            )
            part[ours][patch.mask[theirs]] = patch.label == label
    return mask


def slices_with(labels: Labels, values: Sequence[int] | Labels) -> Bool:
    """Which slices hold which label.

    Args:
        labels: (z, y, x).
        values: that are looked for.

    Returns:
        (values, slices).
    """
    found = np.zeros((len(values), len(labels)), bool)

    def look(planes: range) -> None:
        for k in planes:
            for number, _ in _in_plane(labels[k], values):
                found[number, k] = True

    spread(look, _parts(len(labels)))
    return found


def boxes_of(labels: Labels, values: Sequence[int] | Labels) -> dict[int, Box]:
    """The smallest box around each label that has a voxel.

    Args:
        labels: (z, y, x).
        values: that are looked for.
    """

    def look(planes: range) -> tuple[Bool, Bool, Bool]:
        z, y, x = (np.zeros((len(values), size), bool) for size in labels.shape)
        for k in planes:
            for number, same in _in_plane(labels[k], values):
                z[number, k] = True
                y[number] |= same.any(axis=1)
                x[number] |= same.any(axis=0)
        return z, y, x

    found = spread(look, _parts(len(labels)))
    if not found:
        return {}
    z, y, x = (np.logical_or.reduce(one) for one in zip(*found, strict=True))
    return {
        int(value): (_span(z[number]), _span(y[number]), _span(x[number]))
        for number, value in enumerate(values)
        if z[number].any()
    }


def _in_plane(plane: Labels, values: Sequence[int] | Labels) -> Iterator[tuple[int, Bool]]:
    """Which of the values a plane holds, by their places, and where."""
    most = plane.max(initial=0)
    for number, value in enumerate(values):
        if value <= most:
            same: Bool = plane == value
            if same.any():
                yield number, same


def _parts(planes: int) -> list[range]:
    return [range(k, min(k + TOGETHER, planes)) for k in range(0, planes, TOGETHER)]


def _span(hit: Bool) -> slice:
    (at,) = np.nonzero(hit)
    return slice(int(at[0]), int(at[-1]) + 1)
