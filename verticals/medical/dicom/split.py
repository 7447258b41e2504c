"""Tell apart the volumes of a series whose positions repeat: phases, echoes, b-values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from plinth.verticals.medical.dicom.elements import INTERLEAVED, MARKS, SEPARATE
from plinth.verticals.medical.dicom.geometry import SAME_PLACE_MM, orientation_axes
from plinth.verticals.medical.dicom.header import Frame
from plinth.verticals.medical.volumes.volume import Issue

ORIGIN = "series attributes"
"""Stands for the digest of what all images of a series have in common (``elements.ORIGIN``)."""

STACK = "StackID"
LEAST_SWEPT, MOST_PASSES = 3, 4
"""Images of a pass over the volume at least, and such passes at most."""

SHARE = 0.5
"""Each part must cover at least this share of the positions, or it is no part."""


@dataclass(frozen=True)
class Part:
    """One volume of a repeating series.

    Args:
        frames: its images, one per position unless nothing tells repeats apart.
        label: the attributes that tell it from its siblings, ``None`` for a lone part.
        notes: what was found.
    """

    frames: tuple[Frame, ...]
    label: str | None = None
    notes: tuple[Issue, ...] = ()


def split(frames: Sequence[Frame]) -> list[Part]:
    """Split frames of one orientation into volumes.

    Values of ``elements.SEPARATE`` never share a volume, nor do those of ``elements.INTERLEAVED``
    whose slices lie between one another, nor slices that the Instance Numbers or Content Times of
    CT and PET pass over twice. Within what is left, no part may hold a position twice: single
    attributes are tried first (``elements.MARKS``), then pairs and triples. When none separates
    the repeats, the frames stay together; the loader then drops exact copies and refuses anything
    else.
    """
    marks = _separating(frames)
    if not marks:
        return _swept(frames) or _split_repeats(frames)
    groups: dict[tuple[str, ...], list[Frame]] = {}
    for frame in frames:
        groups.setdefault(tuple(_told(frame, mark) for mark in marks), []).append(frame)
    return _inner(groups, " and ".join(marks))


def _inner(groups: dict[tuple[str, ...], list[Frame]], by: str) -> list[Part]:
    """The parts that groups make, each split where its positions repeat."""
    parts = []
    for number, (_, members) in enumerate(sorted(groups.items(), key=_ascending), 1):
        name = f"part {number} of {len(groups)} by {by}"
        for inner in _split_repeats(members):
            label = f"{name}, {inner.label}" if inner.label else name
            parts.append(replace(inner, label=label))
    return _shortened(parts)


def _separating(frames: Sequence[Frame]) -> tuple[str, ...]:
    """The attributes that part these frames whatever their places; a count of slices does not."""
    found = []
    for mark in SEPARATE:
        values = Counter(frame.marks.get(mark, "") for frame in frames)
        if len(values) > 1 and max(values.values()) > 1:
            found.append(mark)
    depths = _depths(frames)
    if STACK in found:  # a number for each slice is no stack
        stacks = _by_value([_told(frame, STACK) for frame in frames], depths)
        if all(np.ptp(one) < SAME_PLACE_MM for one in stacks):
            found.remove(STACK)
    for mark in (*INTERLEAVED, ORIGIN):
        if not found and _interleaved(_by_value([_told(frame, mark) for frame in frames], depths)):
            found.append(mark)
    return tuple(found)


def _told(frame: Frame, mark: str) -> str:
    return frame.header.origin if mark == ORIGIN else frame.marks.get(mark, "")


def _depths(frames: Sequence[Frame]) -> list[float]:
    """Of each, in mm along the normal."""
    normal = orientation_axes(frames[0])[:, 2]
    return [float(np.dot(frame.position or (0, 0, 0), normal)) for frame in frames]


def _by_value(values: Sequence[Hashable], depths: Sequence[float]) -> list[list[float]]:
    stacks: dict[Hashable, list[float]] = {}
    for value, depth in zip(values, depths, strict=True):
        stacks.setdefault(value, []).append(depth)
    return list(stacks.values())


def _interleaved(parts: Sequence[list[float]]) -> bool:
    """Two overlap along the normal by more than one slice each, at other places."""
    stacks = sorted(sorted(depths) for depths in parts if len(depths) > 1)
    for one, other in pairwise(stacks):
        shared = (
            [d for d in one if other[0] < d < other[-1]],
            [d for d in other if one[0] < d < one[-1]],
        )
        apart = set(np.round(shared[0], 2)).isdisjoint(np.round(shared[1], 2))
        if apart and min(map(len, shared)) > 1:
            return True
    return False


# -- passes over the volume --------------------------------------------------------------------
def _swept(frames: Sequence[Frame]) -> list[Part] | None:
    """Parts by the passes that numbers or times make over one volume, if they make several.

    MR is numbered and timed in the order of its excitation, which is interleaved as a rule.
    """
    if frames[0].header.modality not in ("CT", "PT") or len(frames) < 2 * LEAST_SWEPT:
        return None
    depths = _depths(frames)
    orders: dict[str, list[float]] = {
        "InstanceNumber": [_or_nan(frame.header.instance_number) for frame in frames],
        "ContentTime": [_number(frame.marks.get("ContentTime", "")) for frame in frames],
    }
    for name, order in orders.items():
        passes = _passes(order, depths)
        if passes is None:
            continue
        groups: dict[tuple[str, ...], list[Frame]] = {}
        for frame, number in zip(frames, passes, strict=True):
            groups.setdefault((str(number),), []).append(frame)
        return _inner(groups, f"the passes of {name}")
    return None


def _passes(order: Sequence[float], depths: Sequence[float]) -> list[int] | None:
    """Which pass each image belongs to; ``None`` where there is one, or no clear ones."""
    if not np.isfinite(order).all() or len(set(order)) < len(order):
        return None
    by_order = np.argsort(order)
    steps = np.diff(np.asarray(depths)[by_order])
    back = np.sign(steps) != np.sign(np.median(steps))
    number = np.concatenate([[0], np.cumsum(back)])
    counts = np.bincount(number)
    if not 1 < len(counts) <= MOST_PASSES or counts.min() < LEAST_SWEPT:
        return None
    passes = np.empty(len(order), int)
    passes[by_order] = number
    told = [int(one) for one in passes]
    return told if _interleaved(_by_value(told, depths)) else None


def _or_nan(number: int | None) -> float:
    return float("nan") if number is None else float(number)


def _shortened(parts: list[Part]) -> list[Part]:
    """Parts that reach less far than the largest of them are partial."""
    most = max(len(part.frames) for part in parts)
    return [
        replace(part, notes=(*part.notes, Issue("partial", _fewer(len(part.frames), most))))
        if len(part.frames) < most and not part.notes
        else part
        for part in parts
    ]


def _fewer(count: int, most: int) -> str:
    return f"{count} images are in this part, {most} in the largest part of the series"


def _split_repeats(frames: Sequence[Frame]) -> list[Part]:
    places = _places(frames)
    total = len(set(places))
    if total == len(frames):
        return [Part(tuple(frames))]
    varying = [mark for mark in MARKS if len({frame.marks.get(mark) for frame in frames}) > 1]
    repeats = max(Counter(places).values())
    for count in (1, 2, 3):
        for marks in combinations(varying, count):
            parts = _by(frames, places, marks, total, repeats)
            if parts:
                return parts
    return [Part(tuple(frames))]


def _places(frames: Sequence[Frame]) -> list[int]:
    """A number per frame, equal for equal positions."""
    known: dict[tuple[int, ...], int] = {}
    numbers = []
    for frame in frames:
        assert frame.position is not None
        cell = tuple(round(value / SAME_PLACE_MM) for value in frame.position)
        near = next((known[key] for key in _around(cell) if key in known), None)
        known[cell] = len(known) if near is None else near
        numbers.append(known[cell])
    return numbers


def _around(cell: tuple[int, ...]) -> list[tuple[int, ...]]:
    x, y, z = cell
    shifts = (0, -1, 1)
    return [(x + a, y + b, z + c) for a in shifts for b in shifts for c in shifts]


def _by(
    frames: Sequence[Frame], places: list[int], marks: tuple[str, ...], total: int, repeats: int
) -> list[Part] | None:
    """The parts by these attributes, or ``None`` if they do not separate the repeats.

    As many parts as a position has images are phases, however short; of any other number, each
    has to cover SHARE of the positions, or the attribute counts something else.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for n, frame in enumerate(frames):
        groups.setdefault(tuple(frame.marks.get(mark, "") for mark in marks), []).append(n)
    for members in groups.values():
        covered = len({places[n] for n in members})
        short = covered < SHARE * total and len(groups) != repeats
        if covered < len(members) or short:
            return None
    parts = []
    for number, (_, members) in enumerate(sorted(groups.items(), key=_ascending), 1):
        text = f"{len(members)} of the {total} positions of this series are in this part"
        notes = (Issue("partial", text),) if len(members) < total else ()
        label = f"part {number} of {len(groups)} by {' and '.join(marks)}"
        parts.append(Part(tuple(frames[n] for n in members), label, notes))
    return parts


def _ascending(group: tuple[tuple[str, ...], object]) -> tuple[tuple[float, str], ...]:
    """Orders mark values by number where they are numbers."""
    return tuple((_number(value), value) for value in group[0])


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("inf")
