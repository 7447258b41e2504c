"""De-identification, and canaries: names, dates and numbers planted in every attribute there is."""

from __future__ import annotations

import csv
import gzip
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from medical.canaries import CANARIES, NAME, NUMBER, found_in, in_preamble, planted
from medical.own_networks import Blobs, write_beside, write_script
from pydicom import Dataset

from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical import CtAnalysis, CtSettings
from plinth.verticals.medical.ct.findings import withheld
from plinth.verticals.medical.dicom.discover import discover
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.mr.brain import weighting
from plinth.verticals.medical.privacy.deidentify import Deidentifier
from plinth.verticals.medical.privacy.folder import Row, deidentify
from plinth.verticals.testing import run_with_models

KEY = "a secret of the tests, 32 characters"


def all_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def plinth(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "plinth.pipelines.cli.main", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, env=environment, check=False)


@pytest.fixture
def canaries(write: Callable[..., Path], edit: Callable[..., None]) -> Path:
    """A series of canaries, with more in the preamble of its files."""
    folder = write(shape=(72, 64, 8), spacing=(5.0, 5.0, 9.0))
    with pytest.warns():
        edit(folder, planted)
    for path in folder.glob("*.dcm"):
        in_preamble(path)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_canary_is_found_in_copies_results_or_what_is_printed(
    canaries: Path, tmp_path: Path
) -> None:
    assert len(found_in(next(canaries.glob("*.dcm")).read_bytes())) == len(CANARIES)
    copies, results = tmp_path / "copies", tmp_path / "results"
    (canaries / f"{NAME}.txt").write_text(f"Dear Ms {NAME}")
    whose = tmp_path / "whose.csv"
    told = plinth(
        *("deidentify", canaries, "--out", copies, "--map", whose), PLINTH_DEIDENTIFY_KEY=KEY
    )
    assert told.returncode == 0, told.stderr
    assert whose.stat().st_mode & 0o777 == 0o600
    with whose.open() as file:
        places = {row["output"]: Path(row["source"]) for row in csv.DictReader(file)}
    assert all(place.is_file() for place in places.values())
    images = list(copies.rglob("*.dcm"))
    assert len(images) == len(list(canaries.glob("*.dcm")))
    before, after = load_volume(canaries), load_volume(next(copies.glob("P*")))
    assert np.array_equal(before.voxels, after.voxels)
    assert np.array_equal(before.affine, after.affine)
    for path in all_files(copies):
        data = path.read_bytes()
        if path.suffix == ".dcm":
            image = pydicom.dcmread(path)
            data = data.replace(image.PixelData, b"")
        assert not found_in(data), path
        assert not found_in(str(path.relative_to(copies)).encode())
    assert not found_in(told.stdout + told.stderr)
    (canaries / f"{NAME}.txt").unlink()  # cohort.csv leads to files by their names, for its owner
    analysed = plinth("batch", "medical", canaries, "--out", results)
    assert analysed.returncode == 0, analysed.stderr
    assert not found_in(analysed.stdout + analysed.stderr)
    public = [path for path in all_files(results) if path.suffix not in (".dcm", ".png")]
    assert {path.name for path in public} >= {"report.html", "report.json", "cohort.csv"}
    for path in [*public, *results.rglob("*.png")]:
        texts = CANARIES[:3] if path.suffix == ".png" else CANARIES
        assert not [canary for canary in texts if canary in path.read_bytes().lower()], path


@pytest.mark.soak
@pytest.mark.filterwarnings("always")
def test_no_canary_is_in_what_a_network_writes_logs_or_warns_of(
    canaries: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every output there is, by a network; and a refusal of brain tissue by the headers."""
    caplog.set_level("DEBUG", "plinth")
    model = write_beside(tmp_path / "blobs.ts")
    write_script(Blobs(), model)
    every = {"contours": True, "captures": True, "volume": True}
    own = {"model": model, "uncertainty": True}
    vertical = CtAnalysis(CtSettings(network=own, **every))
    out = tmp_path / "out"
    out.mkdir()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        (item,) = vertical.discover(canaries)
        (result,) = run_with_models(vertical, [vertical.load(item)])
        assert isinstance(result, WithArtefacts), result
        written = {path.name for path in vertical.write(result, out)}
        why = weighting(load_volume(canaries).series).why_not_t1()
    assert why is not None
    assert "another part (Body Part Examined)" in why
    assert {"structures.dcm", "uncertainty.nii.gz", "volume.nii.gz", "axial.png"} <= written
    texts = [str(one.message) for one in warned] + [why, caplog.text, *capfd.readouterr()]
    assert not found_in("\n".join(texts).encode())
    for path in all_files(out):
        data = path.read_bytes()
        if path.suffix == ".dcm":  # carries the identity, as an archive needs it, in headers alone
            image = pydicom.dcmread(path)
            assert image.PatientID == f"{NAME}-{NUMBER}"
            assert image.get("BurnedInAnnotation", "NO") == "NO"
            continue
        data = gzip.decompress(data)[:352] if path.suffix == ".gz" else data
        texts_of = CANARIES[:3] if path.suffix in (".png", ".gz") else CANARIES
        assert not [canary for canary in texts_of if canary in data.lower()], path


def copied(
    folder: Path, out: Path, key: str = KEY, characteristics: bool = False
) -> tuple[list[pydicom.Dataset], list[Row]]:
    """The copies of a folder, and what became of each of its files that is DICOM."""
    cleaner = Deidentifier(key.encode(), characteristics=characteristics)
    rows = [row for row in deidentify(folder, out, cleaner) if row.state != "skipped"]
    return [pydicom.dcmread(path) for path in sorted(out.rglob("*.dcm"))], rows


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("ConvolutionKernel", ("one of ours", "another one")),
        ("FilterType", ("WEDGE_2", "WEDGE_3")),
        ("SeriesDescription", ("Thorax of Mr Smith", "Thorax of Mr Smith, iterative")),
        (
            "ImageType",
            (["ORIGINAL", "PRIMARY", "AXIAL", "SMITH1"], ["ORIGINAL", "PRIMARY", "AXIAL"]),
        ),
    ],
)
def test_two_reconstructions_are_still_two_in_the_copy(
    keyword: str, values: tuple[Any, Any], write: Any, edit: Any, tmp_path: Path
) -> None:
    folder = write(shape=(20, 16, 12))
    edit(folder, lambda image, k: setattr(image, keyword, values[k % 2]))
    copies, _ = copied(folder, tmp_path / "out")
    assert len(discover(folder)) == len(discover(tmp_path / "out")) == 2
    assert all("SMITH" not in str(one).upper() for one in copies)
    assert len({str(one.get(keyword)) for one in copies}) == 2


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({"RescaleType": "MYUNIT"}, "Hounsfield"),
        ({"LossyImageCompression": "01"}, "loss"),
    ],
)
def test_what_limits_the_values_is_still_said_of_a_copy(
    attributes: dict[str, str], told: str, write: Any, edit: Any, tmp_path: Path
) -> None:
    for place in _and_its_copy(write, edit, attributes, tmp_path / "out"):
        assert any(told in issue.message for issue in load_volume(place).verdict.issues)


def _frame_type(*values: str) -> list[Dataset]:
    """Shared functional groups that say what all frames show."""
    group, item = Dataset(), Dataset()
    item.FrameType = list(values)
    group.CTImageFrameTypeSequence = [item]
    return [group]


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"SeriesDescription": "Mr Smith VMI 70 keV"}, "a virtual monoenergetic image"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "DE_IODINE"]}, "a material map"),
        ({"SeriesDescription": "Thorax MIP"}, "a maximum or minimum intensity projection"),
        ({"ImageType": ["DERIVED", "PRIMARY", "PERFUSION", "SMITH"]}, "a perfusion"),
        (
            {"SharedFunctionalGroupsSequence": _frame_type("DERIVED", "PRIMARY", "SMITH_VMI_70")},
            "a virtual monoenergetic image",
        ),
    ],
)
def test_a_map_or_projection_is_still_one_in_the_copy(
    attributes: dict[str, Any], kind: str, write: Any, edit: Any, tmp_path: Path
) -> None:
    for place in _and_its_copy(write, edit, attributes, tmp_path / "out"):
        (series,) = discover(place)
        assert str(series.frames[0].kind).startswith(kind)


@pytest.mark.parametrize("free_text", [True, False])
def test_contrast_and_a_sharp_kernel_are_still_said_of_a_copy(
    write: Any, edit: Any, tmp_path: Path, free_text: bool
) -> None:
    said = {"ContrastBolusAgentSequence": [Dataset()], "ConvolutionKernel": "BONE Smith"}
    said |= {"ContrastBolusAgent": "400 mL for Smith"} if free_text else {}
    folder = write(shape=(20, 16, 10))
    edit(folder, lambda image, _: _set(image, said))
    copies, _ = copied(folder, tmp_path / "out")
    facts = load_volume(tmp_path / "out").series
    assert facts.contrast
    assert withheld(facts.kernel, 10.0) == "the kernel is sharp"
    assert "SMITH" not in str(copies[0]).upper()


def test_values_that_a_table_makes_are_not_copied_without_it(
    write: Any, edit: Any, tmp_path: Path
) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2, 0, 16], bytes(4)
    folder = write(shape=(20, 16, 8))
    edit(folder, lambda image, _: _set(image, {"ModalityLUTSequence": [table]}))
    copies, rows = copied(folder, tmp_path / "out")
    assert not copies
    assert {row.reason for row in rows} == {"modality_lut"}


def _set(image: Dataset, attributes: dict[str, Any]) -> None:
    for keyword, value in attributes.items():
        setattr(image, keyword, value)


def _and_its_copy(
    write: Any, edit: Any, attributes: dict[str, Any], out: Path
) -> tuple[Path, Path]:
    """A series with these attributes, and its copy."""
    folder: Path = write(shape=(20, 16, 10))
    edit(folder, lambda image, _: _set(image, attributes))
    copied(folder, out)
    return folder, out


def _visit(date: str) -> Callable[[Dataset, int], None]:
    def visit(image: Dataset, k: int) -> None:
        image.PatientID, image.PatientWeight = "4711", 70
        image.StudyDate, image.AcquisitionDateTime = date, f"{date}235959.5+0100"
        image.FrameOfReferenceUID = "1.2.3.4"

    return visit


def test_a_key_maps_a_cohort_alike_and_another_key_otherwise(
    write: Callable[..., Path], edit: Callable[..., None], tmp_path: Path
) -> None:
    edit(write("cohort/first"), _visit("20200110"))
    edit(write("cohort/later", series=2), _visit("20200310"))
    cohort = tmp_path / "cohort"
    ones, _ = copied(cohort, tmp_path / "a")
    dates = sorted({one.StudyDate for one in ones})
    days = [int(np.datetime64(f"{d[:4]}-{d[4:6]}-{d[6:]}", "D").astype(int)) for d in dates]
    assert days[1] - days[0] == 60, "intervals stay"
    assert not {"20200110", "20200310"} & set(dates)
    assert {one.AcquisitionDateTime for one in ones} == {f"{d}235959.5+0100" for d in dates}
    assert len({one.PatientID for one in ones}) == 1
    assert len({one.FrameOfReferenceUID for one in ones}) == 1
    assert {one.PatientIdentityRemoved for one in ones} == {"YES"}
    assert all("PS3.15" in "".join(one.DeidentificationMethod) for one in ones)
    assert all("PatientWeight" not in one for one in ones)
    assert all(one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID for one in ones)
    again, _ = copied(cohort, tmp_path / "b", characteristics=True)
    assert [one.SOPInstanceUID for one in again] == [one.SOPInstanceUID for one in ones]
    assert {one.PatientWeight for one in again} == {70}
    others, _ = copied(cohort, tmp_path / "c", "another secret of the tests")
    for keyword in ("PatientID", "SOPInstanceUID", "StudyDate"):
        assert not {one[keyword].value for one in others} & {one[keyword].value for one in ones}


@pytest.mark.parametrize(
    ("offset", "kept"),
    [("+0100", "+0100"), ("-0330", "-0330"), ("+2500", None), ("4711", None), ("+0100 X", None)],
)
def test_an_offset_from_utc_stays_with_the_date_times_that_need_it(
    write: Callable[..., Path],
    edit: Callable[..., None],
    tmp_path: Path,
    offset: str,
    kept: str | None,
) -> None:
    """Without it a SUV of a copy, whose injection is told with an offset, is refused."""
    folder = write(shape=(20, 16, 1))
    edit(folder, lambda image, _: setattr(image, "TimezoneOffsetFromUTC", offset))
    (copy,), _ = copied(folder, tmp_path / "copies")
    assert copy.get("TimezoneOffsetFromUTC") == kept


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda image, k: setattr(image, "BurnedInAnnotation", "YES"), "burned_in"),
        (
            lambda image, k: setattr(image, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"),
            "not_an_image",
        ),
        (lambda image, k: setattr(image, "ImageType", ["DERIVED", "SCREEN SAVE"]), "screen"),
        (
            lambda image, k: setattr(image, "ImageType", ["DERIVED", "PRIMARY", "DOSE_INFO"]),
            "screen",
        ),
    ],
)
def test_what_may_show_a_name_in_its_pixels_is_refused(
    write: Callable[..., Path], edit: Callable[..., None], tmp_path: Path, change: Any, reason: str
) -> None:
    folder = write()
    edit(next(folder.glob("*.dcm")), change)
    images, rows = copied(folder, tmp_path / "out")
    assert len(images) == len(list(folder.glob("*.dcm"))) - 1
    (row,) = (row for row in rows if row.state != "written")
    assert (row.state, row.reason, row.output) == ("refused", reason, "")


def test_archives_damaged_files_and_emptied_identifiers(
    write: Callable[..., Path], edit: Callable[..., None], tmp_path: Path
) -> None:
    def emptied(image: Dataset, k: int) -> None:
        image.StudyInstanceUID = image.SeriesInstanceUID = image.PatientID = ""

    folder = write("in/series")
    edit(folder, emptied)
    first, second, *rest = sorted(folder.glob("*.dcm"))
    first.write_bytes(first.read_bytes()[:300])
    with zipfile.ZipFile(tmp_path / "in" / "more.zip", "w") as archive:
        archive.write(second, "image.dcm")
    second.unlink()
    images, rows = copied(tmp_path / "in", tmp_path / "out")
    assert len(images) == len(rest) + 1
    assert len({one.SeriesInstanceUID for one in images}) == 2
    assert all(one.StudyInstanceUID.startswith("2.25.") for one in images)
    assert sorted(row.state for row in rows) == ["failed", *["written"] * len(images)]
    assert not any(row.message and str(tmp_path) in row.message for row in rows)
