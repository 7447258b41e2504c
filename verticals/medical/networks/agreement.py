"""The agreement gate: a faster plan labels a study only where it labels as the reference does.

The reference is the network in float32 as its own library runs it (precision ``"exact"``). What
the engine found to be fastest on this machine, in whatever precision, is held against it on a few
windows of the user's own study.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plinth.engine import Call, Compute, Flow, Tiling, Told
from plinth.verticals.medical.networks.prepare import Prepared
from plinth.verticals.medical.networks.recipe import Recipe, Triple

Labels = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
MIN_DICE = 0.995
WINDOWS = 4
"""Windows that are compared, at most: each costs one pass of the reference."""


@dataclass(frozen=True)
class Agreement:
    """How a plan agrees with the reference on windows of one study.

    Args:
        plan: backend and precision of the plan, such as ``"openvino/fp32"``.
        reference: of what it was held against.
        dice: by label's name, over all windows; ``None``: neither found any.
        not_compared: labels that the study holds and no window did.
        corners: first voxel of each window on the network's grid.
        window: voxels of a window.
        seconds: wall time of ``plan`` and ``reference`` for these windows: what it cost.
        needed: smallest Dice with which the plan is used.
    """

    plan: str
    reference: str
    dice: dict[str, float | None]
    not_compared: list[str]
    corners: list[Triple]
    window: Triple
    seconds: dict[str, float] = field(default_factory=dict)
    needed: float = MIN_DICE

    @property
    def worst(self) -> float | None:
        """The smallest Dice of a label; ``None``: no window holds any label."""
        return min((value for value in self.dice.values() if value is not None), default=None)

    @property
    def passed(self) -> bool:
        """Whether the plan may be used. Where nothing was found there is nothing to disagree on."""
        return self.worst is None or self.worst >= self.needed

    def sentence(self) -> str:
        """All of it in one sentence, as every output carries it."""
        counted = sum(value is not None for value in self.dice.values())
        worst = "no label there" if self.worst is None else f"worst Dice {self.worst:.4f}"
        used = self.plan if self.passed else f"{self.reference} was used instead"
        return (
            f"agreement of {self.plan} with {self.reference}: {worst} of {counted} labels on "
            f"{len(self.corners)} windows of the first study, {self.needed} needed: {used}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"worst": self.worst, "passed": self.passed}


def agree(
    names: tuple[str, str], prepared: Prepared, recipe: Recipe, tiling: Tiling, labels: Labels
) -> Flow[Agreement]:
    """A flow: run windows of a study by the plan and by the reference, and compare their labels.

    Args:
        names: of the network's model as the engine runs it, and as the reference.
        prepared: the study.
        recipe: of the network.
        tiling: how the study was cut.
        labels: (z, y, x) what the plan made of the study, on the native grid.
    """
    window = tiling.window
    one = replace(tiling, onto=None, uncertainty=False, hidden=False)
    corners = list(chosen(prepared, window, labels))
    counts = np.zeros((3, 256), np.int64)
    said, seconds = ["", ""], [0.0, 0.0]
    for corner in corners:
        rows = cut(prepared.rows, corner, window, tiling.pad_value)
        found: list[Any] = []
        for which, name in enumerate(names):
            begun = time.perf_counter()
            told: Told = yield Call(name, rows, tiling=one, told=True)
            seconds[which] += time.perf_counter() - begun
            said[which] = told.precision
            found.append(told.value)
        counts += yield Compute(voxels_by_label, *found)
    present = np.bincount(labels.ravel(), minlength=256)
    return Agreement(
        said[0],
        said[1],
        {name: _dice(counts[:, value]) for value, name in sorted(recipe.labels.items())},
        [
            name
            for value, name in sorted(recipe.labels.items())
            if present[value] and not counts[:2, value].any()
        ],
        corners,
        window,
        {"plan": round(seconds[0], 3), "reference": round(seconds[1], 3)},
    )


def chosen(prepared: Prepared, window: Triple, labels: Labels) -> Iterator[Triple]:
    """Corners of windows: around labels that no window before holds, then where values differ most.

    Args:
        prepared: the study.
        window: voxels of one.
        labels: (z, y, x) on the native grid.
    """
    shape = prepared.shape
    taken: set[Triple] = set()
    left = np.bincount(labels.ravel(), minlength=256)
    left[0] = 0
    while left.any() and len(taken) < WINDOWS - 1:
        places = np.argwhere(labels == int(left.argmax()))
        corner = _around(prepared, places[len(places) // 2], window)
        if corner in taken:  # as near to it as the volume lets a window be
            left[int(left.argmax())] = 0
            continue
        taken.add(corner)
        yield corner
        left[np.unique(_seen(prepared, corner, window, labels))] = 0
    others = [
        (float(prepared.rows[0][_box(corner, window)].std(correction=0)), corner)
        for corner in _lattice(shape, window)
        if corner not in taken
    ]
    for _, corner in sorted(others, reverse=True)[: max(1, 2 - len(taken))]:
        yield corner


def _lattice(shape: Triple, window: Triple) -> list[Triple]:
    """Corners of windows side by side, the last ones ending with the volume."""
    z, y, x = (
        sorted({min(at, max(0, n - w)) for at in range(0, n, w)})
        for n, w in zip(shape, window, strict=True)
    )
    return [(a, b, c) for a in z for b in y for c in x]


def _box(corner: Triple, window: Triple) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(corner, window, strict=True))


def _around(prepared: Prepared, place: npt.NDArray[np.int64], window: Triple) -> Triple:
    """The corner of the window in whose middle a native voxel (z, y, x) lies, inside the volume."""
    a, b, c = (
        min(max(0, round((place[axis.native] - axis.first) / axis.scale) - w // 2), max(0, n - w))
        for axis, w, n in zip(prepared.axes, window, prepared.shape, strict=True)
    )
    return a, b, c


def _seen(prepared: Prepared, corner: Triple, window: Triple, labels: Labels) -> Labels:
    """The native labels inside a window."""
    spans = [slice(0)] * 3
    for axis, at, size in zip(prepared.axes, corner, window, strict=True):
        ends = sorted(axis.first + t * axis.scale for t in (at, at + size - 1))
        spans[axis.native] = slice(max(0, int(np.ceil(ends[0]))), max(0, int(ends[1]) + 1))
    seen: Labels = labels[tuple(spans)]
    return seen


def cut(rows: Tensor, corner: Triple, window: Triple, pad: float) -> Tensor:
    """A window (c, a, b, c) of a prepared volume, padded where that is smaller."""
    piece = rows[(slice(None), *_box(corner, window))]
    if tuple(piece.shape[1:]) == window:
        return piece.contiguous()
    whole = torch.full((len(rows), *window), pad)
    whole[(slice(None), *(slice(0, n) for n in piece.shape[1:]))] = piece
    return whole


def voxels_by_label(ours: Tensor, theirs: Tensor) -> Counts:
    """Voxels of each label in the one, in the other, and in both at one place: (3, 256)."""
    a, b = ours.numpy().ravel(), theirs.numpy().ravel()
    both = a[a == b]
    return np.stack([np.bincount(each, minlength=256) for each in (a, b, both)])


def _dice(counts: Counts) -> float | None:
    ours, theirs, both = (int(n) for n in counts)
    return None if ours + theirs == 0 else round(2 * both / (ours + theirs), 6)
