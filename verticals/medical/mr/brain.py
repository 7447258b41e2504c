"""MR brain tissue, the second built-in analysis: which series it is for, and what makes it sure.

Grey and white matter of T1-weighted heads by MeshNet, a network of the brainchop project whose
weights the user brings. What it was not made for is refused with the reason: by the headers
before the network runs, by the images after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from plinth.engine import InputError, ModelError
from plinth.verticals.medical.volumes.terms import BODY_PART
from plinth.verticals.medical.volumes.volume import SeriesFacts, Volume

SOURCE = "Plinth MR brain tissue (MeshNet)"
GREY, WHITE = "Grey Matter", "White Matter"
WORTH = (
    "white and grey matter by MeshNet: Dice 0.79 and 0.78 against the tissue maps of the MNI152 "
    "template, never validated on patients; cerebrospinal fluid is not told apart"
)
PLACES = frozenset({"HEAD", "BRAIN", "SKULL", "HEADNECK", "CEREBRUM"})
NO_MAGNITUDE = {
    **dict.fromkeys(("P", "PHASE", "PHASE MAP"), "phases"),
    **dict.fromkeys(("R", "REAL", "I", "IMAGINARY"), "real or imaginary parts"),
    **dict.fromkeys(("T1 MAP", "T2 MAP", "T2_STAR MAP", "R2 MAP", "ADC"), "a map"),
}
"""Values of Image Type of images whose values are no weighting (PS3.3 C.8.3.1.1.1, and makers')."""

LONGEST_ECHO_MS = 20.0
LONGEST_REPETITION_MS = 1200.0
INVERSION_MS = (300.0, 1400.0)
SMALLEST_EXTENT_MM = 120.0
LARGEST_STEP_MM = 3.0
PLAUSIBLE_ML = (500.0, 2000.0)
PLAUSIBLE_WHITE = (0.28, 0.6)
"""White matter's share of both: about 0.4 in adults of any age (Ge et al., AJNR 23:1327, 2002)."""
LABELLED = 1000  # voxels of a tissue whose values are compared, at least


@dataclass(frozen=True, slots=True)
class Weighting:
    """What the headers say of how an MR series was made, free of personal data.

    Args:
        echo_ms: Echo Time.
        repetition_ms: Repetition Time.
        inversion_ms: Inversion Time.
        place: Body Part Examined.
        contrast: a contrast agent is named.
        angiography: Angio Flag is Y.
        kind: what the images hold instead of magnitudes, empty where nothing says so.
    """

    echo_ms: float | None = None
    repetition_ms: float | None = None
    inversion_ms: float | None = None
    place: str = ""
    contrast: bool = False
    angiography: bool = False
    kind: str = ""

    def why_not_t1(self) -> str | None:
        """Why the series is not a T1-weighted image of a head; ``None``: nothing speaks against it.

        T1 weighting wants a short echo and either a short repetition (spin and gradient echo) or
        an inversion near the null of fluid's contrast to grey matter (MPRAGE); see Bernstein, King
        and Zhou, Handbook of MRI Pulse Sequences, 2004.
        """
        if self.place and self.place not in PLACES:
            place = (
                f"the {self.place.lower()}" if BODY_PART.fullmatch(self.place) else "another part"
            )
            return f"it is of {place} (Body Part Examined), not of a head"
        if self.kind:
            return f"its images hold {self.kind}, not magnitudes"
        if self.angiography:
            return "it is an angiography"
        if self.echo_ms is not None and self.echo_ms > LONGEST_ECHO_MS:
            return (
                f"its Echo Time is {self.echo_ms:g} ms, T1-weighted images have at most "
                f"{LONGEST_ECHO_MS:g}"
            )
        inverted = self.inversion_ms is not None and self.inversion_ms > 0
        if inverted and not INVERSION_MS[0] <= (self.inversion_ms or 0) <= INVERSION_MS[1]:
            return (
                f"its Inversion Time is {self.inversion_ms:g} ms, T1-weighted images have "
                f"{INVERSION_MS[0]:g} to {INVERSION_MS[1]:g}"
            )
        long = self.repetition_ms is not None and self.repetition_ms > LONGEST_REPETITION_MS
        if long and not inverted:
            return (
                f"its Repetition Time is {self.repetition_ms:g} ms without an inversion, "
                f"T1-weighted images have at most {LONGEST_REPETITION_MS:g}"
            )
        return None


def weighting(facts: SeriesFacts) -> Weighting:
    """How a series was made, by its first image; nothing is known where there is none."""
    kinds = [NO_MAGNITUDE[one] for one in facts.image_type if one in NO_MAGNITUDE]
    if not facts.sources:
        return Weighting(kind="".join(kinds[:1]))
    header = facts.sources[0].dataset(pixels=False)
    return Weighting(
        echo_ms=_number(header, "EchoTime"),
        repetition_ms=_number(header, "RepetitionTime"),
        inversion_ms=_number(header, "InversionTime"),
        place=str(header.get("BodyPartExamined") or "").strip().upper(),
        contrast=bool(header.get("ContrastBolusAgent")),
        angiography=header.get("AngioFlag") == "Y",
        kind="".join(kinds[:1]),
    )


def _number(header: Dataset, keyword: str) -> float | None:
    value: Any = header.get(keyword)
    try:
        return None if value in (None, "") else float(value)
    except (TypeError, ValueError):
        return None


def check_head(volume: Volume) -> list[str]:
    """Refuse a series that is no T1-weighted head, by headers and field of view.

    Args:
        volume: MR.

    Returns:
        What limits the result though it is one, a sentence each.

    Raises:
        InputError: says why.
    """
    facts = volume.series
    made = weighting(facts)
    why = made.why_not_t1() or _too_small(volume)
    if why is not None:
        raise InputError(
            f"series {facts.id} is no T1-weighted head for the brain tissue analysis: {why}",
            reason="not_t1_head",
        )
    warnings = []
    if made.echo_ms is None or made.repetition_ms is None:
        warnings.append(
            "Echo Time or Repetition Time is missing: that the images are T1-weighted is judged by "
            "their values alone"
        )
    if made.contrast:
        warnings.append("a contrast agent is named: the network was made for images without")
    return warnings


def _too_small(volume: Volume) -> str | None:
    x, y, z = volume.spacing
    extent = [n * mm for n, mm in zip(volume.shape, (z, y, x), strict=True)]
    if min(extent) < SMALLEST_EXTENT_MM:
        told = " x ".join(f"{mm:.0f}" for mm in extent)
        return (
            f"its field of view of {told} mm holds no whole head (from {SMALLEST_EXTENT_MM:g} mm)"
        )
    if max(x, y, z) > LARGEST_STEP_MM:
        return f"its voxels are {max(x, y, z):.1f} mm wide, expected at most {LARGEST_STEP_MM:g}"
    return None


def check_tissue(volume: Volume, labels: npt.NDArray[np.uint8], names: dict[int, str]) -> None:
    """Refuse a result that cannot be a brain in T1: its size, the share of white, grey brighter.

    Args:
        volume: MR.
        labels: (z, y, x) of the network.
        names: of the labels.

    Raises:
        InputError: says why.
    """
    value = {name: number for number, name in names.items()}
    masks = [labels == value[name] for name in (GREY, WHITE)]
    counts = [int(mask.sum()) for mask in masks]
    ml = sum(counts) * volume.voxel_volume_mm3 / 1000
    why = None
    if not PLAUSIBLE_ML[0] <= ml <= PLAUSIBLE_ML[1] or min(counts) < LABELLED:
        why = (
            f"grey and white matter would have {ml:.0f} mL together, a brain has "
            f"{PLAUSIBLE_ML[0]:g} to {PLAUSIBLE_ML[1]:g}"
        )
    elif not PLAUSIBLE_WHITE[0] <= (share := counts[1] / sum(counts)) <= PLAUSIBLE_WHITE[1]:
        why = (
            f"white matter would be {share:.0%} of grey and white matter, a brain has "
            f"{PLAUSIBLE_WHITE[0]:.0%} to {PLAUSIBLE_WHITE[1]:.0%}: the network does not tell them "
            "apart in these images"
        )
    else:
        grey, white = (float(np.median(volume.voxels[mask])) for mask in masks)
        if grey >= white:
            why = f"white matter (median {white:.0f}) is not brighter than grey ({grey:.0f})"
    if why is not None:
        raise InputError(
            f"series {volume.series.id} is no T1-weighted head for the brain tissue analysis: "
            f"{why}",
            reason="not_t1_head",
        )


def check_labels(names: dict[int, str]) -> None:
    """Refuse a network that does not tell grey from white matter.

    Raises:
        ModelError: names the labels it has.
    """
    if not {GREY, WHITE} <= set(names.values()):
        raise ModelError(
            f"the network for brain tissue labels {', '.join(names.values())}, expected {GREY} and "
            f"{WHITE}",
            hint="give brainchop's model20chan3cls or model5_gw_ae",
        )
