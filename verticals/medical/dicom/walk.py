"""The files below a path, each with why it is no image where it is none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydicom import Dataset

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.header import Frame, read_frames
from plinth.verticals.medical.source import (
    DEFAULT_LIMITS,
    MALFORMED,
    Limits,
    Source,
    damaged,
    open_archive,
)


@dataclass(frozen=True, slots=True)
class Ignored:
    """A file that belongs to no series.

    Args:
        name: the file.
        reason: why, such as ``"not DICOM"``.
        damaged: it is DICOM, but cannot be read: an image may be missing from a series.
        folder: where it lies, to tell which series may miss it.
        code: the reason in a word.
        series: Series Instance UID of images that are known to be missing.
        count: how many of them are.
    """

    name: str
    reason: str
    damaged: bool = False
    folder: str = field(default="", repr=False)
    code: str = "left_out"
    series: str = field(default="", repr=False)
    count: int = 1


def sources(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """Every file below a path, or that an archive or a DICOMDIR holds, in a fixed order.

    Args:
        path: a folder, a zip archive, a DICOMDIR or a file.
        limits: bounds on archives and indices.

    Raises:
        InputError: no such path, or an archive that is refused.
    """
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
        yield from _archived(path, limits)
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
    _first_time(folder, seen)
    unread: list[OSError] = []
    for here, folders, names in os.walk(folder, followlinks=True, onerror=unread.append):
        yield from _unreadable(unread)
        folders[:] = [name for name in sorted(folders) if _first_time(Path(here, name), seen)]
        if not folders and not names:
            yield Ignored(here, "an empty folder", code="empty")
        for name in sorted(names):
            if name.upper() == "DICOMDIR":
                yield from _indexed(Path(here, name), limits)
            else:
                yield from _held(Path(here, name), limits)
    yield from _unreadable(unread)


def _held(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """What lies at a path inside a folder: a file, the members of an archive, or nothing."""
    try:
        regular = path.is_file()
    except OSError as error:  # in a folder that may be listed, and not entered
        reason = f"the file cannot be read: {error.strerror}"
        yield Ignored(str(path), reason, True, str(path.parent), "unreadable")
        return
    if not regular:
        yield Ignored(str(path), "not a regular file", code="not_a_file")
    elif _is_zip(path):
        yield from _members(path, limits)
    else:
        yield Source(path)


def _unreadable(errors: list[OSError]) -> Iterator[Ignored]:
    """The folders that could not be listed since this was last asked."""
    for error in errors:
        reason = f"the folder cannot be read: {error.strerror}"
        yield Ignored(str(error.filename), reason, damaged=True, code="unreadable")
    errors.clear()


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
        yield from _archived(path, limits)
    except InputError as error:
        yield Ignored(str(path), error.message, True, str(path.parent), error.reason)


def _archived(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """The members of an archive; an index among them tells first of those that are not there."""
    members = open_archive(path, limits)
    names = {(one.member or "").replace("\\", "/").casefold() for one in members}
    for one in members:
        if PurePosixPath(one.member or "").name.upper() == "DICOMDIR":
            yield from _absent(one.name, lost_of(one, names, limits))
    yield from members


def _directory(path: Path, limits: Limits) -> Iterator[Source | Ignored]:
    """The files that a DICOMDIR refers to, never outside its folder."""
    root = path.parent.resolve()
    for one in listed(path, limits):
        if one.path is None:
            yield Ignored(str(path), "the DICOMDIR names what no file is called", True, str(root))
        elif not one.path.is_relative_to(root):
            reason = "the DICOMDIR points outside its folder"
            yield Ignored(one.reference, reason, True, code="outside")
        elif not one.here:
            reason = "listed in the DICOMDIR but absent"
            yield Ignored(str(one.path), reason, True, code="absent", series=one.series)
        else:
            yield Source(one.path)


def _indexed(path: Path, limits: Limits) -> Iterator[Ignored]:
    """A DICOMDIR in a folder: not itself read, but it tells of files that are not here."""
    yield Ignored(str(path), "an index; the files themselves are walked", code="index")
    yield from _absent(str(path), lost(path, limits))


def _absent(index: str, lost_images: Counter[str]) -> Iterator[Ignored]:
    for series, count in lost_images.items():
        reason = f"{count} images that it lists of a series are absent, others of it are here"
        yield Ignored(index, reason, True, code="absent", series=series, count=count)


# -- what a DICOMDIR lists (PS3.10 8.5, PS3.3 F) ---------------------------------------------
@dataclass(frozen=True, slots=True)
class Listed:
    """A file that a DICOMDIR refers to.

    Args:
        reference: Referenced File ID, as it stands there.
        path: where it would lie, ``None`` where that is no name of a file.
        series: Series Instance UID of the record above it, empty where there is none.
    """

    reference: str
    path: Path | None
    series: str

    @property
    def here(self) -> bool:
        """There is such a file."""
        return self.path is not None and self.path.is_file()


def listed(index: Path, limits: Limits) -> Iterator[Listed]:
    """The files of a DICOMDIR in its order, wherever they would lie.

    Args:
        index: the DICOMDIR.
        limits: ``files`` bounds its records.

    Raises:
        InputError: it cannot be read, or has too many records.
    """
    root = index.parent.resolve()
    for parts, series in _references(Source(index), limits):
        try:
            path = _spelt(root, parts).resolve()
            path.is_file()
        except MALFORMED:  # a null byte, say, or a name that is too long
            yield Listed("", None, series)
            continue
        yield Listed("/".join(parts), path, series)


def lost(index: Path, limits: Limits) -> Counter[str]:
    """How many files that a DICOMDIR lists are absent, by series of which others are here."""
    try:
        return _lost((one.here, one.series) for one in listed(index, limits))
    except InputError:  # what lies beside it is read without it
        return Counter()


def lost_of(index: Source, names: set[str], limits: Limits) -> Counter[str]:
    """The same of an archive that holds its DICOMDIR.

    Args:
        index: the member.
        names: of all members, in lower case.
        limits: ``files`` bounds its records.
    """
    root = PurePosixPath((index.member or "").replace("\\", "/")).parent
    try:
        found = _references(index, limits)
        return _lost(
            (str(root.joinpath(*parts)).casefold() in names, series) for parts, series in found
        )
    except InputError:
        return Counter()


def _lost(found: Iterable[tuple[bool, str]]) -> Counter[str]:
    absent, here = Counter[str](), set[str]()
    for there, series in found:
        if there:
            here.add(series)
        elif series:
            absent[series] += 1
    return Counter({series: count for series, count in absent.items() if series in here})


def _references(index: Source, limits: Limits) -> Iterator[tuple[list[str], str]]:
    """The parts of each Referenced File ID, and the Series Instance UID of the record above it."""
    try:
        records = list(index.dataset(pixels=False).get("DirectoryRecordSequence") or [])
        owner = _owners(records)
    except MALFORMED as error:
        raise damaged(index, error) from None
    if len(records) > limits.files:
        raise InputError(
            f"{index.name} has {len(records)} records, at most {limits.files} are read",
            field=index.name,
            hint="give a folder of one study or patient",
            reason="too_many_files",
        )
    for record in records:
        try:
            reference = record.get("ReferencedFileID")
        except MALFORMED:
            reference = "\0"  # no file is called so
        if reference:
            parts = [reference] if isinstance(reference, str) else [str(part) for part in reference]
            yield parts, owner.get(_place(record), "")


def _owners(records: list[Dataset]) -> dict[int, str]:
    """Series Instance UID of the records below each series record, by their place in the file."""
    found = {_place(record): record for record in records}
    owner: dict[int, str] = {}
    for record in records:
        uid = str(record.get("SeriesInstanceUID") or "")
        below = _offset(record, "OffsetOfReferencedLowerLevelDirectoryEntity") if uid else 0
        while below in found and below not in owner:
            owner[below] = uid
            below = _offset(found[below], "OffsetOfTheNextDirectoryRecord")
    return owner


def _place(record: Any) -> int:
    return int(getattr(record, "seq_item_tell", None) or -1)


def _offset(record: Dataset, keyword: str) -> int:
    value = record.get(keyword)
    return value if isinstance(value, int) else 0


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


# -- images ----------------------------------------------------------------------------------
def read_images(found: Source | Ignored) -> list[Frame] | Ignored:
    """The images of a file, one or more, or why there are none."""
    if isinstance(found, Ignored):
        return found
    try:
        images = read_frames(found)
    except InputError as error:
        lost = error.reason == "empty_file" and _called_an_image(found)
        if error.reason in ("not_dicom", "empty_file") and not lost:
            return Ignored(found.name, "not DICOM", folder=found.folder, code="not_dicom")
        return Ignored(found.name, error.message, True, found.folder, "damaged")
    return images or Ignored(
        found.name, "DICOM without an image", folder=found.folder, code="no_image"
    )


def _called_an_image(source: Source) -> bool:
    """By its name; an empty file of that name was to become one."""
    return Path(source.member or source.path).suffix.lower() in (".dcm", ".ima")


def files_of(place: Path) -> Iterator[Source | Ignored]:
    """The files of one folder, or the members of one archive, without going deeper."""
    if not place.is_dir():
        yield from sources(place, DEFAULT_LIMITS)
        return
    for path in sorted(place.iterdir()):
        with suppress(OSError):  # of which the walk has told
            if path.is_file():
                yield Source(path)
