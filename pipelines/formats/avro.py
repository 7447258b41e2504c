"""Avro values, by schemas of a registry."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import orjson

from plinth.pipelines.formats.registry import Decoded, zigzag

MAX_DEPTH = 100
"""Types within types, by which the library's reader calls itself."""
MAX_VALUES = 100_000
"""Values in one message, each array and map counted with one item."""


class AvroSchemas:
    """Reads Avro by fastavro.

    Raises:
        ModuleNotFoundError: fastavro is not installed.
    """

    kind = "AVRO"
    word = "Avro"
    query = ""

    def __init__(self) -> None:
        import fastavro

        self._avro: Any = fastavro

    def parsed(self, found: dict[str, Any], name: str, named: dict[str, Any]) -> Any:
        """A schema; its types join ``named``, where those that it refers to are.

        Raises:
            ValueError: it would cost too much to read its values.
        """
        declared = orjson.loads(found["schema"])
        if isinstance(declared, dict) and any(key.startswith("__") for key in declared):
            raise ValueError("a key of the library's own")
        schema = self._avro.parse_schema(declared, named_schemas=named)
        shape = _shape(schema, named, {})
        if shape.depth > MAX_DEPTH or shape.values > MAX_VALUES:
            raise ValueError("the schema is too deep or too large")
        return schema

    def read(self, schema: Any, body: bytes) -> Decoded:
        """A value of a schema; raises whatever comes of bytes that are none."""
        file = io.BytesIO(body)
        value = self._avro.schemaless_reader(file, schema, None)
        if file.tell() != len(body):
            raise ValueError("bytes are left")
        if isinstance(schema, list):  # which of them is said before the value
            schema = schema[zigzag(body, 0)[0]]
        return Decoded(value, (schema if isinstance(schema, str) else _name(schema)) or "")


class _Shape(NamedTuple):
    """Whether a value takes no bytes, how deep its type is, and how many values are in it."""

    empty: bool
    depth: int = 1
    values: int = 1


def _shape(schema: Any, named: dict[str, Any], known: dict[str, _Shape | None]) -> _Shape:
    """Of a parsed schema, whose names are whole; each named type is looked at once.

    Raises:
        ValueError: a type contains itself, or an array has items of no bytes, of which five bytes
            can say 2^34.
    """
    if isinstance(schema, str) and schema not in named:
        return _Shape(empty=schema == "null")
    name = schema if isinstance(schema, str) else _name(schema)
    if name is None:
        return _outline(schema, named, known)
    if name not in known:
        known[name] = None
        known[name] = _outline(named.get(name, schema), named, known)
    found = known[name]
    if found is None:
        raise ValueError("a schema that contains itself is not read")
    return found


def _name(schema: Any) -> str | None:
    return schema.get("name") if isinstance(schema, dict) else None


def _outline(schema: Any, named: dict[str, Any], known: dict[str, _Shape | None]) -> _Shape:
    kind = "union" if isinstance(schema, list) else schema["type"]
    if kind == "fixed":
        return _Shape(empty=schema["size"] == 0)
    if kind in ("record", "error"):
        parts = [field["type"] for field in schema["fields"]]
    elif kind in ("array", "map"):
        parts = [schema["items" if kind == "array" else "values"]]
    elif kind in ("union", "enum"):
        parts = schema if kind == "union" else []
    else:
        return _shape(kind, named, known)
    shapes = [_shape(part, named, known) for part in parts]
    if kind == "array" and shapes[0].empty:
        raise ValueError("an array of nothing may have any length in a few bytes")
    return _Shape(
        empty=kind in ("record", "error") and all(one.empty for one in shapes),
        depth=1 + max((one.depth for one in shapes), default=0),
        values=1 + sum(one.values for one in shapes),
    )
