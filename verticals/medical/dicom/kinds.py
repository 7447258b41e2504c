"""What kind of image a CT image is: only originals and plain reformats hold attenuation in HU.

Image Type says it (PS3.3 C.7.6.1.1.2 and, value 4, C.8.15.3.10 with the terms of multi-energy CT);
where vendors leave it out, Series Description does. The description itself is never kept.
"""

from __future__ import annotations

import re
from functools import lru_cache

SCREEN = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture Image Storage, and the start of its multi-frame classes' UIDs."""

TERMS = {
    "a maximum or minimum intensity projection": "MIP MINIP MAXIMUM MINIMUM MAXIP",
    "a projection or rendering": "VRT SSD VOLREN PROJECTION RENDERING 3D_RENDERING",
    "a curved reformat": "CPR CURVED",
    "a virtual monoenergetic image": "VMI MONOE MONOENERGETIC MONO_KEV",
    "a material map (iodine, water, virtual non-contrast)": (
        "IODINE VNC VIRTUAL_NONCONTRAST MAT_SPECIFIC MAT_FRACTIONAL MAT_MODIFIED MAT_REMOVED "
        "MAT_VALUE_BASED MATERIAL"
    ),
    "a map of electron density or atomic number": "ELECTRON_DENSITY EFF_ATOMIC_NUM RHO_Z",
    "a perfusion or parametric map": "PERFUSION CBF CBV MTT TTP TMAX PARAMETRIC QUANTITY",
    "a subtraction": "SUBTRACTION DIFFERENCE",
    "a dose report": "DOSE DOSE_INFO DOSE_REPORT",
    "a screen capture": "SCREEN SCREENSAVE SCREEN_SAVE SECONDARY_CAPTURE",
    "a localiser": "LOCALIZER SCOUT TOPOGRAM SURVIEW",
}
"""What an image is, and the terms of Image Type that say so."""

KIND_OF_TERM = {term: kind for kind, terms in TERMS.items() for term in terms.split()}

JOINED = frozenset(["VMI", "MONOE", "MONOENERGETIC", "IODINE", "VNC", "MIP", "MINIP"])
"""Terms that tell also as one word of several joined by underscores."""

PHRASES = (
    ("a maximum or minimum intensity projection", r"\b(mip|min-?ip|maxip)s?\b"),
    ("a projection or rendering", r"\b(vrt|(volume|3d)[- ]rendering|ray ?sum)\b"),
    (
        "a virtual monoenergetic image",
        r"\bmono ?-?e?(energetic)?[ _+]*\d{2,3} ?kev\b|\bvmi\b|\b\d{2,3} ?kev\b|"
        r"\bmono ?([+]|(e|plus|energetic)\b)",
    ),
    (
        "a material map (iodine, water, virtual non-contrast)",
        r"\b(iodine|vnc|iod[- ]?map|virtual non[- ]?contrast|pbv|perfused blood|uric acid|"
        r"ca ?supp|calcium suppress(ed|ion))\b",
    ),
    (
        "a map of electron density or atomic number",
        r"\belectron density\b|\bz[- ]?eff(ective)?\b|\beff(ective)?[ .]+z\b|\brho ?/? ?z\b",
    ),
    ("a perfusion or parametric map", r"\b(cbf|cbv|mtt|ttp|tmax|perfusion map)\b"),
    ("a subtraction", r"\b(subtract(ed|ion)|subtraktion|dsa|bone ?remov(ed|al))\b"),
    ("a dose report", r"\bdose (report|info|record)\b|\bpatient protocol\b"),
    ("a screen capture", r"\bscreen ?(save|shot|capture)\b"),
    ("a localiser", r"\b(scout|topogram|surview|locali[sz]er)\b"),
)
"""What an image is, and the words of Series Description that say so."""


@lru_cache(maxsize=1024)
def derived_kind(image_type: tuple[str, ...], description: str, sop_class: str) -> str | None:
    """What a CT image shows instead of attenuation in HU, or ``None``.

    Args:
        image_type: Image Type, its values.
        description: Series Description.
        sop_class: SOP Class UID.
    """
    if sop_class.startswith(SCREEN):
        return "a screen capture"
    for value in image_type:
        words = JOINED.intersection(re.split(r"[^A-Z]+", value))
        for term in (value, *re.split(r"[^A-Z_]+", value), *sorted(words)):
            if term in KIND_OF_TERM:
                return KIND_OF_TERM[term]
    text = description.casefold().replace("_", " ")
    return next((kind for kind, words_of in PHRASES if re.search(words_of, text)), None)
