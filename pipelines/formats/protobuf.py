"""Protobuf values, by schemas of a registry."""

from __future__ import annotations

import base64
from importlib import import_module
from typing import Any, NamedTuple

from plinth.pipelines.formats.registry import Decoded, zigzag

MAX_NESTING = 16
"""Messages declared within one another."""
MAX_FILES = 100
"""Of Google's own that one schema may import."""
OWN = "google/protobuf/"


class _Schema(NamedTuple):
    """The messages of a file, in order, and the classes of those that were met."""

    file: Any
    classes: dict[tuple[int, ...], Any]


class ProtobufSchemas:
    """Reads Protobuf by Google's library; a registry gives the schema compiled.

    Values come as Protobuf's JSON mapping has them, names as in the schema: enumerations by name,
    64-bit integers and times as text, bytes in base64; fields without presence are always there.

    Raises:
        ModuleNotFoundError: protobuf is not installed.
    """

    kind = "PROTOBUF"
    word = "Protobuf"
    query = "?format=serialized"

    def __init__(self) -> None:
        from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

        self._file: Any = descriptor_pb2.FileDescriptorProto
        self._pool: Any = descriptor_pool.DescriptorPool
        self._class_of: Any = message_factory.GetMessageClass
        self._as_dict: Any = json_format.MessageToDict

    def parsed(self, found: dict[str, Any], name: str, named: dict[str, Any]) -> Any:
        """A schema and, in ``named``, the files it imports.

        Raises:
            ValueError, TypeError: it is none.
        """
        file = self._file.FromString(base64.b64decode(found["schema"], validate=True))
        file.name = name
        named[name] = file
        pool, left = self._pool(), [MAX_FILES]
        known: set[str] = set()

        def add(one: Any) -> None:
            known.add(one.name)
            for path in one.dependency:
                if path not in known:
                    add(named[path] if path in named else self._own(path, left))
            pool.Add(one) if hasattr(pool, "Add") else pool.AddSerializedFile(
                one.SerializeToString()
            )

        add(file)
        return _Schema(pool.FindFileByName(name), {})

    def read(self, schema: _Schema, body: bytes) -> Decoded:
        """The message in a body, behind the path to its type."""
        path, at = _path(body)
        kind = schema.classes.get(path)
        if kind is None:
            messages = list(schema.file.message_types_by_name.values())
            found = messages[path[0]]
            for step in path[1:]:
                found = found.nested_types[step]
            kind = schema.classes[path] = self._class_of(found)
        value = self._as_dict(
            kind.FromString(body[at:]),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        return Decoded(value, kind.DESCRIPTOR.full_name)

    def _own(self, path: str, left: list[int]) -> Any:
        """A file that comes with the library, such as that of timestamps."""
        left[0] -= 1
        if not path.startswith(OWN) or left[0] < 0:
            raise ValueError("an import that the registry does not have")
        module = import_module(path.removesuffix(".proto").replace("/", ".") + "_pb2")
        return self._file.FromString(module.DESCRIPTOR.serialized_pb)


def _path(body: bytes) -> tuple[tuple[int, ...], int]:
    """Which message of the file it is, and where it begins: counts and numbers in zigzag."""
    count, at = zigzag(body, 0)
    if not 0 <= count <= MAX_NESTING:
        raise ValueError("no path to a message")
    steps = []
    for _ in range(count):
        step, at = zigzag(body, at)
        if step < 0:
            raise ValueError("no path to a message")
        steps.append(step)
    return tuple(steps) or (0,), at
