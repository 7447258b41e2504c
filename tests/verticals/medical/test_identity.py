"""Whose images are in a volume: never two patients', studies', series' or stacks' at once."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from plinth.engine import InputError
from plinth.verticals.medical.dicom.discover import Series, discover
from plinth.verticals.medical.dicom.loader import load_volume

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from dicom_faults import check_identities

Write = Callable[..., Path]
Edit = Callable[..., None]
Scrub = Callable[[pydicom.Dataset, int], None]
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def cohort(write: Write, edit: Edit, scrub: Scrub, folders: tuple[str, str] = ("a", "b")) -> Path:
    """Stacks of two patients, the second half a step higher; ``scrub`` gets (image, stack)."""
    for stack, folder in enumerate(folders):

        def change(image: pydicom.Dataset, _: int, stack: int = stack) -> None:
            image.ImagePositionPatient[2] += 2.5 * stack
            scrub(image, stack)

        made = write(f"made-{stack}", seed=stack + 1)
        edit(made, change)
        target = made.parent / "cohort" / folder
        target.mkdir(parents=True, exist_ok=True)
        for path in made.glob("*.dcm"):
            shutil.move(path, target / f"{stack}-{path.name}")
    return made.parent / "cohort"


def blank(*names: str) -> Scrub:
    return lambda image, stack: [setattr(image, name, "") for name in names] and None


def same(*names: str) -> Scrub:
    return lambda image, stack: [setattr(image, name, "1.2.3") for name in names] and None


def everything(image: pydicom.Dataset, stack: int) -> None:
    for name in (*UIDS, "PatientID", "PatientName"):
        setattr(image, name, "")


def apart(found: list[Series], expected: Any) -> None:
    """Both stacks load, each as it was written, under ids of their own."""
    assert len({one.id for one in found}) == 2
    loaded = sorted((load_volume(one) for one in found), key=lambda volume: volume.origin[2])
    for seed, volume in enumerate(loaded, start=1):
        assert np.array_equal(volume.voxels, expected(seed=seed))


@pytest.mark.parametrize(
    "scrub",
    [
        pytest.param(blank("SeriesInstanceUID", "FrameOfReferenceUID"), id="no series UID"),
        pytest.param(blank(*UIDS), id="no UIDs"),
        pytest.param(everything, id="no UIDs and no patient"),
        pytest.param(same("SeriesInstanceUID", "FrameOfReferenceUID"), id="one series UID"),
        pytest.param(same(*UIDS), id="one UID for all"),
        pytest.param(same(*UIDS, "PatientID", "PatientName"), id="one UID, one patient"),
    ],
)
def test_two_patients_are_two_volumes(
    write: Write, edit: Edit, expected: Any, scrub: Scrub
) -> None:
    apart(discover(cohort(write, edit, scrub)), expected)


def test_patients_in_one_folder_are_told_apart_by_who_they_are(
    write: Write, edit: Edit, expected: Any
) -> None:
    folder = cohort(write, edit, same(*UIDS), folders=("a", "a"))
    apart(discover(folder), expected)


def test_stacks_in_one_folder_that_nothing_names_are_refused(write: Write, edit: Edit) -> None:
    """Every image number lies at two places: two series, and nobody can say which is whose."""
    folder = cohort(write, edit, same(*UIDS, "PatientID", "PatientName"), folders=("a", "a"))
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    assert refusal.value.reason == "not_a_volume"
    assert "several series under one set of identifiers" in str(refusal.value)


def test_scrubbed_studies_of_two_runs_have_outputs_of_their_own(write: Write, edit: Edit) -> None:
    folder = cohort(write, edit, everything)
    (first,), (second,) = (discover(folder / name) for name in ("a", "b"))
    assert first.id != second.id


def test_a_series_that_two_names_share_is_said_not_to_be_whole(write: Write, edit: Edit) -> None:
    """A name that was corrected while the images came: two halves, each as if it were all."""

    def corrected(image: pydicom.Dataset, k: int) -> None:
        image.PatientName = "Phantom^Chest^Corrected" if k > 4 else image.PatientName

    folder = write()
    edit(folder, corrected)
    halves = discover(folder)
    assert [len(one.frames) for one in halves] == [5, 5]
    for one in halves:
        (issue,) = load_volume(one).verdict.issues
        assert issue.kind == "identity"
        assert "it is not whole" in issue.message
        assert "Phantom" not in issue.message


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("ISO_IR 100", "ISO_IR 192", "Müller^Jörg"),
        ("GB18030", "ISO_IR 192", "Wang^XiaoDong=王^小东"),
        (["", "ISO 2022 IR 87"], "ISO_IR 192", "Yamada^Tarou=山田^太郎"),
        (["", "ISO 2022 IR 149"], "ISO_IR 192", "Hong^Gildong=洪^吉洞=홍^길동"),
    ],
)
def test_a_name_in_two_character_sets_is_one_patient(
    write: Write, edit: Edit, one: str | list[str], other: str, name: str
) -> None:
    """A router that rewrote some of the images parts no series."""

    def rewritten(image: pydicom.Dataset, k: int) -> None:
        image.SpecificCharacterSet = other if k % 2 else one
        image.PatientName = name

    folder = write()
    edit(folder, rewritten)
    (series,) = discover(folder)
    assert len(series.frames) == 10
    assert load_volume(series).verdict.issues == ()


def test_empty_uids_are_said(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, everything)
    volume = load_volume(folder, strict=True)
    assert volume.verdict.ok
    (issue,) = volume.verdict.issues
    assert issue.kind == "identity"
    assert "Study and Series Instance UID are empty" in issue.message


def test_a_series_spread_over_folders_is_one(write: Write, expected: Any) -> None:
    """As media with a few images to a folder, or a store that files images by hash."""
    folder = write()
    for k, path in enumerate(sorted(folder.glob("*.dcm"))):
        target = folder / "abc"[k * 7 % 3]
        target.mkdir(exist_ok=True)
        shutil.move(path, target / path.name)
    volume = load_volume(folder, strict=True)
    assert np.array_equal(volume.voxels, expected())


def test_a_series_uid_for_every_slice_is_refused_in_a_few_words(write: Write, edit: Edit) -> None:
    folder = write()
    edit(folder, lambda image, k: setattr(image, "SeriesInstanceUID", f"1.2.3.{k + 1}"))
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    assert refusal.value.reason == "several_series"
    assert "each has a series of its own" in str(refusal.value)
    assert len(str(refusal.value)) < 900


def test_no_folder_of_empty_equal_or_swapped_identifiers_is_merged_wrongly() -> None:
    """100,000 of them: ``python benchmarks/dicom_faults.py``."""
    told = check_identities(2000, seed=random.Random(3).randrange(1000))
    assert told["wrong"] == []
