"""Find the image series below a folder, in a zip archive or behind a DICOMDIR."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydicom import Dataset

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.grouping import Group, group
from plinth.verticals.medical.dicom.header import Frame, Header, read_frames
from plinth.verticals.medical.dicom.split import split
from plinth.verticals.medical.source import DEFAULT_LIMITS, Limits, Source, open_archive
from plinth.verticals.medical.volumes.volume import Issue

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"


@dataclass(frozen=True, slots=True)
class Ignored:
    """A file that belongs to no series.

    Args:
        name: the file.
        reason: why, such as ``"not DICOM"``.
        damaged: it is DICOM, but cannot be read: an image may be missing from a series.
        folder: where it lies, to tell which series may miss it.
    """

    name: str
    reason: str
    damaged: bool = False
    folder: str = field(default="", repr=False)


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
    frames: list[Frame] = []
    ignored: list[Ignored] = []
    for found in _sources(Path(path), limits):
        if isinstance(found, Ignored):
            ignored.append(found)
            continue
        try:
            images = read_frames(found)
        except InputError as error:
            harmless = error.reason == "not_dicom"
            reason = "not DICOM" if harmless else error.message
            ignored.append(Ignored(found.name, reason, not harmless, found.folder))
            continue
        if not images:
            ignored.append(Ignored(found.name, "DICOM without an image"))
        frames += images
    series = series_of(frames)
    expected = _acquired(frames)
    noted = [
        replace(
            one,
            notes=(
                *one.notes,
                *_lost(one, expected),
                *_unnumbered(one, series),
                *_beside(one, series, ignored),
            ),
        )
        for one in series
    ]
    return Scan(tuple(sorted(noted, key=lambda one: (-len(one.frames), one.id))), tuple(ignored))


# -- files -----------------------------------------------------------------------------------
def _sources(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    if path.is_dir():
        yield from _walk(path, limits)
    elif not path.is_file():
        raise InputError(
            f"{path} does not exist",
            field=str(path),
            hint="give a folder, a zip archive, a DICOMDIR or a DICOM file",
            reason="not_found",
        )
    elif path.name.upper() == "DICOMDIR":
        yield from _directory(path, limits)
    elif _is_zip(path):
        yield from open_archive(path, limits)
    else:
        yield Source(path)


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False  # reading it as DICOM will say why it cannot be opened


def _walk(folder: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """Every file below a folder once, whatever symbolic links lead to it; archives opened."""
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _first_time(Path(here, name), seen)]
        for name in sorted(names):
            path = Path(here, name)
            if name.upper() == "DICOMDIR":
                yield Ignored(str(path), "an index; the files themselves are walked")
            elif path.is_file() and _is_zip(path):
                yield from _members(path, limits)
            elif path.is_file():
                yield Source(path)
            else:
                yield Ignored(str(path), "not a regular file")


def _first_time(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """A folder that no link led to before; a link back to where it lies would never end."""
    try:
        facts = folder.stat()
    except OSError:  # a link to nowhere: os.walk passes over it
        return True
    place = facts.st_dev, facts.st_ino
    known = place in seen
    seen.add(place)
    return not known


def _members(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """The members of an archive inside a folder; one that is refused stops nobody else."""
    try:
        yield from open_archive(path, limits)
    except InputError as error:
        yield Ignored(str(path), error.message, damaged=True, folder=str(path.parent))


def _directory(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """The files that a DICOMDIR refers to (PS3.10 8.5, PS3.3 F), never outside its folder."""
    index = Source(path).dataset(pixels=False)
    records: list[Dataset] = list(index.get("DirectoryRecordSequence") or [])
    if len(records) > limits.files:
        raise InputError(
            f"{path} has {len(records)} records, at most {limits.files} are read",
            field=str(path),
            hint="give a folder of one study or patient",
            reason="too_many_files",
        )
    root = path.parent.resolve()
    for record in records:
        reference = record.get("ReferencedFileID")
        if not reference:
            continue
        parts = [reference] if isinstance(reference, str) else [str(part) for part in reference]
        target = _spelt(root, parts).resolve()
        if not target.is_relative_to(root):
            yield Ignored("/".join(parts), "the DICOMDIR points outside its folder", damaged=True)
        elif not target.is_file():
            yield Ignored(str(target), "listed in the DICOMDIR but absent", damaged=True)
        else:
            yield Source(target)


def _spelt(root: Path, parts: list[str]) -> Path:
    """A path as it is spelt on disk: media written in capitals are often copied in lower case."""
    exact = root.joinpath(*parts)
    if exact.exists():
        return exact
    here = root
    for part in parts:
        if part in ("", ".", "..") or not here.is_dir():
            return exact
        names = (
            name
            for name in sorted(child.name for child in here.iterdir())
            if name.lower() == part.lower()
        )
        here = here / next(names, part)
    return here


# -- series ----------------------------------------------------------------------------------
def _series(group: Group) -> Iterator[Series]:
    frames = list(group.frames)
    if not frames[0].placed:
        yield _one(frames, None, group, "no position, orientation or pixel spacing")
        return
    for part in split(frames):
        one = _one(list(part.frames), part.label, group, group.problem)
        yield replace(one, notes=(*one.notes, *part.notes))


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
    if header.floating or header.bits_allocated not in (8, 16, 32):
        return f"{header.bits_allocated}-bit {'floating ' * header.floating}pixels"
    if header.modality_lut:
        return "a Modality LUT Sequence instead of a rescale slope"
    return None


def series_of(frames: Sequence[Frame]) -> list[Series]:
    """The series that images belong to, by what they say of themselves; no id repeats."""
    return list(_told_apart([one for found in group(frames) for one in _series(found)]))


def _told_apart(series: Sequence[Series]) -> Iterator[Series]:
    """Copies of one series without trustworthy UIDs get ids by their folders."""
    seen: set[str] = set()
    for one in series:
        if one.id in seen:
            where = one.frames[0].header.source.folder
            digest = hashlib.blake2b(f"{one.id}\0{where}".encode(), digest_size=6).hexdigest()
            yield replace(one, id=digest)
        else:
            seen.add(one.id)
            yield one


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
def _beside(one: Series, series: list[Series], ignored: list[Ignored]) -> Iterator[Issue]:
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
            text = f"of another orientation or size, left out: {_images(count)} of {size}"
            yield Issue("mixed", text)
    folders = {frame.header.source.folder for frame in one.frames}
    for bad in ignored:
        if bad.damaged and bad.folder in folders:
            yield Issue("damaged", f"left out: {bad.reason}")
