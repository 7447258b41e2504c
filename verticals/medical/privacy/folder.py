"""A folder of images, de-identified into another one, file by file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plinth.engine import InputError
from plinth.verticals.medical.dicom.walk import Ignored, sources
from plinth.verticals.medical.privacy.deidentify import Counts, Deidentifier
from plinth.verticals.medical.source import DEFAULT_LIMITS, Source


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one file.

    Args:
        source: the file; its name may say whose it is, so this is for nobody but its owner.
        state: ``"written"``, ``"refused"`` (an image that may not be copied, or no image),
            ``"failed"`` (damaged) or ``"skipped"`` (not DICOM).
        output: relative to the output folder; empty unless written.
        reason: in a word, unless written.
        message: in a sentence that holds no value and no name of the file.
        counts: what was done to its attributes.
    """

    source: str
    state: Literal["written", "refused", "failed", "skipped"]
    output: str = ""
    reason: str = ""
    message: str = ""
    counts: Counts | None = None


def deidentify(folder: Path, out: Path, cleaner: Deidentifier) -> Iterator[Row]:
    """Write a de-identified copy of each CT, MR and PET image below a folder.

    Args:
        folder: folder, zip archive, DICOMDIR or file.
        out: a folder; files appear in it whole or not at all, none is ever replaced by another.
        cleaner: maps the cohort.

    Raises:
        InputError: no such folder.
        OSError: ``out`` cannot be written to.
    """
    for found in sources(folder, DEFAULT_LIMITS):
        if isinstance(found, Ignored):
            state: Literal["failed", "skipped"] = "failed" if found.damaged else "skipped"
            yield Row(found.name, state, reason=found.code, message="no image")
        else:
            yield _one(found, out, cleaner)


def _one(source: Source, out: Path, cleaner: Deidentifier) -> Row:
    try:
        cleaned = cleaner.clean(source)
    except InputError as error:
        if error.reason == "not_dicom":
            return Row(source.name, "skipped", "", error.reason, "not DICOM")
        damaged = error.reason in ("damaged", "unreadable")
        told = "it cannot be read whole" if damaged else error.message
        return Row(source.name, "failed" if damaged else "refused", "", error.reason, told)
    encoded = io.BytesIO()
    cleaned.dataset.save_as(encoded, enforce_file_format=True)
    name = f"{cleaned.folder}/{cleaned.dataset.SOPInstanceUID[-16:]}"
    output = _written(out, name, encoded.getvalue())
    return Row(source.name, "written", output, counts=cleaned.counts)


def _written(out: Path, name: str, data: bytes) -> str:
    """Write a file under a name of its own; the same image, found again, is one file."""
    for number in range(1, 1000):
        output = f"{name}{'' if number == 1 else f'-{number}'}.dcm"
        path = out / output
        if path.exists():
            if path.read_bytes() == data:
                return output
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{os.getpid()}")
        try:
            partial.write_bytes(data)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        return output
    raise InputError("a thousand different images of one SOP Instance UID", reason="same_uid")
