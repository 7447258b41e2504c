"""What is written for a study: JSON, page and pictures, and what they may not say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch import Tensor

from plinth import __version__
from plinth.engine import Call
from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.output.pictures import COLOURS
from plinth.verticals.medical.output.report import RESEARCH_USE, CtReport, CtResult, pseudonym
from plinth.verticals.medical.phantom.chest import NODULES, Phantom
from plinth.verticals.medical.phantom.dicom import write_series
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.testing import feed

PHANTOM = Phantom(shape=(110, 84, 64), spacing=(3.2, 3.2, 3.3))


def dense(call: Call) -> Tensor:
    """What is denser than lung, as nodule: the answer of a network that misses nothing."""
    assert isinstance(call.rows, Tensor)
    return (call.rows[0] > 0.25).to(torch.uint8)


def sure(call: Call) -> Tensor:
    """Logits for nodule, everywhere."""
    assert isinstance(call.rows, Tensor)
    shape = call.rows.shape
    return torch.tensor([0.0, 2.0])[None, :, None, None, None].expand(shape[0], 2, *shape[2:])


def answered(vertical: CtAnalysis, folder: Path) -> CtResult:
    (item,) = vertical.discover(folder)
    result = feed(vertical.infer([vertical.load(item)]), dense, sure)[0]
    assert isinstance(result, WithArtefacts)
    return result


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom with its six nodules as DICOM."""
    folder = tmp_path_factory.mktemp("series")
    write_series(PHANTOM, folder)
    return folder


@pytest.fixture(scope="module")
def answer(series: Path) -> CtResult:
    """What the vertical answers for it."""
    return answered(CtAnalysis(CtSettings(nodules=True)), series)


@pytest.fixture(scope="module")
def written(answer: CtResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is written for it."""
    folder = tmp_path_factory.mktemp("written")
    files = CtAnalysis().write(answer, folder)
    assert sorted(files) == sorted(folder.iterdir())
    return folder


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    """The JSON as any reader gets it."""
    return json.loads((written / "report.json").read_text())  # type: ignore[no-any-return]


def test_json_follows_its_schema(written: Path) -> None:
    again = CtReport.model_validate_json((written / "report.json").read_text())
    assert json.loads(again.model_dump_json()) == json.loads((written / "report.json").read_text())
    with pytest.raises(ValueError, match="extra"):
        CtReport.model_validate({**again.model_dump(), "diagnosis": "none"})


def test_every_number_has_a_unit_and_a_method(report: dict[str, Any]) -> None:
    units = {
        "volume": "mL",
        "density": "HU",
        "perc15": "HU",
        "noise": "HU",
        "laa950": "%",
    }
    keys = [finding["key"] for finding in report["findings"]]
    assert len(set(keys)) == len(keys) >= 15
    for finding in report["findings"]:
        assert finding["unit"] == units[finding["key"].rpartition("_")[2]]
        assert finding["method"]
    for nodule in report["nodules"]:
        numbers = {name for name, value in nodule.items() if isinstance(value, float | list)}
        with_unit = {name for name in numbers if name.endswith(("_mm", "_mm3", "_hu"))}
        assert numbers - with_unit == {"confidence"}


def test_nodules_of_the_report_are_those_of_the_phantom(report: dict[str, Any]) -> None:
    found = np.array([nodule["centre_lps_mm"] for nodule in report["nodules"]])
    for nodule in NODULES:
        centre = np.add(nodule.centre, PHANTOM.centre)
        assert np.linalg.norm(found - centre, axis=1).min() < 2, nodule


def test_research_use_is_said_wherever_people_look(written: Path, report: dict[str, Any]) -> None:
    assert report["statement"] == RESEARCH_USE
    assert (written / "report.html").read_text().count(RESEARCH_USE) >= 2
    assert "Research use only" in pydicom.dcmread(written / "segmentation.dcm").ContentDescription
    assert any("synthetic phantoms only" in warning for warning in report["warnings"])


def test_what_was_written_is_told(written: Path, report: dict[str, Any]) -> None:
    assert report["outputs"] == dict.fromkeys(
        ("pictures", "segmentation.dcm", "measurements.dcm", "report.html"), "written"
    )
    assert {path.name for path in written.glob("*.png")} == {
        *("axial.png", "coronal.png", "sagittal.png"),
        *(f"nodule-{n}.png" for n in range(1, min(6, len(report["nodules"])) + 1)),
    }
    assert set(report["seconds"]) == {
        *("rules", "resample", "network", "nodules", "measure", "outputs")
    }
    assert report["peak_memory_mb"] > 50


# -- privacy -----------------------------------------------------------------------------------
def test_nothing_readable_names_the_patient(
    written: Path, series: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = pydicom.dcmread(next(series.glob("*.dcm")))
    secrets = [str(source.PatientName), source.PatientID, source.StudyInstanceUID]
    secrets += [source.SeriesInstanceUID, source.SOPInstanceUID, source.StudyDate, str(series)]
    for path in written.iterdir():
        if path.suffix != ".dcm":
            text = path.read_bytes().decode("latin-1")
            assert not [secret for secret in secrets if secret and secret in text], path.name
    assert not [secret for secret in secrets if secret in caplog.text]


CANARY = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("always")
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.testing import feed
vertical = CtAnalysis(CtSettings())
(item,) = vertical.discover(Path(sys.argv[1]))
(result,) = feed(vertical.infer([vertical.load(item)]))
files = vertical.write(result, Path(sys.argv[2]))
print(item, result.response, sorted(path.name for path in files))
"""


def test_names_planted_in_every_text_leave_by_no_way(series: Path, tmp_path: Path) -> None:
    """Neither the streams of a process that never heard of Plinth's console, nor its files."""
    planted, out = tmp_path / "planted", tmp_path / "out"
    shutil.copytree(series, planted)
    out.mkdir()
    kept = {"ImageType", "SpecificCharacterSet", "BurnedInAnnotation", "ConvolutionKernel"}
    kept |= {"PhotometricInterpretation", "Modality", "RescaleType", "PatientPosition"}
    for path in planted.glob("*.dcm"):
        image = pydicom.dcmread(path)
        for keyword in ("PatientComments", "InstitutionName", "OperatorsName", "ProtocolName"):
            setattr(image, keyword, "x")
        for element in image:
            if element.VR in ("PN", "LO", "SH", "LT", "ST", "UT", "CS") and (
                element.keyword not in kept
            ):
                element.value = "CANARYMANN"
        image.ReferencedStudySequence = [pydicom.Dataset()]
        image.ReferencedStudySequence[0].ReferencedSOPInstanceUID = "1.2.3.4"
        image.save_as(path, enforce_file_format=True)
    done = subprocess.run(
        [sys.executable, "-c", CANARY, str(planted), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "segmentation.dcm" in done.stdout
    told = [done.stdout, done.stderr]
    told += [path.read_bytes().decode("latin-1") for path in out.iterdir() if path.suffix != ".dcm"]
    assert not [text[:300] for text in told if "CANARY" in text.upper()]
    seg = pydicom.dcmread(out / "segmentation.dcm")
    assert str(seg.PatientName) == "CANARYMANN^"
    assert "ReferencedStudySequence" not in seg


def test_pseudonyms_are_stable_and_uids_are_kept_on_demand(
    series: Path, report: dict[str, Any]
) -> None:
    uid = pydicom.dcmread(next(series.glob("*.dcm"))).StudyInstanceUID
    assert report["study"] == pseudonym(uid) != uid
    kept = CtAnalysis(CtSettings(keep_uids=True, nodules=False))
    (item,) = kept.discover(series)
    told = feed(kept.infer([kept.load(item)]))[0]
    assert isinstance(told, WithArtefacts)
    assert told.response.study == uid


# -- page and pictures ---------------------------------------------------------------------------
class Links(HTMLParser):
    """Collects what a page would fetch, and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [given[name] or "" for name in ("src", "href") if name in given]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it(written: Path, report: dict[str, Any]) -> None:
    text = (written / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert not links.open
    assert links.sources
    assert all(source.startswith("data:image/png;base64,") for source in links.sources)
    assert not re.search(r"https?://|<script", text)
    for nodule in report["nodules"]:
        assert f"{nodule['diameter_mm']:.1f}" in text


def test_the_page_has_words_and_no_python(written: Path, report: dict[str, Any]) -> None:
    text = (written / "report.html").read_text()
    made = text[text.index("How it was made") :]
    assert "tissue -500, lung -400, bone 226" in made
    assert "coarse grid, z × y × x" in made
    assert not set("{}[]_'") & set(re.sub(r"<[^>]*>|Plinth.*", "", made))
    assert "Plinth CT rules" in made
    assert report["algorithm"] == {"Plinth CT rules": __version__}
    assert report["network"]["digest"] in made


def test_the_page_escapes_what_a_header_says(answer: CtResult, tmp_path: Path) -> None:
    source = {**answer.response.source, "kernel": "<script>alert(1)</script>"}
    told = replace(answer, response=answer.response.model_copy(update={"source": source}))
    CtAnalysis(CtSettings(segmentation=False, measurements=False, pictures=False)).write(
        told, tmp_path
    )
    assert "<script>" not in (tmp_path / "report.html").read_text()


def test_the_patients_right_is_on_the_left_of_axial_and_coronal_pictures(written: Path) -> None:
    for name in ("axial", "coronal"):
        picture = np.asarray(Image.open(written / f"{name}.png").convert("RGB")).astype(int)
        right, left = (
            np.argwhere((picture == COLOURS[side]).all(axis=2))[:, 1].mean()
            for side in ("right", "left")
        )
        assert right < picture.shape[1] / 2 < left, name


def test_pictures_have_square_pixels(written: Path) -> None:
    """A lung of the phantom is 144 mm by 196 mm in a sagittal plane through its middle."""
    picture = np.asarray(Image.open(written / "sagittal.png").convert("RGB")).astype(int)
    lines = np.isin(picture @ [1, 1000, 1000000], [sum_of(COLOURS[s]) for s in ("right", "left")])
    rows, columns = np.ptp(np.argwhere(lines), axis=0)
    assert rows / columns == pytest.approx(196 / 144, rel=0.06)


def sum_of(colour: tuple[int, int, int]) -> int:
    return colour[0] + 1000 * colour[1] + 1000000 * colour[2]


def test_a_key_image_shows_the_nodule_in_the_middle_of_three_planes(written: Path) -> None:
    picture = np.asarray(Image.open(written / "nodule-1.png").convert("RGB")).astype(int)
    side = picture.shape[0]
    assert picture.shape[1] == 3 * side
    for n in range(3):
        part = picture[:, n * side : (n + 1) * side]
        outline = np.argwhere((part == COLOURS["nodule"]).all(axis=2))
        assert np.abs(outline.mean(axis=0) - side / 2).max() < 0.1 * side


def test_settings_choose_what_is_written(answer: CtResult, tmp_path: Path) -> None:
    vertical = CtAnalysis(
        CtSettings(page=False, pictures=False, segmentation=False, measurements=False)
    )
    files = vertical.write(answer, tmp_path)
    assert [path.name for path in files] == ["report.json"]
    assert json.loads(files[0].read_text())["outputs"] == {}
