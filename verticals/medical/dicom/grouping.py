"""Which images belong together: the identity they claim, and whether it can be trusted.

Images share a volume only if patient, study, series and frame of reference agree. An identifier
that is empty says nothing, so without a Study or Series Instance UID the folder and every
series-level attribute must agree as well. An identifier that repeats (a constant written by an
anonymiser) is found by what must be unique under it: one SOP Instance UID, or one Instance
Number, at two places.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from plinth.verticals.medical.dicom.elements import SEPARATE
from plinth.verticals.medical.dicom.geometry import SAME_PLACE_MM
from plinth.verticals.medical.dicom.header import Frame
from plinth.verticals.medical.volumes.volume import Issue

SAME_DIRECTION, SAME_SPACING = 2e-3, 2e-3
"""Largest difference of a direction cosine, and of a pixel spacing in mm, within one stack."""


@dataclass(frozen=True)
class Group:
    """Images of one claimed identity, kind, orientation and pixel spacing.

    Args:
        frames: the images.
        trusted: their identifiers are complete and not contradicted by the images.
        notes: what was found about their identity.
        problem: why they cannot be told apart and make no volume, or ``None``.
    """

    frames: tuple[Frame, ...]
    trusted: bool = True
    notes: tuple[Issue, ...] = ()
    problem: str | None = None


def group(frames: Iterable[Frame]) -> list[Group]:
    """Groups of images that may share a volume; no image is in two groups."""
    ordered = sorted(frames, key=_order)
    found: list[Group] = []
    for claimed in _by(ordered, identity):
        for parallel in _by_plane(claimed):
            found += _checked(parallel)
    return found


def identity(frame: Frame) -> tuple[Hashable, ...]:
    """What must be equal for two images to be of one series (PS3.3 C.7.1 to C.7.4) and kind."""
    header = frame.header
    complete = bool(header.study_uid and header.series_uid)
    return (
        header.patient,
        header.study_uid,
        header.series_uid,
        header.frame_of_reference,
        () if complete else (header.source.folder, header.origin),
        header.modality,
        frame.kind,
        header.rows,
        header.columns,
        header.sop_class,
        header.samples,
        header.photometric,
        frame.placed,
    )


def _by(frames: Sequence[Frame], key: Callable[[Frame], Hashable]) -> list[list[Frame]]:
    groups: dict[Hashable, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(key(frame), []).append(frame)
    return list(groups.values())


# -- orientation and spacing -----------------------------------------------------------------
def _by_plane(frames: list[Frame]) -> list[list[Frame]]:
    """Directions and spacings are compared with tolerance: headers are rounded."""
    clusters: list[list[Frame]] = []
    for frame in frames:
        home = next((cluster for cluster in clusters if _parallel(cluster[0], frame)), None)
        if home is None:
            clusters.append([frame])
        else:
            home.append(frame)
    return clusters


def _order(frame: Frame) -> tuple[tuple[float, ...], tuple[str, int, str]]:
    return (*(frame.orientation or ()), *(frame.spacing or ())), frame.key


def _parallel(one: Frame, other: Frame) -> bool:
    turned = _largest(one.orientation, other.orientation)
    return turned < SAME_DIRECTION and _largest(one.spacing, other.spacing) < SAME_SPACING


def _largest(one: tuple[float, ...] | None, other: tuple[float, ...] | None) -> float:
    pairs = zip(one or (), other or (), strict=False)
    return max((abs(a - b) for a, b in pairs), default=0.0)


# -- trust -----------------------------------------------------------------------------------
def _checked(frames: list[Frame]) -> list[Group]:
    """The group as it is, or by folder where its identifiers contradict the images."""
    header = frames[0].header
    complete = bool(header.study_uid and header.series_uid)
    if not _contradicted(frames):
        return [Group(tuple(frames), complete, () if complete else (_incomplete(frames),))]
    folders = _by(frames, lambda frame: frame.header.source.folder)
    groups = []
    for part in folders:
        if _contradicted(part):
            groups.append(Group(tuple(part), False, (), _CONTRADICTION))
        else:
            groups.append(Group(tuple(part), False, (_repeated(len(folders)),)))
    return groups


_CONTRADICTION = (
    "images that carry one SOP Instance UID or Instance Number lie at different places: these "
    "are several series under one set of identifiers"
)


def _contradicted(frames: Sequence[Frame]) -> bool:
    """One SOP Instance UID, or one Instance Number of one acquisition, lies at two places.

    Numbers that are all equal or absent say nothing; copies of an image lie at one place.
    """
    single = [frame for frame in frames if frame.header.frames == 1 and frame.placed]
    numbers = {frame.header.instance_number for frame in single}
    if _at_two_places(single, lambda frame: frame.header.sop_uid or None):
        return True
    repeat = len(numbers - {None}) > 1 and _at_two_places(single, _number)
    return repeat or _folders_overlap(single)


def _folders_overlap(frames: Sequence[Frame]) -> bool:
    """Several folders overlap in space and are no even, numbered sequence together."""
    stacks = _by(frames, lambda frame: frame.header.source.folder)
    boxes = [np.array([frame.position for frame in stack], float) for stack in stacks]
    overlap = any(
        bool((one.min(axis=0) <= other.max(axis=0)).all())
        and bool((other.min(axis=0) <= one.max(axis=0)).all())
        for one, other in combinations(boxes, 2)
    )
    return overlap and not _one_sequence(frames)


def _one_sequence(frames: Sequence[Frame]) -> bool:
    """Instance Numbers ascend along one line in whole multiples of one step; copies count once."""
    places = {frame.header.instance_number: frame.position or () for frame in frames}
    if None in places:
        return False
    steps = np.diff(np.array([place for _, place in sorted(places.items())]), axis=0)
    if not len(steps):
        return True
    length = np.linalg.norm(steps, axis=1)
    step = steps[int(np.argsort(length)[len(length) // 2])]
    times = steps @ step / (step @ step)
    off = np.linalg.norm(steps - np.rint(times)[:, None] * step, axis=1)
    return bool((np.rint(times) >= 1).all() and off.max() <= max(0.02, 0.01 * length.min()))


def _number(frame: Frame) -> Hashable | None:
    """Instance Number within what may number its images anew."""
    number = frame.header.instance_number
    if number is None:
        return None
    return (number, *(frame.marks.get(mark) for mark in ("AcquisitionNumber", *SEPARATE)))


def _at_two_places(frames: Sequence[Frame], key: Callable[[Frame], Hashable | None]) -> bool:
    places: dict[Hashable, tuple[float, ...]] = {}
    for frame in frames:
        name, place = key(frame), frame.position or ()
        if name is None:
            continue
        first = places.setdefault(name, place)
        if _largest(first, place) > SAME_PLACE_MM:
            return True
    return False


def _incomplete(frames: Sequence[Frame]) -> Issue:
    header = frames[0].header
    names = {"Study": header.study_uid, "Series": header.series_uid}
    empty = " and ".join(name for name, uid in names.items() if not uid)
    return Issue(
        "identity", f"{empty} Instance UID are empty: taken for one series by folder and headers"
    )


def _repeated(folders: int) -> Issue:
    return Issue(
        "identity",
        f"other images carry the same identifiers in {folders - 1} more "
        f"folder{'s' * (folders > 2)}: folders are kept apart",
    )
