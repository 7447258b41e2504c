"""Series are found in folders, archives and behind a DICOMDIR, whatever lies beside them."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.fileset import FileSet

from plinth.engine.errors import InputError
from plinth.verticals.medical.dicom.discover import Found, discover, scan, survey
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.dicom.walk import Ignored
from plinth.verticals.medical.source import Limits

Write = Callable[..., Path]


def zipped(folder: Path, target: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"study/{path.relative_to(folder)}")
    return target


def test_every_series_below_a_folder_is_found(write: Write) -> None:
    root = write("root/a").parent
    write("root/deep/b", series=2, shape=(36, 30, 4))
    found = discover(root)
    assert [len(series.frames) for series in found] == [10, 4]
    assert {series.modality for series in found} == {"CT"}
    assert found[0].study_uid == found[1].study_uid


@contextmanager
def unprivileged() -> Iterator[None]:
    """Nobody's rights, where tests run with all of them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_entered_or_read_ends_nothing_else(write: Write) -> None:
    with tempfile.TemporaryDirectory() as base:  # which others than its owner may enter
        root = Path(base, "root")
        shutil.copytree(write(), root / "whole")
        for name, mode in (("listed", 0o444), ("entered", 0o111), ("closed", 0)):
            shutil.copytree(root / "whole", root / name)
            (root / name).chmod(mode)
        os.mkfifo(root / "pipe.dcm")
        (root / "zero.dcm").symlink_to("/dev/zero")
        Path(base).chmod(0o755)
        with unprivileged():
            found = scan(root)
        for name in ("listed", "entered", "closed"):
            (root / name).chmod(0o755)
    assert [len(series.frames) for series in found.series] == [10]
    codes = Counter(one.code for one in found.ignored if "truth.json" not in one.name)
    assert codes == {"unreadable": 10 + 2, "not_a_file": 2}
    assert all(one.damaged == (one.code == "unreadable") for one in found.ignored
               if "truth.json" not in one.name)  # fmt: skip


def test_a_link_back_to_the_top_shows_nothing_twice(write: Write) -> None:
    folder = write()
    (folder / "latest").symlink_to(folder)
    assert [len(series.frames) for series in discover(folder)] == [10]


def test_two_series_in_one_folder_are_never_mixed(write: Write, expected: Any) -> None:
    folder = write("one")
    for path in write("two", series=2, seed=7).glob("*.dcm"):
        shutil.copy(path, folder / f"two_{path.name}")
    with pytest.raises(InputError) as refusal:
        load_volume(folder)
    message = str(refusal.value)
    assert refusal.value.reason == "several_series"
    assert "holds 2 series" in message
    for series in discover(folder):
        assert series.id in message
        assert series.uid[-8:] in message
        assert "CT, 10 images of 36 x 30" in message
        for name in (series.id, series.uid, series.uid[-8:]):
            volume = load_volume(folder, series=name)
            assert volume.series.series_instance_uid == series.uid
            assert np.array_equal(volume.voxels, expected())
    with pytest.raises(InputError, match=r"no series of .* answer to 'nonsense'"):
        load_volume(folder, series="nonsense")


def test_nothing_personal_is_shown(write: Write, edit: Callable[..., None]) -> None:
    def name(image: pydicom.Dataset, _: int) -> None:
        image.PatientName, image.PatientID = "Secret^Name", "ID-4711"
        image.SeriesDescription = "Secret thorax"

    folder = write()
    edit(folder, name)
    volume = load_volume(folder)
    (series,) = discover(folder)
    texts = [
        series.describe(),
        repr(series),
        repr(volume),
        repr(volume.series),
        repr(series.frames),
    ]
    texts.append(str(volume.series.public()))
    for text in texts:
        assert "Secret" not in text
        assert "4711" not in text
    assert re.fullmatch(r"[0-9a-f]{12}", series.id)
    assert volume.series.headers()[0].PatientID == "ID-4711"


def test_the_id_of_a_series_depends_on_its_images_alone(write: Write, tmp_path: Path) -> None:
    folder = write("here")
    moved = tmp_path / "there"
    shutil.copytree(folder, moved)
    assert discover(folder)[0].id == discover(moved)[0].id
    assert discover(write("other", seed=8))[0].id != discover(folder)[0].id


def test_ignored_files_are_listed_with_a_reason(
    write: Write, pydicom_data: Callable[[str], Path]
) -> None:
    folder = write()
    (folder / "readme.txt").write_text("x" * 2000)
    (folder / "DICOMDIR").write_bytes(b"")
    shutil.copy(pydicom_data("reportsi.dcm"), folder / "report.dcm")
    (folder / "more.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "cut.dcm").write_bytes((folder / "slice_0001.dcm").read_bytes()[:600])
    reasons = {Path(bad.name).name: bad.reason for bad in scan(folder).ignored}
    assert reasons.pop("truth.json") == "not DICOM"
    assert reasons.pop("readme.txt") == "not DICOM"
    assert reasons.pop("report.dcm") == "DICOM without an image"
    assert "index" in reasons.pop("DICOMDIR")
    assert "cannot be read as a zip archive" in reasons.pop("more.zip")
    assert "no Rows or Columns" in reasons.pop("cut.dcm")
    assert not reasons


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("compression", ["none", "jpegls"])
def test_an_archive_loads_like_its_folder(
    write: Write, tmp_path: Path, expected: Any, method: int, compression: str
) -> None:
    archive = zipped(write(compression=compression), tmp_path / "study.zip", method)
    volume = load_volume(archive, strict=True)
    assert np.array_equal(volume.voxels, expected())
    assert volume.series.files[0] == f"{archive}:study/slice_0001.dcm"
    assert volume.series.headers()[0].Modality == "CT"


@pytest.mark.parametrize(
    "name", ["../evil.dcm", "/etc/evil.dcm", "a/../../evil", "..\\evil", "C:/x"]
)
def test_an_archive_that_points_outside_itself_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(InputError, match="points outside"):
        discover(path)
    assert sorted(tmp_path.rglob("*")) == [path]


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(files=5), "at most 5 are read"),
        (Limits(total_bytes=10_000), "at most 10000 are read"),
        (Limits(member_bytes=1_000), "at most 1000 are read"),
    ],
)
def test_archives_are_bounded(write: Write, tmp_path: Path, limits: Limits, why: str) -> None:
    archive = zipped(write(), tmp_path / "study.zip")
    with pytest.raises(InputError, match=why):
        discover(archive, limits)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    zeros = bytes(1 << 20)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb.dcm", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(zeros)
    with pytest.raises(InputError, match="times its size"):
        discover(path)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.zip"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match=re.escape("broken.zip cannot be read as a zip")):
        discover(path)


def test_archives_inside_a_folder_are_studies_like_others(
    write: Write, tmp_path: Path, expected: Any
) -> None:
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    zipped(write("one"), cohort / "one.zip")
    zipped(write("two", seed=8), cohort / "two.zip")
    (cohort / "broken.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    first, second = discover(cohort)
    assert {len(first.frames), len(second.frames)} == {10}
    assert any(np.array_equal(load_volume(one).voxels, expected()) for one in (first, second))


def test_more_archives_than_may_be_open_are_read(write: Write, tmp_path: Path) -> None:
    zipped(write("one", shape=(6, 5, 1), spacing=(50, 50, 50)), tmp_path / "0.zip")
    cohort = tmp_path / "cohort"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(200):
        (cohort / str(number)).mkdir(parents=True)
        shutil.copy(tmp_path / "0.zip", cohort / str(number))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 160), hard))
    try:
        assert not [bad for bad in scan(cohort).ignored if bad.damaged]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_linked_folders_are_followed_once(write: Write, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    study = write("elsewhere")
    (cohort / "linked").symlink_to(study)
    (cohort / "again").symlink_to(study)
    (cohort / "loop").symlink_to(cohort)
    (cohort / "nowhere").symlink_to(tmp_path / "absent")
    (series,) = discover(cohort)
    assert len(series.frames) == 10


def test_a_folder_has_no_most_files(write: Write) -> None:
    (series,) = discover(write(), Limits(files=5))
    assert len(series.frames) == 10


def test_a_path_that_is_not_there_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist \(give a folder, a zip"):
        discover(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "damaged"), (b"plain text" * 100, "not_dicom")]
)
def test_a_file_that_is_not_dicom_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file.dcm"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"holds no DICOM images: .*not DICOM") as refusal:
        load_volume(path)
    assert refusal.value.reason == reason


def test_a_dicomdir_leads_to_its_files(write: Write, tmp_path: Path, expected: Any) -> None:
    made = FileSet()
    for path in write("source").glob("*.dcm"):
        made.add(path)
    made.write(tmp_path / "media")
    volume = load_volume(tmp_path / "media" / "DICOMDIR", strict=True)
    assert np.array_equal(volume.voxels, expected())


def test_files_that_a_dicomdir_lists_and_that_are_absent_are_missed(
    write: Write, tmp_path: Path
) -> None:
    """A disc that was copied in part: the end of a series leaves no trace in its positions."""
    made = FileSet()
    for path in (*write("one").glob("*.dcm"), *write("other", series=2).glob("*.dcm")):
        made.add(path)
    made.write(tmp_path / "media")
    whole, second = discover(tmp_path / "media")
    for frame in sorted(whole.frames, key=lambda one: one.position or ())[-2:]:
        frame.header.source.path.unlink()
    zipped(tmp_path / "media", tmp_path / "media.zip")
    for place in (tmp_path / "media", tmp_path / "media" / "DICOMDIR", tmp_path / "media.zip"):
        found = scan(place)
        assert sorted(len(one.frames) for one in found.series) == [8, 10]
        verdicts = {one.id: load_volume(one).verdict for one in found.series}
        assert verdicts[second.id].ok
        (cut,) = (verdict for verdict in verdicts.values() if not verdict.ok)
        assert cut.status == "partial"
        assert "DICOMDIR lists more images that are absent: 2" in cut.issues[0].message
        assert sum(one.count for one in found.ignored if one.code == "absent") == 2
    for frame in discover(tmp_path / "media")[-1].frames:  # a series that was left behind
        frame.header.source.path.unlink()
    assert not any(one.code == "absent" for one in scan(tmp_path / "media").ignored)


def test_media_in_capitals_are_found_in_lower_case(write: Write, tmp_path: Path) -> None:
    made = FileSet()
    for path in write("source").glob("*.dcm"):
        made.add(path)
    made.write(tmp_path / "media")
    for path in sorted((tmp_path / "media").rglob("*"), reverse=True):
        if path.name != "DICOMDIR":
            path.rename(path.with_name(path.name.lower()))
    (series,) = discover(tmp_path / "media" / "DICOMDIR")
    assert len(series.frames) == 10


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_dicomdir_never_leads_outside_its_folder(write: Write, tmp_path: Path) -> None:
    made = FileSet()
    for path in write("source").glob("*.dcm"):
        made.add(path)
    made.write(tmp_path / "media")
    index = pydicom.dcmread(tmp_path / "media" / "DICOMDIR")
    images = [r for r in index.DirectoryRecordSequence if "ReferencedFileID" in r]
    images[0].ReferencedFileID = ["..", "source", "slice_0001.dcm"]
    images[1].ReferencedFileID = ["ABSENT"]
    index.save_as(tmp_path / "media" / "DICOMDIR")
    found = scan(tmp_path / "media" / "DICOMDIR")
    assert len(found.series[0].frames) == 8
    assert {bad.reason for bad in found.ignored} == {
        "the DICOMDIR points outside its folder",
        "listed in the DICOMDIR but absent",
    }


def test_a_separate_scout_series_does_not_stand_in_the_way(
    write: Write, edit: Callable[..., None], expected: Any
) -> None:
    folder = write("axial")
    scout = write("scout", series=9, shape=(36, 30, 2))
    edit(scout, lambda i, _: setattr(i, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    for path in scout.glob("*.dcm"):
        shutil.move(path, folder / f"scout_{path.name}")
    volume = load_volume(folder, strict=True)
    assert np.array_equal(volume.voxels, expected())
    assert [issue.kind for issue in volume.verdict.issues] == ["left_out"]
    assert volume.verdict.ok


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rtdose_1frame.dcm", "derived"),
        ("SC_rgb.dcm", "no position"),
        ("liver.dcm", "derived"),
        ("emri_small.dcm", "no position"),
        ("mlut_18.dcm", "no position"),
    ],
)
def test_what_is_no_scan_is_listed_but_not_loaded(
    pydicom_data: Callable[[str], Path], name: str, why: str
) -> None:
    (series,) = discover(pydicom_data(name))
    assert not series.volumetric
    with pytest.raises(InputError, match=why):
        load_volume(series)


# -- while the walk goes on --------------------------------------------------------------------
def told(path: Path, settled: int) -> tuple[list[Found], dict[str, Found]]:
    """Series in the order they are told, and those that stand at the end, by id."""
    order, standing = [], {}
    for one in survey(path, settled=settled):
        if isinstance(one, Found):
            for name in one.replaces:
                standing.pop(name)
            assert one.series.id not in standing
            standing[one.series.id] = one
            order.append(one)
    return order, standing


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(n, marks=pytest.mark.soak) for n in range(10, 25))]
)
def test_what_stands_at_the_end_is_what_a_whole_look_finds(
    write: Write, tmp_path: Path, seed: int
) -> None:
    """However the images of two patients and two series of each are strewn over folders."""
    chance, root = random.Random(seed), tmp_path / "root"
    shape = {"shape": (8, 8, 6), "spacing": (40.0, 36.0, 9.0)}
    write("p1", **shape)
    shutil.copytree(tmp_path / "p1", tmp_path / "p1 again")
    write("p2", seed=9, series=2, **shape)
    strewn = chance.choice((0.0, 0.1, 1.0))
    for number, path in enumerate(sorted(tmp_path.glob("p*/*.dcm"))):
        folder = root / (str(chance.randrange(4)) if chance.random() < strewn else path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{number}.dcm")
    _, standing = told(root, settled=chance.choice((0, 3, 8)))
    whole = {one.id: one for one in scan(root).series}
    assert standing.keys() == whole.keys()
    for name, one in standing.items():
        assert sorted(f.key for f in one.series.frames) == sorted(f.key for f in whole[name].frames)
        assert (one.series.notes, one.series.problem) == (whole[name].notes, whole[name].problem)


def test_a_series_is_told_before_the_last_file_is_read(write: Write, tmp_path: Path) -> None:
    write("in/a")
    write("in/b", seed=8)
    (tmp_path / "in" / "c").mkdir()
    (tmp_path / "in" / "c" / "late.dcm").write_bytes(b"")
    found = survey(tmp_path / "in", settled=3)
    first = next(one for one in found if isinstance(one, Found))
    assert len(first.series.frames) == 10
    (tmp_path / "in" / "c" / "late.dcm").write_bytes(b"x" * 200)
    assert [one.name for one in found if isinstance(one, Ignored)][-1].endswith("late.dcm")


def test_folders_that_are_empty_or_cannot_be_listed_are_told(tmp_path: Path) -> None:
    (tmp_path / "in" / "empty").mkdir(parents=True)
    deep = tmp_path / "in" / "deep"
    deep.mkdir()
    here = os.open(deep, os.O_DIRECTORY)
    for _ in range(20):  # longer than any path may be: it can be made, and not be listed
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    reasons = {bad.code: bad for bad in scan(tmp_path / "in").ignored}
    assert reasons["empty"].name.endswith("empty")
    assert reasons["unreadable"].damaged
    assert "File name too long" in reasons["unreadable"].reason
