"""Which series get which analysis: facts of a series against the patterns of a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from plinth.engine import InputError
from plinth.pipelines.archive.settings import Rule

WORDS = {
    "modality": "Modality",
    "kernel": "ConvolutionKernel",
    "body_part": "BodyPartExamined",
    "description": "SeriesDescription",
    "study_description": "StudyDescription",
}
"""Keys of a rule that are patterns, and the attribute each one looks at."""


@dataclass(frozen=True, slots=True, repr=False)
class Facts:
    """What rules look at; it may hold free text, so it is neither logged nor kept.

    Args:
        texts: by key of :data:`WORDS`; ``None``: not known yet.
        thickness: Slice Thickness, mm; ``None``: not said.
        images: how many there are.
        partial: more will be known once the images are here: what is unknown fits.
    """

    texts: Mapping[str, str | None]
    thickness: float | None
    images: int
    partial: bool = False


def facts_of(path: Path, images: int) -> Facts:
    """The facts of a series by one of its files.

    Args:
        path: a DICOM file.
        images: how many the series has.

    Raises:
        InputError: the file cannot be read.
    """
    from pydicom import dcmread

    try:
        header = dcmread(path, stop_before_pixels=True, force=True)
    except Exception as error:  # noqa: BLE001 - pydicom raises whatever damage makes it meet
        told = f"a header cannot be read: {type(error).__name__}"
        raise InputError(told, reason="damaged") from None
    places = [header]
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for macro in _first_item(header, groups):
            for name in ("CTReconstructionSequence", "PixelMeasuresSequence"):
                places += _first_item(macro, name)
    return Facts(
        {key: _text(places, keyword) for key, keyword in WORDS.items()},
        _number(_text(places, "SliceThickness")),
        images,
    )


def facts_of_answer(answer: Mapping[str, Any], images: int) -> Facts:
    """The facts that QIDO tells of a series.

    Args:
        answer: attributes by keyword, as texts.
        images: how many the series has.
    """
    texts = {key: answer.get(keyword) or None for key, keyword in WORDS.items()}
    return Facts(texts, None, images, partial=True)


def _said(place: Any, keyword: str) -> Any:
    """The value of an attribute, ``None`` where it is absent or no value of its kind."""
    try:
        return place.get(keyword)
    except Exception:  # noqa: BLE001 - whatever a damaged value raises, it says nothing
        return None


def _first_item(place: Any, keyword: str) -> list[Any]:
    return list(_said(place, keyword) or ())[:1]


def _text(places: Sequence[Any], keyword: str) -> str | None:
    for place in places:
        value = _said(place, keyword)
        if value not in (None, ""):
            many = not isinstance(value, str) and hasattr(value, "__iter__")
            return "\\".join(map(str, value)).strip() if many else str(value).strip()
    return None


def _number(text: str | None) -> float | None:
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def why_not(rule: Rule, facts: Facts) -> str | None:
    """Why a rule does not choose a series; ``None``: it does. Names keys, never values."""
    for key, keyword in WORDS.items():
        if not _fits(getattr(rule, key), facts.texts.get(key), facts.partial):
            said = "is not said" if facts.texts.get(key) is None else "does not fit"
            return f"{key} ({keyword}) {said}"
    if rule.thickness_mm is not None and not (facts.partial and facts.thickness is None):
        low, high = rule.thickness_mm
        if facts.thickness is None:
            return "thickness_mm (SliceThickness) is not said"
        if not low <= facts.thickness <= high:
            return f"thickness_mm is {facts.thickness:g}, not {low:g} to {high:g}"
    if facts.images < rule.min_images:
        return f"{facts.images} images, not {rule.min_images} or more"
    return None


def _fits(patterns: Sequence[str], text: str | None, partial: bool) -> bool:
    wanted = [one.casefold() for one in patterns if not one.startswith("!")] or ["*"]
    barred = [one[1:].casefold() for one in patterns if one.startswith("!")]
    if text is None:
        return partial or "*" in wanted
    folded = text.casefold()
    return any(fnmatchcase(folded, one) for one in wanted) and not any(
        fnmatchcase(folded, one) for one in barred
    )


def chosen(rules: Sequence[Rule], facts: Facts) -> list[str]:
    """Names of the analyses that a series gets, in the order of the rules, each once."""
    found = (rule.analysis for rule in rules if why_not(rule, facts) is None)
    return list(dict.fromkeys(found))
