"""Words of headers that no name is: what stands in a report has to be one of them."""

from __future__ import annotations

import re

KERNEL = re.compile(
    r"[A-Z]{1,2}[a-z]?\d{2}[a-z]{0,3}(\\[1-5])?|[ABCDELY]|Y[A-D]|EB|FC\d{2}|HD ?LUNG|"
    r"(STANDARD|SOFT|DETAIL|LUNG|BONE|BONEPLUS|EDGE|CHEST|ULTRA)"
)
"""Convolution kernels of the makers."""

BODY_PART = re.compile(
    "ABDOMEN|BRAIN|CHEST|HEAD|NECK|PELVIS|SPINE|CSPINE|LSPINE|TSPINE|HEART|LIVER|KNEE|WHOLEBODY"
)
"""Body Part Examined (PS3.16 annex L), the common ones."""
OTHER = "not a listed one"
STAND_IN = re.compile(r"X[0-9A-F]{8}")
"""What takes the place of a text in a de-identified copy."""


def known(value: str, terms: re.Pattern[str]) -> str:
    """A value if it is one of these terms, else that it is another one."""
    return value if terms.fullmatch(value) else OTHER
