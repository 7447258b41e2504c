"""A copy of an image without what says whose it is: pixels untouched, a list of facts kept."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pydicom import DataElement, Dataset, FileMetaDataset
from pydicom.dataset import FileDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID

from plinth import __version__
from plinth.engine import InputError
from plinth.verticals.medical.ct.findings import SHARP
from plinth.verticals.medical.dicom.kinds import TERMS as KINDS
from plinth.verticals.medical.dicom.kinds import derived_kind
from plinth.verticals.medical.privacy.kept import (
    CHARACTERISTICS,
    DATES,
    IMAGES,
    NUMBERS,
    SEQUENCES,
    STAND_INS,
    TERMS,
    TIMES,
    UIDS,
)
from plinth.verticals.medical.source import MALFORMED, Source

METHOD = ("Plinth: allow-list after PS3.15 Basic Profile", "dates moved per patient")
"""De-identification Method: no profile is claimed, as nobody has certified this one."""

MAX_DAYS = 3650
"""Dates are moved back by 1 to so many days."""

DAY = re.compile(r"(\d{4})(\d{2})(\d{2})(.*)", re.DOTALL)
REST = re.compile(r"(\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?)?([+-]\d{4})?")
TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
PIXELS = "PixelData"
CONTRAST = "contrast medium"
"""Stands for whatever agent was given: densities depend on whether one was."""


@dataclass(slots=True)
class Counts:
    """What was done to the attributes of one file, those inside sequences included.

    Args:
        kept: as they were.
        removed: not kept, private ones included.
        private: of the removed ones, those of makers.
        dates: moved.
        uids: replaced.
    """

    kept: int = 0
    removed: int = 0
    private: int = 0
    dates: int = 0
    uids: int = 0


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A de-identified image.

    Args:
        dataset: to be written; holds no value of a person.
        folder: of its patient, study and series, from new identifiers.
        counts: what was done.
    """

    dataset: FileDataset
    folder: str
    counts: Counts = field(default_factory=Counts)


class Deidentifier:
    """Maps the images of a cohort alike: whoever has the key gets the same identifiers again.

    Args:
        key: secret; without it nobody can tell which new identifier an old one became.
        characteristics: keep sex, age, size and weight.
    """

    def __init__(self, key: bytes, *, characteristics: bool = False) -> None:
        self._key = key
        self._also = CHARACTERISTICS if characteristics else frozenset()

    def clean(self, source: Source) -> Cleaned:
        """Read one file and make its de-identified copy.

        Args:
            source: the file.

        Raises:
            InputError: damaged, no CT, MR or PET image, or one whose pixels may show a name. The
                message holds no value of the file.
        """
        try:
            return self._clean(source.dataset(), source)
        except MALFORMED as error:
            raise InputError(
                f"its attributes cannot be read ({type(error).__name__})", reason="damaged"
            ) from None

    def _clean(self, dataset: Dataset, source: Source) -> Cleaned:
        sop_class = _checked(dataset)
        counts = Counts()
        made = self._kept(dataset, self._days(dataset), counts, top=True)
        for keyword, place in (*((k, source.folder) for k in _FOLDERS), (_OWN, source.name)):
            if keyword not in made:  # emptied by another anonymiser: one folder is one series
                setattr(made, keyword, self.uid(f"{keyword}\0{place}"))
        made.SOPClassUID, made.Modality = sop_class, IMAGES[sop_class]
        made.PatientID = made.PatientName = self._person(dataset)
        for keyword in ("PatientBirthDate", "ReferringPhysicianName", "StudyID", "AccessionNumber"):
            setattr(made, keyword, "")
        made.PatientSex = made.get("PatientSex", "")
        _keep_kind(dataset, made, sop_class)
        agent = str(dataset.get("ContrastBolusAgent") or "").strip()
        if agent or dataset.get("ContrastBolusAgentSequence"):
            made.ContrastBolusAgent = CONTRAST
        made.PatientIdentityRemoved = "YES"
        made.DeidentificationMethod = [*METHOD, f"version {__version__}"]
        made.LongitudinalTemporalInformationModified = "MODIFIED"
        made[PIXELS] = dataset[PIXELS]
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID(sop_class)
        meta.MediaStorageSOPInstanceUID = UID(made.SOPInstanceUID)
        meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
        copy = FileDataset("", made, preamble=bytes(128), file_meta=meta)
        folder = "/".join((made.PatientID, *(str(made[k].value)[-12:] for k in _FOLDERS)))
        return Cleaned(copy, folder, counts)

    def _kept(self, dataset: Dataset, days: int, counts: Counts, top: bool = False) -> Dataset:
        made = Dataset()
        for element in dataset:
            value = None if element.tag.is_private else self._value(element, days, counts)
            if value is not None:
                made.add_new(element.tag, element.VR, value)
            elif (stand_in := self._stand_in(element)) is not None:
                made.add_new(element.tag, element.VR, stand_in)
                counts.removed += 1
            elif not (top and element.keyword == PIXELS):
                counts.removed += 1
                counts.private += element.tag.is_private
        return made

    def _value(self, element: DataElement, days: int, counts: Counts) -> Any:
        """The new value of an element, ``None`` where it is not kept."""
        keyword, value = element.keyword, element.value
        if keyword in SEQUENCES and element.VR == "SQ":
            return DicomSequence([self._kept(item, days, counts) for item in value])
        if value is None or value == "":
            return None
        if keyword in UIDS:
            counts.uids += 1
            return self.uid(str(value))
        if keyword in DATES:
            moved = _moved(str(value), days)
            counts.dates += moved is not None
            return moved
        allowed = _numbers(value) if keyword in NUMBERS else self._plain(keyword, value)
        counts.kept += allowed
        return value if allowed else None

    def _plain(self, keyword: str, value: Any) -> bool:
        """Text and numbers that are kept as they are."""
        if keyword in CHARACTERISTICS and keyword not in self._also:
            return False
        if keyword in TIMES:
            return TIME.fullmatch(str(value)) is not None
        if keyword in TERMS:
            values = [value] if isinstance(value, str) else list(value)
            joined = ["\\".join(map(str, values))] if keyword == "ConvolutionKernel" else values
            return all(TERMS[keyword].fullmatch(str(one)) for one in joined)
        return keyword in self._also and _numbers(value)

    def _stand_in(self, element: DataElement) -> str | list[str] | None:
        """What takes the place of text that tells images apart; ``None`` for all other."""
        keyword, value = element.keyword, element.value
        if element.tag.is_private or keyword not in STAND_INS or not value:
            return None
        values = [value] if isinstance(value, str) else [str(one) for one in value]
        if keyword in ("ImageType", "FrameType"):
            kept = [
                one if TERMS[keyword].fullmatch(one) else self._kind_or_stand_in(keyword, one)
                for one in values
            ]
            return kept[0] if len(kept) == 1 else kept
        made = self._in_place_of(keyword, "\\".join(values))
        sharp = keyword == "ConvolutionKernel" and SHARP.fullmatch(values[0].strip())
        return f"SHARP {made}" if sharp else made

    def _kind_or_stand_in(self, keyword: str, text: str) -> str:
        """The term of what an image shows instead of attenuation, where that is said."""
        kind = derived_kind((text,), "", "")
        return self._in_place_of(keyword, text) if kind is None else KINDS[kind].split()[0]

    def _in_place_of(self, keyword: str, text: str) -> str:
        return f"X{self._digest('text', f'{keyword}={text.strip()}').hex()[:8].upper()}"

    def uid(self, old: str) -> str:
        """The identifier that stands for an old one (PS3.5 B.2)."""
        return f"2.25.{int.from_bytes(self._digest('uid', old)[:16], 'big') or 1}"

    def _person(self, dataset: Dataset) -> str:
        return f"P{self._digest('person', _identity(dataset)).hex()[:14].upper()}"

    def _days(self, dataset: Dataset) -> int:
        digest = self._digest("days", _identity(dataset))
        return 1 + int.from_bytes(digest[:8], "big") % MAX_DAYS

    def _digest(self, what: str, value: str) -> bytes:
        return hmac.new(self._key, f"{what}\0{value}".encode(), hashlib.sha256).digest()


_FOLDERS, _OWN = ("StudyInstanceUID", "SeriesInstanceUID"), "SOPInstanceUID"


def _identity(dataset: Dataset) -> str:
    """Who was imaged: number and issuer; without a number, name and birth date, or the study."""
    number = str(dataset.get("PatientID") or "").strip()
    if number:
        return f"{number}\0{dataset.get('IssuerOfPatientID') or ''}"
    name = str(dataset.get("PatientName") or "").strip("^ ")
    birth = dataset.get("PatientBirthDate") or ""
    return f"{name}\0{birth}" if name else str(dataset.get("StudyInstanceUID") or "")


def _keep_kind(dataset: Dataset, made: Dataset, sop_class: str) -> None:
    """A copy of a map or projection says that it is one, which a description may have said."""

    def kind_of(one: Dataset, description: str) -> str | None:
        return derived_kind(_texts(one, "ImageType"), description, sop_class)

    kind = kind_of(dataset, str(dataset.get("SeriesDescription") or ""))
    if kind is not None and kind_of(made, "") != kind:
        term = KINDS[kind].split()[0]
        made.ImageType = [*(_texts(made, "ImageType") or ("DERIVED", "SECONDARY")), term]


def _texts(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    value = dataset.get(keyword) or ()
    return (value,) if isinstance(value, str) else tuple(str(one) for one in value)


def _checked(dataset: Dataset) -> str:
    """The SOP class of an image that may be copied."""
    meta = dataset.file_meta.get("MediaStorageSOPClassUID")
    sop_class = str(dataset.get("SOPClassUID") or meta or "")
    if not dataset.file_meta.get("TransferSyntaxUID"):
        raise InputError("not DICOM with file meta information (PS3.10)", reason="not_dicom")
    if sop_class not in IMAGES:
        raise InputError(
            "no CT, MR or PET image: other objects may show or hold a name anywhere",
            field="SOPClassUID",
            reason="not_an_image",
        )
    if PIXELS not in dataset:
        raise InputError("an image without pixel data", reason="damaged")
    if str(dataset.get("BurnedInAnnotation") or "NO").strip() != "NO":
        raise InputError(
            "Burned In Annotation is not NO: the pixels may show who the patient is",
            field="BurnedInAnnotation",
            reason="burned_in",
        )
    if dataset.get("ModalityLUTSequence"):
        raise InputError(
            "its values are made by a lookup table, which a copy does not hold",
            field="ModalityLUTSequence",
            reason="modality_lut",
        )
    kinds = _texts(dataset, "ImageType")
    kind = derived_kind(kinds, str(dataset.get("SeriesDescription") or ""), sop_class)
    if kind in ("a screen capture", "a dose report"):
        raise InputError(f"{kind}: its pixels may show a name", field="ImageType", reason="screen")
    return sop_class


def _moved(value: str, days: int) -> str | None:
    """A date, or date and time, some days earlier; ``None`` where it is none."""
    match = DAY.fullmatch(value.strip())
    if match is None or not REST.fullmatch(match[4]):
        return None
    try:
        day = datetime.date(int(match[1]), int(match[2]), int(match[3]))
        return f"{day - datetime.timedelta(days):%Y%m%d}{match[4]}"
    except (ValueError, OverflowError):
        return None


def _numbers(value: Any) -> bool:
    """Finite numbers, and no text."""
    values = value if hasattr(value, "__iter__") and not isinstance(value, str | bytes) else [value]
    return all(isinstance(one, int | float) and math.isfinite(one) for one in values)
