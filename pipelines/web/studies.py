"""What the page of an upload shows of each study in it, whichever vertical wrote it.

A vertical's answer is any JSON. Lists of objects in it become tables; three numbers under a name
that ends in ``_lps_mm`` are a place in the patient (DICOM's left, posterior, superior), to which a
row of a table jumps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PLACE = "_lps_mm"
VOLUME = "volume.nii.gz"
_PICTURES = (".png", ".jpg", ".jpeg")
_MAX_ROWS = 500


def shown(item: Mapping[str, Any]) -> dict[str, Any]:
    """A study for its page.

    Args:
        item: as a job's JSON has it.
    """
    files: Mapping[str, str] = item["files"]
    result = item["result"] or {}
    masks = [name for name in files if name.endswith(".nii.gz") and "segmentation" in name]
    return {
        **item,
        "tables": [] if not isinstance(result, dict) else _tables(result),
        "warnings": _texts(result, "warnings"),
        "statement": str(result.get("statement", "")) if isinstance(result, dict) else "",
        "pictures": {n: url for n, url in files.items() if n.lower().endswith(_PICTURES)},
        "reports": {n: url for n, url in files.items() if n.lower().endswith(".html")},
        "volume": files.get(VOLUME),
        "mask": files[masks[0]] if masks else None,
    }


def parts(study: Mapping[str, Any]) -> Iterator[str]:
    """What of a study may be accepted or rejected: all of it (empty), and each row of a table."""
    yield ""
    for table in study["tables"]:
        yield from (row["part"] for row in table["rows"])


def _texts(result: Any, key: str) -> list[str]:
    found = result.get(key) if isinstance(result, dict) else None
    return [str(one) for one in found] if isinstance(found, list) else []


def _tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = []
    for name, value in result.items():
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            value = [{"name": key, **row} for key, row in value.items()]
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            tables.append(_table(name, value))
    return tables


def _table(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row if _fits(row[key])))
    return {
        "name": name.replace("_", " "),
        "columns": [column.replace("_", " ") for column in columns],
        "rows": [
            {
                "cells": [_cell(row.get(column)) for column in columns],
                "place": _place(row),
                "part": f"{name} {number}",
            }
            for number, row in enumerate(rows[:_MAX_ROWS], 1)
        ],
        "left_out": max(0, len(rows) - _MAX_ROWS),
    }


def _fits(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def _place(row: Mapping[str, Any]) -> str | None:
    """Right, anterior, superior in mm, as a viewer of NIfTI has it; ``None`` without a place."""
    for key, value in row.items():
        if key.endswith(PLACE) and isinstance(value, list) and len(value) == 3:
            x, y, z = (float(one) for one in value)
            return f"{-x:g},{-y:g},{z:g}"
    return None
