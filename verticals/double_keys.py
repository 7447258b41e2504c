"""JSON in which an object has a key twice: readers differ in which of them counts."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import orjson

from plinth.engine.errors import InputError

_FIELD = re.compile(r"[A-Za-z_]{1,40}")
"""A key that an error may repeat; others may be anything, a name or a card number too."""


def refuse_double_keys(raw: bytes, found: Any) -> None:
    """Raise InputError where an object has a key twice.

    Args:
        raw: JSON.
        found: what it says. Values without keys may be left out, since the raw text then has more
            quotation marks than this and is read again.
    """
    # Where nothing is escaped, quotation marks are of keys and texts alone, and a key that is
    # there twice has at least two that are not written again.
    try:
        if b"\\" in raw or raw.count(b'"') != orjson.dumps(found).count(b'"'):
            # Numbers are left as they stand: Python refuses to make those of 4,301 digits.
            json.loads(raw, object_pairs_hook=_unique, parse_int=str, parse_float=str)
    except (orjson.JSONEncodeError, RecursionError):
        raise InputError("the message is nested too deep", reason="malformed_json") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        name = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        name = name if _FIELD.fullmatch(name) else "a field"
        raise InputError(
            f"{name}: is there twice",
            field=name,
            reason="duplicate_key",
            hint="send each field once",
        )
    return keys
