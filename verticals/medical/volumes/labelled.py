"""Where labels lie in a volume, found plane by plane on as many threads as there are CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from plinth.engine.parallel import spread

Bool = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.uint8]
TOGETHER = 16
"""Planes that one thread looks at before it takes others."""


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


def boxes_of(
    labels: Labels, values: Sequence[int] | Labels
) -> dict[int, tuple[slice, slice, slice]]:
    """The smallest box around each label that has a voxel.

    Args:
        labels: (z, y, x).
        values: that are looked for.
    """
    found: list[tuple[Bool, Bool, Bool]] = []

    def look(planes: range) -> None:
        z, y, x = (np.zeros((len(values), size), bool) for size in labels.shape)
        for k in planes:
            for number, same in _in_plane(labels[k], values):
                z[number, k] = True
                y[number] |= same.any(axis=1)
                x[number] |= same.any(axis=0)
        found.append((z, y, x))

    spread(look, _parts(len(labels)))
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
