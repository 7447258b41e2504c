"""The texts that come with a network: what it is, takes and gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plinth.engine import ModelError

LARGEST = 64 << 20
"""Bytes of one text."""


def text_of(path: Path) -> str:
    """A text, such as a recipe or plans.

    Raises:
        ModelError: it is larger than :data:`LARGEST`, is no UTF-8 or cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} cannot be read: {type(error).__name__}") from error
    if len(raw) > LARGEST:
        raise ModelError(f"{path.name} is larger than {LARGEST:,} bytes")
    return text


def object_of(path: Path) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ModelError: there is none, or it is nested beyond all measure.
    """
    try:
        found = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read as JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} holds no JSON object")
    return found
