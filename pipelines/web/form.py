"""A form for a record, from the JSON schema of what a vertical takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "number", "flag", "choice", "json"]
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "maxLength": "characters at most",
    "minLength": "characters at least",
}


@dataclass(frozen=True)
class Entry:
    """One field of the form.

    Args:
        name: of the record's field.
        kind: how it is entered; ``json`` for what has parts.
        value: what stands there at first.
        required: whether it must be given.
        hint: what it is, and its bounds.
        choices: of ``choice``.
        whole: whole numbers alone.
    """

    name: str
    kind: Kind
    value: str
    required: bool
    hint: str
    choices: tuple[str, ...] = ()
    whole: bool = False


def entries(schema: Mapping[str, Any], example: Mapping[str, Any]) -> list[Entry]:
    """The fields of a record, in the order in which it declares them.

    Args:
        schema: JSON schema of an object, as pydantic writes it.
        example: a record that is right, for what stands there at first.
    """
    required = set(schema.get("required", ()))
    definitions = schema.get("$defs", {})
    return [
        _entry(name, _resolved(told, definitions), name in required, example.get(name))
        for name, told in schema.get("properties", {}).items()
    ]


def _resolved(told: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """A field's schema without references, and without the alternative of leaving it empty."""
    options = [one for one in told.get("anyOf", ()) if one.get("type") != "null"]
    if len(options) == 1:
        told = {**told, **options[0]}
    elif options:  # several kinds: the plainest of them is entered as text
        return {**told, "type": "several"}
    reference = told.get("$ref") or next((one["$ref"] for one in told.get("allOf", ())), None)
    if reference is not None:
        told = {**definitions.get(reference.rpartition("/")[2], {}), **told}
    return dict(told)


def _entry(name: str, told: Mapping[str, Any], required: bool, value: Any) -> Entry:
    choices = tuple(str(one) for one in told.get("enum", ()))
    kind = _kind(told, bool(choices))
    about = [str(told["description"])] if "description" in told else []
    about += [
        f"{word} {told[key]}" if not key.endswith("Length") else f"{told[key]} {word}"
        for key, word in _LIMITS.items()
        if key in told and (key, told[key]) != ("minLength", 1)
    ]
    return Entry(
        name,
        kind,
        _written(kind, value),
        required,
        "; ".join(about),
        choices,
        told.get("type") == "integer",
    )


def _kind(told: Mapping[str, Any], chosen: bool) -> Kind:
    if chosen:
        return "choice"
    kinds: dict[Any, Kind] = {
        "string": "text",
        "number": "number",
        "integer": "number",
        "boolean": "flag",
    }
    return kinds.get(told.get("type"), "json")


def _written(kind: Kind, value: Any) -> str:
    if value is None:
        return ""
    if kind == "json":
        return json.dumps(value, indent=1)
    if kind == "flag":
        return "true" if value else ""
    return str(value)
