"""SUV by body weight: equal to an independent implementation, or refused for a reason that is said.

``pet_factors.json`` holds headers and factors of @cornerstonejs/calculate-suv (MIT): its published
cases from scanners of Siemens, GE, Philips and CPS, and generated ones (benchmarks/pet_suv.py).
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers
from pydicom import Dataset
from pydicom.uid import PositronEmissionTomographyImageStorage

from plinth.engine import InputError
from plinth.verticals.medical import CtAnalysis, CtSettings, load_volume
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import datasets
from plinth.verticals.medical.volumes import clock
from plinth.verticals.medical.volumes.suv import suv_by_weight, suv_factor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import pet_suv

CASES = json.loads((Path(__file__).parent / "pet_factors.json").read_text())
FACTOR = 70_000 / (350e6 * 2 ** (-3600 / 6586.2))
"""70 kg, 350 MBq of F-18, scanned an hour later."""


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_factors_are_those_of_an_independent_implementation(case: dict[str, Any]) -> None:
    headers = pet_suv.headers_of(case["instances"])
    found = suv_factor(headers, headers)
    assert [found.value] * len(headers) == pytest.approx(case["factors"], rel=1e-7)


# -- one series --------------------------------------------------------------------------------
Change = Callable[[list[Dataset]], None]


def series(change: Change = lambda images: None) -> list[Dataset]:
    """Twelve PET images, scanned at noon, an hour after the injection."""
    images = copy.deepcopy(_series())
    change(images)
    return images


@cache
def _series() -> list[Dataset]:
    images = list(datasets(Phantom(shape=(24, 20, 12), spacing=(14.0, 15.0, 18.0))))
    for number, image in enumerate(images):
        image.SOPClassUID = PositronEmissionTomographyImageStorage
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.Modality, image.Units, image.DecayCorrection = "PT", "BQML", "START"
        image.CorrectedImage = ["DECY", "ATTN", "SCAT"]
        image.PatientWeight = "70"
        image.RescaleSlope, image.RescaleIntercept = f"{1 + number / 4}", "0"  # GE: of each slice
        item, code = Dataset(), Dataset()
        code.CodeValue, code.CodingSchemeDesignator = "C-111A1", "SRT"
        code.CodeMeaning = "^18^Fluorine"
        item.RadionuclideCodeSequence = [code]
        item.RadionuclideTotalDose, item.RadionuclideHalfLife = "350000000", "6586.2"
        item.RadiopharmaceuticalStartTime = "110000"
        image.RadiopharmaceuticalInformationSequence = [item]
        del image.RescaleType
    return images


def written(folder: Path, images: list[Dataset]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        image.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def test_voxels_are_suv_slice_by_slice(tmp_path: Path) -> None:
    images = series()
    stored = load_volume(written(tmp_path / "pet", images))
    assert stored.series.units == "BQML"
    found = suv_by_weight(stored)
    for voxels, image in zip(found.voxels, images, strict=True):
        exact = image.pixel_array * float(image.RescaleSlope) * FACTOR
        assert np.allclose(voxels, exact, rtol=1e-6)
    assert found.series.units == "SUVbw"
    assert found.verdict.ok
    assert "60.0 min from injection to scan" in found.verdict.issues[-1].message
    assert "70" not in found.verdict.issues[-1].message.partition("times")[0]


@pytest.mark.parametrize(("pet", "unit"), [("suv", "SUVbw"), ("stored", "BQML")])
def test_the_vertical_measures_pet_in_a_unit_that_is_said(
    tmp_path: Path, pet: str, unit: str
) -> None:
    folder = written(tmp_path / "pet", series())
    vertical = CtAnalysis(CtSettings.model_validate({"pet": pet}))
    (item,) = vertical_items(folder)
    assert vertical.load(item).volume.series.units == unit


def vertical_items(folder: Path) -> list[Any]:
    """Items of a network for PET: the CT analysis leaves the series out."""
    from plinth.verticals.contract import Item
    from plinth.verticals.medical.dicom.discover import discover

    return [
        Item(one.id, tuple(frame.header.source.path for frame in one.frames))
        for one in discover(folder)
    ]


def item(images: list[Dataset]) -> Dataset:
    found: Dataset = images[0].RadiopharmaceuticalInformationSequence[0]
    return found


def every(keyword: str, value: Any) -> Change:
    def change(images: list[Dataset]) -> None:
        for image in images:
            setattr(image, keyword, value)

    return change


def injected(keyword: str, value: Any) -> Change:
    def change(images: list[Dataset]) -> None:
        for image in images:
            setattr(image.RadiopharmaceuticalInformationSequence[0], keyword, value)

    return change


def at(day: str | None, moment: str | None, zone: str | None = None) -> Change:
    """When the tracer was injected: time of day, date-time, and the offset of the other times."""

    def change(images: list[Dataset]) -> None:
        injected("RadiopharmaceuticalStartTime", day)(images)
        injected("RadiopharmaceuticalStartDateTime", moment)(images)
        every("TimezoneOffsetFromUTC", zone)(images)

    return change


def of_ge(images: list[Dataset], last: str) -> None:
    """Series Time changed later; GE's own start of the scan, another one in the last image."""
    for image in images:
        image.SeriesTime, image.Manufacturer = "150000", "GE MEDICAL SYSTEMS"
        moment = last if image is images[-1] else "120000"
        block = image.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", f"20260101{moment}")


def test_the_start_that_ge_keeps_is_the_one_of_the_scan(tmp_path: Path) -> None:
    stored = load_volume(written(tmp_path / "pet", series(lambda images: of_ge(images, "120030"))))
    found = suv_by_weight(stored)
    assert found.voxels.max() == pytest.approx(stored.voxels.max() * FACTOR, rel=1e-6)


def long_lived(images: list[Dataset]) -> None:
    for image in images:
        one = image.RadiopharmaceuticalInformationSequence[0]
        one.RadionuclideCodeSequence[0].CodeMeaning = "^89^Zirconium"
        one.RadionuclideHalfLife = "282276"


def bare(images: list[Dataset]) -> None:
    for image in images:
        del image.RescaleSlope


def twice(images: list[Dataset]) -> None:
    for image in images:
        image.RadiopharmaceuticalInformationSequence.append(item(images))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (every("PatientWeight", None), "PatientWeight: it is missing"),
        (every("PatientWeight", "0"), "PatientWeight: 0 kg makes no sense"),
        (every("PatientWeight", "70000"), "PatientWeight: 70000 kg makes no sense"),
        (every("CorrectedImage", ["DECY", "SCAT"]), "CorrectedImage: attenuation"),
        (every("DecayCorrection", "NONE"), "DecayCorrection: NONE, expected START or ADMIN"),
        (every("DecayCorrection", None), "DecayCorrection: it is not said"),
        (every("Units", "PROPCNTS"), "Units: PROPCNTS, expected BQML"),
        (every("Units", "CNTS"), "Units: counts, without Philips' factors"),
        (every("SeriesTime", None), "SeriesTime: it is missing"),
        (every("AcquisitionTime", None), "AcquisitionTime: it is missing"),
        (injected("RadionuclideTotalDose", "350"), "350 Bq makes no sense; it may be in MBq"),
        (injected("RadionuclideTotalDose", None), "RadionuclideTotalDose: it is missing"),
        (injected("RadionuclideHalfLife", "1223"), "but the nuclide of mass 18 has 6586.2 s"),
        (injected("RadionuclideHalfLife", "0"), "RadionuclideHalfLife: 0 s makes no sense"),
        (injected("RadiopharmaceuticalStartTime", None), "StartTime: it is missing"),
        (injected("RadiopharmaceuticalStartTime", "120500"), "the injection is 86100 s before"),
        (
            injected("RadiopharmaceuticalStartDateTime", "20260102110000"),
            "StartDateTime: the injection is -82800 s before",
        ),
        (
            injected("RadiopharmaceuticalStartDateTime", "20260101103000"),
            "StartDateTime: it is not Radiopharmaceutical Start Time",
        ),
        (at("1100", "20260101100000+0000"), "offset from UTC (+0000), and no Timezone Offset"),
        (at(None, "20260101110000+0100"), "offset from UTC (+0100), and no Timezone Offset"),
        (at("1100", "20260101110000+0000", "+0100"), "is not Radiopharmaceutical Start Time"),
        (at(None, "20260101"), "StartDateTime: it is no date or time, or does not say the minute"),
        (at(None, "20260101110000+1500", "+0100"), "StartDateTime: it is no offset from UTC"),
        (at("1100", "20260101110000", "CET"), "TimezoneOffsetFromUTC: it is no date or time"),
        (at("11", None), "StartTime: it is no date or time, or does not say the minute"),
        (long_lived, "with a half-life of 78.4 h it may have been days before"),
        (
            lambda images: setattr(images[3], "TimezoneOffsetFromUTC", "+0100"),
            "TimezoneOffsetFromUTC: its images differ",
        ),
        (twice, "Sequence: 2 items, expected one injection"),
        (every("PatientWeight", "450"), "PatientWeight: 450 kg makes no sense"),
        (injected("RadionuclideTotalDose", "350000"), "for 70 kg makes no sense; it may be in kBq"),
        (
            lambda images: setattr(images[3], "SeriesTime", "113000"),
            "SeriesTime: its images differ in it by 1800 s",
        ),
        (
            lambda images: setattr(
                item(images[3:]), "RadiopharmaceuticalStartDateTime", "20260101110000"
            ),
            "RadiopharmaceuticalStartDateTime: its images differ",
        ),
        (lambda images: of_ge(images, "123000"), "(0009,xx0d) of GEMS_PETD_01: its images differ"),
        (lambda images: setattr(images[3], "PatientWeight", "71"), "PatientWeight: its images"),
    ],
)
def test_what_is_not_certain_is_refused(tmp_path: Path, change: Change, why: str) -> None:
    volume = load_volume(written(tmp_path / "pet", series(change)))
    with pytest.raises(InputError) as refusal:
        suv_by_weight(volume)
    assert refusal.value.reason == "no_suv"
    assert why in refusal.value.message


def test_pet_without_units_and_what_is_not_pet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PET without Units \(0054,1001\)"):
        load_volume(written(tmp_path / "none", series(every("Units", None))))
    for kept in (0, 3):  # the slope is of each slice: without it values are mere numbers
        with pytest.raises(InputError, match="Rescale Slope"):
            load_volume(
                written(tmp_path / f"bare{kept}", series(lambda images, k=kept: bare(images[k:])))
            )
    ct = load_volume(written(tmp_path / "ct", series(every("Modality", "CT"))))
    with pytest.raises(InputError, match="is CT, not PET"):
        suv_by_weight(ct)


@pytest.mark.parametrize(
    ("change", "factor", "said"),
    [
        (every("DecayCorrection", "ADMIN"), 70_000 / 350e6, "0.0 min from injection"),
        (every("Units", "GML"), 1.0, "SUV Type is not said"),
        (every("SeriesTime", "150000"), FACTOR, "taken for the earliest Acquisition Time"),
        (
            injected("RadiopharmaceuticalStartTime", "233000"),
            70_000 / (350e6 * 2 ** (-45_000 / 6586.2)),
            "on the day before the scan",
        ),
    ],
)
def test_what_is_assumed_is_said(tmp_path: Path, change: Change, factor: float, said: str) -> None:
    stored = load_volume(written(tmp_path / "pet", series(change)))
    found = suv_by_weight(stored)
    top = float(stored.voxels.max())
    assert float(found.voxels.max()) == pytest.approx(top * factor, rel=1e-6)
    assert any(said in issue.message for issue in found.verdict.issues)


@pytest.mark.parametrize("text", ["20260101110000 +0100", "20260101110000&0100", "202601011160"])
def test_a_date_time_is_never_read_in_part(text: str) -> None:
    with pytest.raises(ValueError, match="it is no"):
        clock.local_moment(text, None)


@pytest.mark.parametrize(
    "injection",
    [
        at(None, "20260101100000+0000", "+0100"),
        at("110000", "20260101100000.000000+0000", "+0100"),
        at("110000", "20260101110000+0100"),
        at(None, "20260101110000", "+0100"),
        at(None, "20251231230000-1100", "+0100"),
        at("1100", "202601011600+0530", "+0030"),
    ],
)
def test_date_times_with_an_offset_are_read_on_the_clock_of_the_other_times(
    injection: Change,
) -> None:
    headers = series(injection)
    assert suv_factor(headers, headers).value == pytest.approx(FACTOR)


@pytest.mark.parametrize(
    "start", ["20260101115000", "20260101115000-0500", "20260102035000.00+1100"]
)
def test_ge_says_the_start_with_an_offset_too(start: str) -> None:
    def later(images: list[Dataset]) -> None:
        every("SeriesTime", "150000")(images)
        every("TimezoneOffsetFromUTC", "-0500")(images)
        for image in images:
            block = image.private_block(0x0009, "GEMS_PETD_01", create=True)
            block.add_new(0x0D, "DT", start)

    headers = series(later)
    assert suv_factor(headers, headers).uptake == pytest.approx(3000)


def test_a_scan_over_midnight_counts_from_its_own_dates() -> None:
    def late(images: list[Dataset]) -> None:
        every("SeriesTime", "235000")(images)
        for number, image in enumerate(images):
            minute = 50 + 2 * number
            image.AcquisitionDate = "20260102" if minute > 59 else "20260101"
            image.AcquisitionTime = f"{'00' if minute > 59 else '23'}{minute % 60:02}00"
        injected("RadiopharmaceuticalStartTime", "225000")(images)

    headers = series(late)
    assert suv_factor(headers, headers).value == pytest.approx(FACTOR)
    every("AcquisitionDate", "20260101")(headers)
    with pytest.raises(InputError, match="as if after midnight their date had not changed"):
        suv_factor(headers, headers)


def test_images_long_after_series_time_are_said() -> None:
    headers = series(every("AcquisitionTime", "130000"))
    found = suv_factor(headers, headers)
    assert found.value == pytest.approx(FACTOR)
    assert "taken 60 min after Series Time" in found.notes[0]


def test_a_time_that_is_none_is_named() -> None:
    headers = [copy.deepcopy(HEADER)]
    headers[0].add_new("AcquisitionTime", "LO", "noon")
    with pytest.raises(InputError, match="AcquisitionTime: it is no date or time"):
        suv_factor(headers, headers)


def test_suv_by_other_than_weight_is_refused() -> None:
    headers = series(every("Units", "GML"))
    for image in headers:
        image.SUVType = "LBM"
    with pytest.raises(InputError, match="SUVType: LBM, expected BW"):
        suv_factor(headers, headers)


HEADER = series()[0]
del HEADER.PixelData


@given(
    beds=integers(1, 5),
    seconds=floats(30, 600),
    half_life=floats(100, 1e5),
    later=integers(10, 7200),
)
def test_the_start_of_a_scan_comes_back_from_frame_reference_times(
    beds: int, seconds: float, half_life: float, later: int
) -> None:
    """Siemens: Series Time is that of the reconstruction; each bed tells its mean count rate."""
    start = datetime.datetime(2026, 1, 1, 12)
    decay = math.log(2) / half_life * seconds
    mean = seconds * math.log(decay / (1 - math.exp(-decay))) / decay
    headers = [copy.deepcopy(HEADER) for _ in range(beds)]
    for bed, image in enumerate(headers):
        begin = start + datetime.timedelta(seconds=bed * seconds)
        after = start + datetime.timedelta(seconds=beds * seconds + later)
        image.AcquisitionTime, image.SeriesTime = f"{begin:%H%M%S.%f}", f"{after:%H%M%S.%f}"
        image.FrameReferenceTime = f"{1000 * (bed * seconds + mean):.10g}"
        image.ActualFrameDuration = str(round(1000 * seconds))
        one = image.RadiopharmaceuticalInformationSequence[0]
        one.RadionuclideHalfLife = f"{half_life:.10g}"
        del one.RadiopharmaceuticalStartTime
        one.RadiopharmaceuticalStartDateTime = "20260101115900"
        del one.RadionuclideCodeSequence
    found = suv_factor(headers, headers)
    assert found.uptake == pytest.approx(60, abs=0.01)
    assert "computed from Acquisition and Frame Reference Time" in found.notes[0]


def test_frame_reference_times_that_contradict_series_time_are_said() -> None:
    headers = series()
    for image in headers:
        image.FrameReferenceTime, image.ActualFrameDuration = "600000", "2000"
    found = suv_factor(headers, headers)
    assert found.value == pytest.approx(FACTOR)
    assert "puts the start of the scan -599 s from Series Time" in found.notes[0]
    assert "-6.1 % different" in found.notes[0]
