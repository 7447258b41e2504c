"""Objects made of source headers: whose fault it is where none can be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.sr.codedict import codes
from pydicom.tag import Tag

from plinth.engine import Engine, InputError
from plinth.pipelines.folders.items import SoftwareFault, analyse
from plinth.verticals.medical.dicom.loader import load_volume
from plinth.verticals.medical.output.captures import write_captures
from plinth.verticals.medical.output.derived import derived, made_by, source_headers
from plinth.verticals.medical.output.dicom_seg import save_seg
from plinth.verticals.medical.output.report import Origin
from plinth.verticals.medical.output.rtstruct import Structure, write_rtstruct
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.medical.volumes.volume import Volume

Edit = Callable[..., None]
ORIGIN = Origin(("research use only",), "research use only")
FAULTS = (AttributeError, KeyError, TypeError, ValueError, IndexError, ZeroDivisionError)


def segmented(volume: Volume, path: Path) -> None:
    """A SEG of a box."""
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:4, 5:9, 5:9] = 1
    family = codes.DCM.ArtificialIntelligence
    about = highdicom.AlgorithmIdentificationSequence("a", family, "1")
    finding = highdicom.sr.CodedConcept("BOX", "99PLINTH", "Box")
    segment = highdicom.seg.SegmentDescription(1, "Box", finding, finding, "AUTOMATIC", about)
    value = np.array([1], np.uint8)
    save_seg(volume, labels, value, [segment], made_by("m", 1, "d"), path, "binary")


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_is_not_put_on_the_images(
    fault: type[Exception], write: Callable[..., Path]
) -> None:
    volume = load_volume(write())
    headers = source_headers(volume)
    with pytest.raises(fault, match="of ours"), derived("DICOM SEG", headers):
        raise fault("of ours")
    for keyword in ("SOPClassUID", "FrameOfReferenceUID"):
        broken = volume.series.headers()[3]
        setattr(broken, keyword, ["Zanzibar", "1.2"])
        with pytest.raises(InputError) as told, derived("DICOM SEG", [*headers[:3], broken]):
            raise fault("with Zanzibar in it")
        assert told.value.reason == "source_header"
        assert told.value.field == keyword
        assert "Zanzibar" not in str(told.value)
        assert told.value.__cause__ is None


def test_it_fails_its_study_and_says_that_it_is_ours(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("PatientName")

    vertical = CtAnalysis(CtSettings(page=False, pictures=False))
    folder = write(shape=(72, 64, 8), spacing=(5.0, 5.0, 9.0))
    (item,) = vertical.discover(folder)
    monkeypatch.setattr(highdicom.sr, "Comprehensive3DSR", broken)
    with Engine(backend="eager") as engine, pytest.raises(SoftwareFault) as told:
        analyse(vertical, engine, item, tmp_path / "out", sla=vertical.sla)
    assert told.value.reason == "internal"
    assert "AttributeError" in told.value.message
    assert "PatientName" not in str(told.value)


def raw(keyword: str, vr: str, value: bytes) -> Callable[[list[pydicom.Dataset]], None]:
    """Puts bytes as an attribute into all headers, as they would be read."""

    def put(headers: list[pydicom.Dataset]) -> None:
        for header in headers:
            tag = Tag(keyword)
            header._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)

    return put


@pytest.mark.parametrize(
    ("encodings", "name"),
    [
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"),
        (["", "ISO 2022 IR 149"], "Hong^Gildong=\u6d2a^\u5409\u6d1e=\ud64d^\uae38\ub3d9"),
        (["ISO 2022 GBK"], "Zhang^X=\u5f20^\u5c0f\u4e1c"),
        (["ISO IR 100"], "Buc^J\u00e9r\u00f4me"),
        (["ISO_IR 6"], "Plain^Text"),
        ([""], "Plain^Text"),
    ],
)
@pytest.mark.filterwarnings("ignore:Incorrect value for Specific Character Set")
def test_names_of_every_script_are_in_what_is_written(
    encodings: list[str],
    name: str,
    write: Callable[..., Path],
    edit: Edit,
    tmp_path: Path,
) -> None:
    """A study from Japan or Korea had no SEG at all."""

    def spell(image: pydicom.Dataset, _: int) -> None:
        image.SpecificCharacterSet = encodings if len(encodings) > 1 else encodings[0]
        image.PatientName = name

    folder = write()
    edit(folder, spell)
    volume = load_volume(folder)
    segmented(volume, tmp_path / "seg.dcm")
    again = pydicom.dcmread(tmp_path / "seg.dcm")
    assert str(again.PatientName) == name
    box = np.zeros(volume.shape, np.uint8)
    box[2:4, 5:9, 5:9] = 1
    write_rtstruct(volume, box, [Structure(1, "Box")], "m", ORIGIN, tmp_path / "rt.dcm")
    assert str(pydicom.dcmread(tmp_path / "rt.dcm").PatientName) == name


def without(keyword: str) -> Callable[[list[pydicom.Dataset]], None]:
    def drop(headers: list[pydicom.Dataset]) -> None:
        for header in headers:
            header.pop(keyword, None)

    return drop


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(without("SliceThickness"), id="no thickness"),
        pytest.param(raw("SliceThickness", "DS", b"thin"), id="thickness"),
        pytest.param(raw("SpacingBetweenSlices", "DS", b"1\\2 "), id="spacing"),
        pytest.param(raw("SamplesPerPixel", "US", b"\1\0\0"), id="odd length"),
        pytest.param(raw("ReferencedStudySequence", "SQ", b"abc"), id="sequence"),
        pytest.param(raw("PatientSize", "DS", b"tall"), id="number"),
        pytest.param(raw("PatientAge", "AS", b"42"), id="age"),
    ],
)
def test_what_nothing_depends_on_is_left_out(
    change: Callable[[list[pydicom.Dataset]], None],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images without Slice Thickness, which their sender may leave out, had no SEG at all."""
    volume = load_volume(write())
    headers = volume.series.headers()
    change(headers)
    monkeypatch.setattr(type(volume.series), "headers", lambda _: headers)
    segmented(volume, tmp_path / "seg.dcm")
    labels = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True).array
    assert int(labels.sum()) == 32
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:4, 5:9, 5:9] = 1
    write_rtstruct(volume, labels, [Structure(1, "Box")], "m", ORIGIN, tmp_path / "rt.dcm")
    write_captures(volume, {}, "m", ORIGIN, tmp_path)
