"""Tell apart the volumes of a series whose positions repeat: phases, echoes, b-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from plinth.verticals.medical.dicom.elements import MARKS
from plinth.verticals.medical.dicom.geometry import SAME_PLACE_MM
from plinth.verticals.medical.dicom.header import Frame
from plinth.verticals.medical.volumes.volume import Issue

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


def split_repeats(frames: Sequence[Frame]) -> list[Part]:
    """Split frames of one orientation so that no part holds a position twice.

    Single attributes are tried first (``elements.MARKS``), then pairs and
    triples. When none separates the repeats, the frames stay together; the loader then drops
    exact copies and refuses anything else.
    """
    places = _places(frames)
    total = len(set(places))
    if total == len(frames):
        return [Part(tuple(frames))]
    varying = [mark for mark in MARKS if len({frame.marks.get(mark) for frame in frames}) > 1]
    for count in (1, 2, 3):
        for marks in combinations(varying, count):
            parts = _by(frames, places, marks, total)
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
    frames: Sequence[Frame], places: list[int], marks: tuple[str, ...], total: int
) -> list[Part] | None:
    """The parts by these attributes, or ``None`` if they do not separate the repeats."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for n, frame in enumerate(frames):
        groups.setdefault(tuple(frame.marks.get(mark, "") for mark in marks), []).append(n)
    for members in groups.values():
        covered = len({places[n] for n in members})
        if covered < len(members) or covered < SHARE * total:
            return None
    parts = []
    for number, (_, members) in enumerate(sorted(groups.items(), key=_ascending), 1):
        short = total - len(members)
        text = f"{len(members)} of the {total} positions of this series are in this part"
        notes = (Issue("partial", text),) if short else ()
        label = f"part {number} of {len(groups)} by {' and '.join(marks)}"
        parts.append(Part(tuple(frames[n] for n in members), label, notes))
    return parts


def _ascending(group: tuple[tuple[str, ...], list[int]]) -> tuple[tuple[float, str], ...]:
    """Orders mark values by number where they are numbers."""
    return tuple((_number(value), value) for value in group[0])


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("inf")
