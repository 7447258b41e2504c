"""Standardized uptake values by body weight from PET images (PS3.3 C.8.9), or the reason why not.

After the vendor-neutral rules of QIBA (FDG-PET/CT profile, 2018): decay is counted from injection
to the start of the scan; where Series Time was changed later, the start comes from GE's own
attribute or from Acquisition Time and Frame Reference Time (Siemens), and where Philips stores
counts, from its own factors. What the headers leave open is refused, or said in the verdict.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import numpy as np
from pydicom import Dataset

from plinth.engine.errors import InputError
from plinth.verticals.medical.volumes import clock
from plinth.verticals.medical.volumes.volume import Issue, Verdict, Volume

P = ParamSpec("P")
T = TypeVar("T")
READ = (
    *("Units", "SUVType", "CorrectedImage", "DecayCorrection", "PatientWeight"),
    *("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "Manufacturer"),
    *("FrameReferenceTime", "ActualFrameDuration", "RadiopharmaceuticalInformationSequence"),
    "TimezoneOffsetFromUTC",
)
SAME = (
    *("Units", "SUVType", "CorrectedImage", "DecayCorrection", "PatientWeight"),
    "TimezoneOffsetFromUTC",
)
"""Attributes that are equal in all images of a series."""

INJECTED = (
    *("RadionuclideTotalDose", "RadionuclideHalfLife"),
    *("RadiopharmaceuticalStartTime", "RadiopharmaceuticalStartDateTime"),
)
"""The same of the one injection."""

HALF_LIVES = {
    11: 1221.8,
    13: 597.9,
    15: 122.3,
    18: 6586.2,
    44: 14_292.0,
    62: 580.2,
    64: 45_721.0,
    68: 4062.6,
    76: 58_320.0,
    82: 76.4,
    86: 53_064.0,
    89: 282_276.0,
    124: 360_806.0,
}
"""Seconds, by mass number of a nuclide that PET uses."""

MAX_WEIGHT = 300.0
"""kg, more than any scanner's table carries; more is a weight in grams."""
MIN_DOSE, MAX_DOSE = 1e4, 1e11
"""Bq; less is a dose in MBq."""
MIN_DOSE_PER_KG = 2e4
"""Bq/kg, a fifth of the least that is injected; less is a dose in kBq."""
APART = 60.0
"""Seconds by which two statements about the start of a scan may differ unsaid."""
LATER = 1800.0
"""Seconds from Series Time to the first image that need no word."""
MAX_SCAN = 12 * 3600.0
"""Seconds between the first and the last image; more is a date that midnight did not change."""
MAX_UPTAKE = 10
"""Half-lives from injection to scan."""


@dataclass(frozen=True)
class Factor:
    """What makes stored modality values SUV.

    Args:
        value: g/mL for one unit of the stored values.
        uptake: seconds from injection to the start of the scan; ``None`` where it was not needed.
        notes: what was assumed, one sentence each.
    """

    value: float
    uptake: float | None = None
    notes: tuple[str, ...] = ()


def suv_by_weight(volume: Volume) -> Volume:
    """The same volume in SUV by body weight, g/mL; ``series.units`` is ``"SUVbw"``.

    Raises:
        InputError: not PET, or its headers do not allow it for certain (reason ``"no_suv"``).
    """
    facts = volume.series
    if facts.modality != "PT":
        raise _no(f"series {facts.id} is {facts.modality or 'of no modality'}, not PET")
    sources = dict.fromkeys(facts.sources)
    headers = [source.dataset(pixels=False, only=READ) for source in sources]
    private = [next(iter(sources)).dataset(pixels=False)] if sources else []
    own = headers and (
        str(headers[0].get("Units", "")) == "CNTS"
        or str(headers[0].get("Manufacturer", "")).upper().startswith("GE")
    )
    if own:
        private = [source.dataset(pixels=False) for source in sources]
    factor = suv_factor(headers, private)
    voxels = volume.voxels.astype(np.float32) * np.float32(factor.value)
    said = [f"SUV by body weight: stored values ({facts.units}) times {factor.value:.6g}"]
    if factor.uptake is not None:
        said[0] += f", {factor.uptake / 60:.1f} min from injection to scan"
    notes = tuple(Issue("units", text) for text in (*said, *factor.notes))
    return Volume(
        voxels,
        volume.affine,
        Verdict(volume.verdict.status, (*volume.verdict.issues, *notes)),
        replace(facts, units="SUVbw"),
        volume.filled,
    )


def suv_factor(headers: Sequence[Dataset], private: Sequence[Dataset]) -> Factor:
    """The factor of a series.

    Args:
        headers: of all images, with the attributes of :data:`READ`.
        private: of one image, or of all where their unit is counts or their maker GE, with private
            attributes too.

    Raises:
        InputError: reason ``"no_suv"``; says which attribute is missing or contradicts which.
    """
    if not headers:
        raise _no("there are no image files to read it from")
    for keyword in SAME:
        if len({str(one.get(keyword, "")) for one in headers}) > 1:
            raise _no("its images differ in it", keyword)
    units = str(headers[0].get("Units", "")).strip()
    if units == "GML":
        return _already(headers[0])
    if units not in ("BQML", "CNTS"):
        raise _no(f"{units or 'no unit'}, expected BQML, CNTS of Philips, or GML", "Units")
    corrected = [str(one).strip() for one in _values(headers[0], "CorrectedImage")]
    if "ATTN" not in corrected or "DECY" not in corrected:
        raise _no("attenuation (ATTN) and decay (DECY) have to be corrected", "CorrectedImage")
    activity = 1.0
    if units == "CNTS":
        whole, activity = _of_philips(private)
        if whole is not None:
            return Factor(whole, notes=("the factor is the one that Philips stores",))
    return _by_dose(headers, private, activity)


def _already(header: Dataset) -> Factor:
    kind = str(header.get("SUVType", "") or "").strip()
    if kind not in ("", "BW"):
        raise _no(f"{kind}, expected BW (body weight)", "SUVType")
    told = "Units are GML and SUV Type is not said: taken for SUV by body weight"
    return Factor(1.0, notes=() if kind else (told,))


def _of_philips(private: Sequence[Dataset]) -> tuple[float | None, float]:
    """SUV for a count, or ``None`` and Bq/mL for a count, of Philips PET Private Group."""
    found = []
    for name, offset in (("SUV", 0x00), ("activity", 0x09)):
        values = {_private(one, 0x7053, "Philips PET Private Group", offset) for one in private}
        if len(values) > 1:
            raise _no(f"Philips' {name} factor differs between the images", "Units")
        found.append(next(iter(values), None))
    if found[0]:
        return found[0], 1.0
    if found[1]:
        return None, found[1]
    raise _no("counts, without Philips' factors (7053,xx00) and (7053,xx09)", "Units")


def _private(header: Dataset, group: int, creator: str, offset: int) -> float | None:
    text = _private_text(header, group, creator, offset)
    try:
        value = float(text) if text else 0.0
    except ValueError:
        raise _no(f"the private attribute ({group:04x},xx{offset:02x}) is no number") from None
    return value if math.isfinite(value) and value > 0 else None


def _private_text(header: Dataset, group: int, creator: str, offset: int) -> str:
    try:
        value = header.private_block(group, creator)[offset].value
    except KeyError:
        return ""
    return (value.decode("latin-1") if isinstance(value, bytes) else str(value)).strip(" \0")


def _by_dose(headers: Sequence[Dataset], private: Sequence[Dataset], activity: float) -> Factor:
    """Weight over the dose that is left at the time to which decay was corrected."""
    weight = _number(headers[0], "PatientWeight")
    if not 0 < weight <= MAX_WEIGHT:
        raise _no(f"{weight:g} kg makes no sense", "PatientWeight")
    item = _injection(headers)
    dose = _number(item, "RadionuclideTotalDose")
    if not MIN_DOSE <= dose <= MAX_DOSE:
        raise _no(f"{dose:g} Bq makes no sense; it may be in MBq", "RadionuclideTotalDose")
    if dose < MIN_DOSE_PER_KG * weight:
        told = f"{dose:g} Bq for {weight:g} kg makes no sense; it may be in kBq"
        raise _no(told, "RadionuclideTotalDose")
    half_life = _half_life(item)
    corrected = str(headers[0].get("DecayCorrection", "")).strip()
    if corrected == "ADMIN":
        return Factor(weight * 1000 / dose * activity, 0.0)
    if corrected != "START":
        told = corrected or "it is not said"
        raise _no(f"{told}, expected START or ADMIN", "DecayCorrection")
    start, notes = _scan_start(headers, private, half_life)
    uptake, more = _uptake(item, start, half_life, _zone(headers[0]))
    left = dose * 2 ** (-uptake / half_life)
    return Factor(weight * 1000 / left * activity, uptake, (*notes, *more))


def _injection(headers: Sequence[Dataset]) -> Dataset:
    """The one item of the Radiopharmaceutical Information Sequence, equal in all images."""
    keyword = "RadiopharmaceuticalInformationSequence"
    items = [list(one.get(keyword) or []) for one in headers]
    if any(len(one) != 1 for one in items):
        raise _no(f"{len(items[0])} items, expected one injection", keyword)
    first: Dataset = items[0][0]
    for name in INJECTED:
        if len({str(one[0].get(name, "")) for one in items}) > 1:
            raise _no("its images differ in it", name)
    return first


def _half_life(item: Dataset) -> float:
    half_life = _number(item, "RadionuclideHalfLife")
    if not 1 <= half_life <= 1e7:
        raise _no(f"{half_life:g} s makes no sense", "RadionuclideHalfLife")
    for code in item.get("RadionuclideCodeSequence") or []:
        for mass in map(int, re.findall(r"\d+", str(code.get("CodeMeaning", "")))[:1]):
            expected = HALF_LIVES.get(mass)
            if expected is not None and abs(half_life / expected - 1) > 0.05:
                told = f"{half_life:g} s, but the nuclide of mass {mass} has {expected:g} s"
                raise _no(told, "RadionuclideHalfLife")
    return half_life


# -- the start of the scan -------------------------------------------------------------------
def _scan_start(
    headers: Sequence[Dataset], private: Sequence[Dataset], half_life: float
) -> tuple[datetime.datetime, tuple[str, ...]]:
    """The time to which decay was corrected, and what was assumed."""
    series = _one([_moment(header, "Series") for header in headers], "SeriesTime")
    acquired = [_moment(one, "Acquisition") for one in headers]
    back = list(_from_frames(headers, acquired, half_life))
    earliest = min(acquired)
    if _apart(acquired) > MAX_SCAN:
        told = f"its images are {_apart(acquired) / 3600:.1f} hours apart, as if after midnight"
        raise _no(f"{told} their date had not changed", "AcquisitionDate")
    if series <= earliest:
        return series, _beside(series, earliest, back, half_life)
    texts = [_private_text(one, 0x0009, "GEMS_PETD_01", 0x0D) for one in private]
    if all(texts):
        keyword, zone = "(0009,xx0d) of GEMS_PETD_01", _zone(headers[0])
        starts = [_asked(keyword, clock.local_moment, text, zone) for text in texts]
        return _one(starts, keyword), ()
    if len(back) == len(headers):
        if _apart(back) > APART:
            told = f"it puts the start of the scan {_apart(back):.0f} s apart"
            raise _no(f"Series Time was changed, and {told}", "FrameReferenceTime")
        return min(back), ("Series Time is later than the images: the scan's start was "
                           "computed from Acquisition and Frame Reference Time",)  # fmt: skip
    return earliest, ("Series Time is later than the images and no Frame Reference Time says when "
                      "the scan began: taken for the earliest Acquisition Time",)  # fmt: skip


def _one(times: Sequence[datetime.datetime], keyword: str) -> datetime.datetime:
    """The one time that all images tell, the earliest where they differ little."""
    if _apart(times) > APART:
        raise _no(f"its images differ in it by {_apart(times):.0f} s", keyword)
    return min(times)


def _from_frames(
    headers: Sequence[Dataset], acquired: Sequence[datetime.datetime], half_life: float
) -> Iterator[datetime.datetime]:
    """The start by each image that tells when, after it, its mean count rate was (ms)."""
    rate = math.log(2) / half_life
    for header, begin in zip(headers, acquired, strict=True):
        reference = _number(header, "FrameReferenceTime", 0.0) / 1000
        duration = _number(header, "ActualFrameDuration", 0.0) / 1000
        if reference > 0 and duration > 0:
            decay = rate * duration
            mean = math.log(decay / -math.expm1(-decay)) / rate
            yield begin + datetime.timedelta(seconds=mean - reference)


def _beside(
    start: datetime.datetime,
    earliest: datetime.datetime,
    back: Sequence[datetime.datetime],
    half_life: float,
) -> tuple[str, ...]:
    """What the images' own times say, where it is not what Series Time says."""
    if not back:
        late = (earliest - start).total_seconds()
        told = (
            f"the first image was taken {late / 60:.0f} min after Series Time, and no Frame "
            "Reference Time tells whether decay was corrected to the latter, as is assumed"
        )
        return (told,) if late > LATER else ()
    off = (min(back) - start).total_seconds()
    if abs(off) <= APART:
        return ()
    share = 100 * (2 ** (off / half_life) - 1)
    return (
        f"Frame Reference Time puts the start of the scan {off:+.0f} s from Series Time, which "
        f"was taken; by it SUV would be {share:+.1f} % different",
    )


def _apart(times: Sequence[datetime.datetime]) -> float:
    return (max(times) - min(times)).total_seconds()


def _uptake(
    item: Dataset, start: datetime.datetime, half_life: float, zone: datetime.timedelta | None
) -> tuple[float, tuple[str, ...]]:
    """Seconds from injection to ``start``."""
    keyword, of_day = "RadiopharmaceuticalStartDateTime", "RadiopharmaceuticalStartTime"
    told, day = (str(item.get(name, "") or "").strip(" \0") for name in (keyword, of_day))
    notes: tuple[str, ...] = ()
    time = _asked(of_day, clock.time_of_day, day) if day else None
    if told:
        injected = _asked(keyword, clock.local_moment, told, zone, time)
        if time is not None and not clock.same_time_of_day(injected, time):
            raise _no("it is not Radiopharmaceutical Start Time", keyword)
    elif time is not None:
        injected = datetime.datetime.combine(start.date(), time)
        if injected > start:
            injected -= datetime.timedelta(days=1)
            notes = ("the injection is taken to be on the day before the scan",)
        if (start - injected).total_seconds() + 86_400 <= MAX_UPTAKE * half_life:
            why = f"with a half-life of {half_life / 3600:.1f} h it may have been days before"
            raise _no(f"only the time of the injection is there, and {why}", keyword)
    else:
        raise _no("it is missing", of_day)
    uptake = (start - injected).total_seconds()
    if not 0 <= uptake <= MAX_UPTAKE * half_life:
        raise _no(f"the injection is {uptake:.0f} s before the scan", keyword)
    return uptake, notes


# -- values ----------------------------------------------------------------------------------
def _moment(header: Dataset, which: str) -> datetime.datetime:
    date = _told(header, f"{which}Date", clock.date)
    time = _told(header, f"{which}Time", clock.time_of_day)
    return datetime.datetime.combine(date, time)


def _zone(header: Dataset) -> datetime.timedelta | None:
    keyword = "TimezoneOffsetFromUTC"
    told = str(header.get(keyword, "") or "").strip(" \0")
    return _asked(keyword, clock.offset, told) if told else None


def _told(header: Dataset, keyword: str, read: Callable[[str], T]) -> T:
    text = str(header.get(keyword, "") or "").strip(" \0")
    if not text:
        raise _no("it is missing", keyword)
    return _asked(keyword, read, text)


def _asked(keyword: str, read: Callable[P, T], *text: P.args, **more: P.kwargs) -> T:
    """What ``read`` makes of an attribute, or the refusal that names it."""
    try:
        return read(*text, **more)
    except ValueError as error:
        raise _no(str(error), keyword) from None


def _number(header: Dataset, keyword: str, default: float | None = None) -> float:
    value = header.get(keyword)
    if value in (None, "") and default is not None:
        return default
    if value in (None, ""):
        raise _no("it is missing", keyword)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _no("it is no number", keyword) from None
    if not math.isfinite(number):
        raise _no("it is no finite number", keyword)
    return number


def _values(header: Dataset, keyword: str) -> Sequence[object]:
    value = header.get(keyword)
    if value is None or isinstance(value, str):
        return str(value or "").split("\\")
    return list(value)


def _no(why: str, keyword: str = "") -> InputError:
    where = f"{keyword}: " if keyword else ""
    return InputError(
        f"no SUV can be computed: {where}{why}",
        field=keyword or None,
        hint='ask the sender for the original images, or measure stored values with pet = "stored"',
        reason="no_suv",
    )
