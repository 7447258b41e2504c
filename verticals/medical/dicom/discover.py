"""Find the image series below a folder, in a zip archive or behind a DICOMDIR."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from plinth.verticals.medical.dicom.grouping import Group, group
from plinth.verticals.medical.dicom.header import Frame, Header
from plinth.verticals.medical.dicom.split import split
from plinth.verticals.medical.dicom.walk import Ignored, files_of, read_images, sources
from plinth.verticals.medical.source import DEFAULT_LIMITS, Limits, Source
from plinth.verticals.medical.volumes.volume import Issue

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"


@dataclass(frozen=True)
class Series:
    """Images that may form one volume.

    Same patient, study, series, frame of reference, orientation, rows, columns, pixel spacing and
    SOP class (see :mod:`grouping`); a series whose positions repeat (4D, phases, echoes) is
    several of these.

    Args:
        id: stable, short, free of personal data; a choice for ``load(path, series=...)``.
        modality: Modality.
        frames: the images, in a fixed order that is not the spatial one.
        part: what tells this part of a repeating series from its siblings.
        notes: what was found while grouping; goes into the volume's verdict.
        problem: why it cannot become a volume, or ``None``.
    """

    id: str
    modality: str
    frames: tuple[Frame, ...] = field(repr=False)
    part: str | None = None
    notes: tuple[Issue, ...] = ()
    problem: str | None = None

    @property
    def uid(self) -> str:
        """Series Instance UID."""
        return self.frames[0].header.series_uid

    @property
    def study_uid(self) -> str:
        """Study Instance UID."""
        return self.frames[0].header.study_uid

    def same_series(self, other: Series) -> bool:
        """Both claim one Series Instance UID of one study and one patient."""
        mine, other_header = self.frames[0].header, other.frames[0].header
        return bool(mine.series_uid) and all(
            getattr(mine, name) == getattr(other_header, name)
            for name in ("series_uid", "study_uid", "patient")
        )

    @property
    def localiser(self) -> bool:
        """A scout or localiser image."""
        return any(kind in ("LOCALIZER", "SCOUT") for kind in self.frames[0].header.image_type)

    @property
    def volumetric(self) -> bool:
        """Two or more placed images that are no localiser."""
        return self.problem is None and len(self.frames) > 1 and not self.localiser

    def describe(self) -> str:
        """One line for a list: id, end of the UID, modality, images, size; no free text."""
        header = self.frames[0].header
        uid = f"UID ...{self.uid[-8:]}" if self.uid else "no Series Instance UID"
        part = f", {self.part}" if self.part else ""
        kind = ", localiser" if self.localiser else ""
        problem = f", not loadable: {self.problem}" if self.problem else ""
        return (
            f"{self.id} ({uid}): {self.modality or 'no modality'}, "
            f"{_images(len(self.frames))} of {header.columns} x {header.rows}{kind}{part}{problem}"
        )


@dataclass(frozen=True)
class Scan:
    """All that was found below a path.

    Args:
        series: the series, largest first.
        ignored: the files left out, each with a reason.
    """

    series: tuple[Series, ...]
    ignored: tuple[Ignored, ...]


def discover(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> list[Series]:
    """The image series below ``path``, largest first; headers only are read.

    Args:
        path: a folder (walked), a zip archive (never unpacked to disk), a DICOMDIR or a file.
        limits: bounds on what is walked and unpacked.

    Raises:
        InputError: no such path, or an archive that is refused.
    """
    return list(scan(path, limits).series)


def scan(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Scan:
    """As :func:`discover`, with the files that were left out and why."""
    series: list[Series] = []
    ignored: list[Ignored] = []
    for one in survey(path, limits, settled=None):
        if isinstance(one, Ignored):
            ignored.append(one)
        else:
            series.append(one.series)
    return Scan(tuple(sorted(series, key=lambda one: (-len(one.frames), one.id))), tuple(ignored))


# -- while the walk goes on --------------------------------------------------------------------
SETTLED = 300
"""Files read since a study's last image after which it counts as complete."""


DAMAGED = 20
"""Damaged files of one folder that a verdict names, at most."""


@dataclass(frozen=True)
class Found:
    """A series, complete as far as is known.

    Args:
        series: to load, or the reason why not.
        replaces: ids of series that were told before and are no longer right.
    """

    series: Series
    replaces: tuple[str, ...] = ()


@dataclass(slots=True)
class _Study:
    """Images of one study that were not told yet; and where those lie that were."""

    frames: list[Frame] = field(default_factory=list)
    last: int = 0


@dataclass(slots=True)
class _Told:
    """What was told of a study: what each series was like, by id, and the folders it lies in."""

    series: dict[str, Hashable]
    folders: frozenset[Path]


def survey(
    path: str | Path, limits: Limits = DEFAULT_LIMITS, settled: int | None = SETTLED
) -> Iterator[Found | Ignored]:
    """Series and files left out, as soon as they are known; headers only are read.

    Series are told study by study. A study counts as complete when ``settled`` files have been read
    since its last image, or the walk has ended. Images of a study that come later still are told at
    the end, together with those told before: what was told too early is named as replaced, and
    from the first such study on nothing more is told before the end.

    Args:
        path: a folder (walked), a zip archive (never unpacked to disk), a DICOMDIR or a file.
        limits: bounds on what is walked and unpacked.
        settled: files after which a study counts as complete; ``None``: at the end of the walk.

    Raises:
        InputError: no such path, or an archive that is refused.
    """
    path = Path(path)
    yield from _Survey(settled if path.is_dir() else None).over(sources(path, limits))


class _Survey:
    def __init__(self, settled: int | None) -> None:
        self._settled = settled
        self._open: dict[Hashable, _Study] = {}  # the one whose last image is oldest comes first
        self._told: dict[Hashable, _Told] = {}
        self._ids: set[str] = set()
        self._damaged: dict[str, list[str]] = {}
        self._absent = Counter[str]()  # images of a series that an index lists
        self._owner: dict[int, str] = {}  # of each series: whose first image it was
        self._shared: set[int] = set()
        self._scattered = False

    def over(self, found: Iterable[Source | Ignored]) -> Iterator[Found | Ignored]:
        for number, one in enumerate(found):
            read = read_images(one)
            if isinstance(read, Ignored):
                self._note(read)
                yield read
                continue
            self._claim(read[0].header)
            key = study_of(read[0])
            study = self._open.pop(key, None) or _Study()
            study.frames += read
            study.last = number
            self._open[key] = study
            self._scattered = self._scattered or key in self._told
            if self._settled is not None and not self._scattered:
                yield from self._complete(number - self._settled)
        yield from self._rest()

    def _note(self, ignored: Ignored) -> None:
        """Keep the first damaged files of each folder: a series may miss them."""
        known = ignored.damaged and not ignored.series
        reasons = self._damaged.setdefault(ignored.folder, []) if known else []
        reasons += [ignored.reason] * (len(reasons) < DAMAGED)
        if ignored.series:
            self._absent[ignored.series] += ignored.count

    def _claim(self, header: Header) -> None:
        """Note whose a series is by its identifiers, and that others claim it too."""
        if header.study_uid and header.series_uid:
            claimed = hash((header.study_uid, header.series_uid))
            if self._owner.setdefault(claimed, header.patient) != header.patient:
                self._shared.add(claimed)

    def _beyond(self, one: Series) -> Iterator[Issue]:
        """What other studies' images and an index tell of a series."""
        header = one.frames[0].header
        if hash((header.study_uid, header.series_uid)) in self._shared:
            text = (
                "images of another patient ID, name or birth date carry the same Study and Series "
                "Instance UID and are not in this volume: if it is one patient, it is not whole"
            )
            yield Issue("identity", text)
        absent = self._absent.get(header.series_uid, 0)
        if absent:
            text = f"of this series the DICOMDIR lists more images that are absent: {absent}"
            yield Issue("partial", text)

    def _complete(self, before: int) -> Iterator[Found]:
        """Tell the studies whose last image came before a file."""
        while self._open:
            key, study = next(iter(self._open.items()))
            if study.last >= before:
                return
            del self._open[key]
            yield from self._tell(key, study.frames)

    def _rest(self) -> Iterator[Found]:
        late = {key for key in self._open if key in self._told}
        again = frozenset[Path]().union(*(self._told[key].folders for key in late))
        known = {frame.header.source for key in late for frame in self._open[key].frames}
        for folder in sorted(again):
            for source in files_of(folder):
                read = read_images(source)
                if isinstance(read, Ignored) or source in known:
                    continue
                if study_of(read[0]) in late:
                    self._open[study_of(read[0])].frames += read
        for key, study in self._open.items():
            yield from self._tell(key, study.frames)

    def _tell(self, key: Hashable, frames: list[Frame]) -> Iterator[Found]:
        before = self._told[key].series if key in self._told else {}
        self._ids -= set(before)
        noted = _noted(frames, self._damaged, self._ids)
        series = [replace(one, notes=(*one.notes, *self._beyond(one))) for one in noted]
        self._ids |= {one.id for one in series}
        now: dict[str, Hashable] = {one.id: (len(one.frames), one.notes) for one in series}
        wrong = tuple(name for name, how in before.items() if now.get(name) != how)
        self._told[key] = _Told(now, frozenset(Path(f.header.source.folder) for f in frames))
        for one in series:
            if before.get(one.id) != now[one.id]:
                yield Found(one, wrong)
                wrong = ()


def study_of(frame: Frame) -> Hashable:
    """What images have in common that may influence one another's series."""
    header = frame.header
    if header.study_uid and header.series_uid:
        return hash((header.patient, header.study_uid))
    return hash((header.patient, header.study_uid, header.source.folder))


# -- series ----------------------------------------------------------------------------------
def _series(group: Group) -> Iterator[Series]:
    frames = list(group.frames)
    if not frames[0].placed:
        yield _one(frames, None, group, _unplaced(frames[0]))
        return
    for part in split(frames):
        one = _one(list(part.frames), part.label, group, group.problem)
        said = () if part.label is None else (_several(part.label),)
        yield replace(one, notes=(*one.notes, *said, *part.notes))


def _several(label: str) -> Issue:
    """Which of the volumes that share one series this is; they are numbered by ascending value."""
    return Issue("part", f"one series holds several volumes: this is {label}")


def _one(frames: list[Frame], part: str | None, group: Group, problem: str | None) -> Series:
    first = frames[0]
    header = first.header
    plane = (*(first.orientation or ()), *(first.spacing or ()))
    parts = (
        header.patient,
        header.study_uid,
        header.series_uid,
        header.frame_of_reference,
        tuple(round(value, 4) + 0.0 for value in plane),
        header.rows,
        header.columns,
        header.sop_class,
        header.photometric,
        part,
        min(frame.header.sop_uid for frame in frames),
        () if group.trusted else _content(frames),
    )
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
    return Series(
        digest, header.modality, tuple(frames), part, group.notes, problem or _unfit(frames)
    )


def _content(frames: list[Frame]) -> tuple[object, ...]:
    """What stands in for UIDs that cannot be trusted: places, and pixels of the middle image."""
    ordered = sorted(frames, key=lambda frame: (frame.position or (), frame.key))
    header = ordered[len(ordered) // 2].header
    with header.source.open() as (stream, size):
        stream.seek(min(header.offset, size))
        pixels = stream.read(min(header.length, 1 << 20))
    return ordered[0].position, len(ordered), hashlib.blake2b(pixels).hexdigest()


def _unplaced(frame: Frame) -> str:
    """What an image does not say of its place."""
    said = {
        "position": frame.position,
        "orientation": frame.orientation,
        "pixel spacing": frame.spacing,
    }
    *others, last = (name for name, value in said.items() if value is None)
    return f"no {', '.join(others)} or {last}" if others else f"no {last}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _unfit(frames: list[Frame]) -> str | None:
    """Why images that are placed still cannot be read as scalars: the first reason."""
    headers = {id(frame.header): frame.header for frame in frames}.values()
    return next(filter(None, map(_unfit_header, headers)), None)


def _unfit_header(header: Header) -> str | None:
    if header.modality in ("SEG", "RTDOSE") or header.sop_class == PARAMETRIC_MAP:
        return "not a scan but something derived from one"
    if header.samples != 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return f"colour images ({header.photometric})"
    if header.unsaid:
        return f"no {' or '.join(header.unsaid)}, without which stored bits are no values"
    if header.floating or header.bits_allocated not in (8, 16, 32):
        return f"{header.bits_allocated}-bit {'floating ' * header.floating}pixels"
    if header.modality_lut:
        return "a Modality LUT Sequence instead of a rescale slope"
    if "MOSAIC" in header.image_type:
        return "a mosaic, all slices of a volume side by side in one image"
    return None


def series_of(frames: Sequence[Frame]) -> list[Series]:
    """The series that images belong to, by what they say of themselves; no id repeats."""
    return list(_told_apart([one for found in group(frames) for one in _series(found)], set()))


def _told_apart(series: Sequence[Series], taken: set[str]) -> Iterator[Series]:
    """Copies of one series without trustworthy UIDs get ids by their folders."""
    seen = set(taken)
    for one in series:
        if one.id in seen:
            where = one.frames[0].header.source.folder
            digest = hashlib.blake2b(f"{one.id}\0{where}".encode(), digest_size=6).hexdigest()
            one = replace(one, id=digest)
        seen.add(one.id)
        yield one


def _noted(frames: list[Frame], damaged: dict[str, list[str]], taken: set[str]) -> list[Series]:
    """The series of one study, with what is missing or lies beside them.

    Args:
        frames: all images of the study.
        damaged: by folder, why files of it that may hold more cannot be read.
        taken: ids that others have.
    """
    found = [one for grouped in group(frames) for one in _series(grouped)]
    series, expected = list(_told_apart(found, taken)), _acquired(frames)
    parts = _parts_at_hand(frames)
    return [
        replace(
            one,
            notes=(
                *one.notes,
                *_lost(one, expected),
                *_lost_parts(one, parts),
                *_unnumbered(one, series),
                *_beside(one, series, damaged),
            ),
        )
        for one in series
    ]


# -- completeness ----------------------------------------------------------------------------
def _acquisition(frame: Frame) -> tuple[str, ...]:
    header = frame.header
    return header.patient, header.study_uid, frame.marks.get("AcquisitionNumber", "")


def _acquired(frames: list[Frame]) -> Counter[tuple[str, ...]]:
    """Images at hand of each acquisition, in whatever series (PS3.3 C.12.1.1.10)."""
    return Counter(map(_acquisition, frames))


def _lost(one: Series, acquired: Counter[tuple[str, ...]]) -> Iterator[Issue]:
    """Images that the headers announce and that are not there."""
    for name in dict.fromkeys(map(_acquisition, one.frames)):
        members = [frame for frame in one.frames if _acquisition(frame) == name]
        wanted = max(frame.header.images_in_acquisition or 0 for frame in members)
        if wanted > acquired[name]:
            text = f"{acquired[name]} of the {wanted} images that the acquisition had are here"
            yield Issue("partial", text)


def _parts_at_hand(frames: list[Frame]) -> dict[str, set[int]]:
    """The numbers of the files at hand of each concatenation."""
    found: dict[str, set[int]] = {}
    for part in {frame.header.part for frame in frames}:
        if part is not None:
            found.setdefault(part.uid, set()).add(part.number)
    return found


def _lost_parts(one: Series, at_hand: dict[str, set[int]]) -> Iterator[Issue]:
    """Files that one multi-frame image was parted into, and that are not there."""
    totals: dict[str, int] = {}
    for part in {frame.header.part for frame in one.frames}:
        if part is not None:
            totals[part.uid] = max(totals.get(part.uid, 0), part.total or 0, part.number)
    for uid, total in sorted(totals.items()):
        if len(at_hand[uid]) < total:
            text = f"{len(at_hand[uid])} of the {total} files of a parted image are here"
            yield Issue("partial", text)


def _unnumbered(one: Series, series: Sequence[Series]) -> Iterator[Issue]:
    """Instance Numbers that follow the slices and have holes, which no other image fills."""
    single = [frame for frame in one.frames if frame.header.frames == 1 and frame.placed]
    places = {frame.header.instance_number: frame.position or () for frame in single}
    numbers = sorted(number for number in places if number is not None)
    if len(numbers) < max(3, len(one.frames)) or not _along_a_line([places[n] for n in numbers]):
        return
    family = [other for other in series if other is one or one.same_series(other)]
    known = {frame.header.instance_number for other in family for frame in other.frames}
    absent = numbers[-1] - numbers[0] + 1 - len(known & set(range(numbers[0], numbers[-1] + 1)))
    if absent:
        text = f"{absent} of the Instance Numbers from {numbers[0]} to {numbers[-1]} are absent"
        yield Issue("partial", text)


def _along_a_line(places: Sequence[tuple[float, ...]]) -> bool:
    """Each place lies further than the last in one direction."""
    line = np.array(places)
    depths = (line - line[0]) @ (line[-1] - line[0])
    return bool((np.diff(depths) > 0).all())


# -- what lies beside ------------------------------------------------------------------------
def _beside(one: Series, series: list[Series], damaged: dict[str, list[str]]) -> Iterator[Issue]:
    """What the same series or folder holds that is not in this volume."""
    for other in series:
        if other is one or not one.same_series(other) or other.part is not None:
            continue
        count, header = len(other.frames), other.frames[0].header
        if not other.frames[0].placed:
            text = f"without a position, left out: {_images(count)} of this series"
            yield Issue("no_position", text)
        else:
            size = f"{header.columns} x {header.rows}"
            text = f"of another orientation, size or kind, left out: {_images(count)} of {size}"
            yield Issue("mixed", text)
    for folder in sorted({frame.header.source.folder for frame in one.frames}):
        for reason in damaged.get(folder, ()):
            yield Issue("damaged", f"left out: {reason}")
