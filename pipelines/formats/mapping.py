"""From anybody's messages to a vertical's records, as a TOML file declares it.

::

    [[message]]
    name = "authorisation"
    when = {"header.type" = ["AUTH", "0100"]}

    [message.fields]
    transaction_id = "auth.id"
    amount = {path = "auth.amount", unit = "minor"}
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from plinth.engine import ConfigError, InputError
from plinth.engine.errors import nearest
from plinth.engine.tables import Table
from plinth.pipelines.formats.avro import AvroSchemas
from plinth.pipelines.formats.fields import (
    FieldMapping,
    PathText,
    Reader,
    Scalar,
    finder,
    shown,
)
from plinth.pipelines.formats.protobuf import ProtobufSchemas
from plinth.pipelines.formats.registry import Decoded, RegistryConfig, SchemaRegistry
from plinth.pipelines.lines import toml, whole
from plinth.verticals.contract import Vertical
from plinth.verticals.double_keys import refuse_double_keys

MAX_BYTES = 1 << 20
"""Of a mapping file."""
MAX_LEAVES = 10_000
"""Values of one message, keys included."""
BEYOND = 2.0**63
"""Whole numbers of JSON from here on are read as the nearest float."""
KEPT = "unmapped"
"""The field that holds what no field takes, where it is kept."""

Steps = tuple[str | int, ...]
_PATH: TypeAdapter[Steps] = TypeAdapter(PathText)


class Format(Table):
    """``[format]``: how messages are written.

    Args:
        kind: ``type`` in the file: ``json``, or ``avro`` or ``protobuf`` in the Confluent wire
            format (a zero byte, four bytes of schema id, in Protobuf the path to the message, the
            value).
        registry: where the schemas are.
    """

    model_config = ConfigDict(populate_by_name=True)

    kind: Literal["json", "avro", "protobuf"] = Field(default="json", alias="type")
    registry: RegistryConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Format:
        if (self.kind != "json") != (self.registry is not None):
            raise ValueError(
                "type = 'avro' or 'protobuf' and a table [format.registry] go together"
            )
        return self


class MessageMapping(Table):
    """``[[message]]``: one kind of message, and the record it becomes.

    Args:
        name: for people.
        types: ``type`` in the file: full name, or names, of the type that the message is of, in
            Avro and Protobuf; one topic may have several. None: every type.
        when: values by path; all must fit, one of a list is enough. Empty: every message.
        root: where the paths of the fields begin, such as ``payload.after``.
        fields: of the record, by name; in this order.
        unknown_fields: what of the message no field takes: ``ignore``, ``keep`` as ``unmapped``
            in the record, or ``refuse`` the message.
        skip: messages that are no record: neither answered nor dead letters.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]
    types: str | list[str] | None = Field(default=None, alias="type", min_length=1)
    when: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    root: PathText = ()
    fields: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], FieldMapping] = Field(
        default_factory=dict
    )
    unknown_fields: Literal["ignore", "keep", "refuse"] = "ignore"
    skip: bool = False

    @field_validator("when")
    @classmethod
    def _paths(cls, when: dict[str, Any]) -> dict[str, Any]:
        for path in when:
            try:
                _steps(path)
            except ValidationError as error:
                raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return when

    @model_validator(mode="after")
    def _check(self) -> MessageMapping:
        if self.skip == bool(self.fields):
            raise ValueError("either [message.fields], or skip = true")
        for name, field in self.fields.items():
            if field.unit == "minor" and "currency" not in self.fields:
                raise ValueError(f"{name}: unit = 'minor' needs a field currency")
        return self


class MappingFile(Table):
    """The whole file."""

    format: Format = Format()
    message: Annotated[list[MessageMapping], Field(min_length=1, max_length=100)]

    @field_validator("message")
    @classmethod
    def _names(cls, messages: list[MessageMapping]) -> list[MessageMapping]:
        twice = [name for name, n in Counter(m.name for m in messages).items() if n > 1]
        if twice:
            raise ValueError(f"two messages are named {twice[0]}")
        for message in messages[:-1]:
            if not message.when and message.types is None:
                raise ValueError(f"{message.name} takes every message: those below it get none")
        return messages

    @model_validator(mode="after")
    def _types(self) -> MappingFile:
        typed = [message.name for message in self.message if message.types is not None]
        if typed and self.format.kind == "json":
            raise ValueError(f"{typed[0]}: type is of Avro and Protobuf; JSON has none: say when")
        return self


class Message:
    """A checked :class:`MessageMapping`, ready to read."""

    def __init__(self, declared: MessageMapping) -> None:
        self.declared = declared
        self.name = declared.name
        root, types = declared.root, declared.types
        self._types = None if types is None else {types} if isinstance(types, str) else {*types}
        self._conditions = tuple(
            (
                finder(_steps(path)),
                frozenset(map(_word, wanted if isinstance(wanted, list) else [wanted])),
            )
            for path, wanted in declared.when.items()
        )
        # a unit may depend on the currency, so that is read first
        names = sorted(declared.fields, key=lambda name: name != "currency")
        self._readers: tuple[tuple[str, Reader], ...] = tuple(
            (name, declared.fields[name].reader(name, root)) for name in names
        )
        taken = [root + place for field in declared.fields.values() for place in field.places]
        self._taken = frozenset([*taken, *map(_steps, declared.when)])

    def fits(self, source: Any, kind: str) -> bool:
        """Whether it is of the type, and all conditions hold."""
        return (self._types is None or kind in self._types) and all(
            (found := find(source)) is not None
            and not isinstance(found, dict | list)
            and _word(found) in wanted
            for find, wanted in self._conditions
        )

    def read(self, source: Any) -> dict[str, Any]:
        """The record.

        Raises:
            InputError: names the field, where it should have come from, and no value.
        """
        made: dict[str, Any] = {}
        for name, reader in self._readers:
            value = reader(source, made)
            if value is not None:
                made[name] = value
        if self.declared.unknown_fields != "ignore":
            rest = {shown(path): value for path, value in _leaves(source, self._taken)}
            if rest and self.declared.unknown_fields == "refuse":
                raise InputError(
                    f"the message has {len(rest)} values that no field of {self.name} takes",
                    reason="unknown_field",
                    hint="map them, or set unknown_fields = 'ignore' or 'keep'",
                )
            if any(isinstance(value, float) and abs(value) >= BEYOND for value in rest.values()):
                raise InputError(
                    f"a value that no field of {self.name} takes, which is kept, is a number "
                    "beyond 64 bits, and would be another one",
                    reason="number_out_of_range",
                    hint="send it as text, or set unknown_fields = 'ignore'",
                )
            if rest:
                made[KEPT] = rest
        return made

    def not_taken(self, source: Any) -> list[str]:
        """Paths of the message that no field and no condition reads."""
        return [shown(path) for path, _ in _leaves(source, self._taken)]

    def each(self, source: Any) -> Iterator[tuple[str, Any]]:
        """Every field by itself: its value, or the error it gives."""
        made: dict[str, Any] = {}
        for name, reader in self._readers:
            try:
                made[name] = reader(source, made)
            except InputError as error:
                yield name, error
            else:
                yield name, made[name]


class DeclaredMapping:
    """A mapping file in use: messages in, records of the vertical as JSON out.

    Args:
        declared: the checked file.
    """

    def __init__(self, declared: MappingFile) -> None:
        self.messages = [Message(one) for one in declared.message]
        config = declared.format.registry
        self.registry = None
        if config is not None:
            kind = AvroSchemas if declared.format.kind == "avro" else ProtobufSchemas
            self.registry = SchemaRegistry(config, kind())

    def prepare(self, raws: Iterable[bytes | None]) -> None:
        """Ask the registry for the schemas that these messages name and nobody asked for yet.

        Raises:
            RegistryAway: it did not answer; the messages are to be offered again.
        """
        if self.registry is not None:
            self.registry.prepare(raws)

    def decode(self, raw: bytes) -> Decoded:
        """A message, an object, as it was written, before any mapping.

        Raises:
            InputError: it is no JSON object, or no value of a schema that is known.
        """
        source = Decoded(decoded_json(raw)) if self.registry is None else self.registry.decode(raw)
        if not isinstance(source.value, dict):
            raise InputError(
                "the message is not an object", reason="not_an_object", hint="send one JSON object"
            )
        return source

    def kind_of(self, source: Decoded) -> Message:
        """The first kind of message that fits.

        Raises:
            InputError: none does.
        """
        for message in self.messages:
            if message.fits(*source):
                return message
        asked = sorted({path for message in self.messages for path in message.declared.when})
        what = [f"the type {source.type}"] if source.type else []
        what += [f"what is at {', '.join(asked)}"] if asked else []
        raise InputError(
            f"no [[message]] of the mapping fits {' and '.join(what)}",
            reason="unmapped_message",
            hint="add a [[message]] with this in type or when; skip = true if it is no record",
        )

    def record(self, raw: bytes) -> bytes | None:
        """The record of a message as JSON; None where the mapping skips it.

        Raises:
            InputError: the message cannot be read or mapped; repeats nothing of it.
        """
        source = self.decode(raw)
        message = self.kind_of(source)
        if message.declared.skip:
            return None
        return orjson.dumps(message.read(source.value), default=_as_json)


def load_mapping(path: Path, vertical: Vertical[Any, Any]) -> DeclaredMapping:
    """A mapping from a TOML file, checked against the records that a vertical takes.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong: names the message, the
            field and what was expected.
    """
    declared = _declared(path)
    lines = [
        f"{path}: message {message.name}: {problem}"
        for message in declared.message
        if not message.skip
        for problem in _problems(message, vertical.record_types())
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    try:
        return DeclaredMapping(declared)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None


def _declared(path: Path) -> MappingFile:
    try:
        raw = whole(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"cannot read the mapping {path.absolute()}: {error.strerror}",
            hint="stream.mapping is the path of a TOML file",
        ) from None
    try:
        content = toml(raw.decode())
        return MappingFile.model_validate(content)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", hint="see https://toml.io for the syntax") from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        lines = [_told(path, content, problem) for problem in problems[:20]]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _told(path: Path, content: Any, problem: Any) -> str:
    """One problem of a file; a message by its name, an unknown key with the nearest known one."""
    place = [str(step) for step in problem["loc"] if not isinstance(step, int)]
    numbers = [step for step in problem["loc"] if isinstance(step, int)]
    if place[:1] == ["message"] and numbers:
        found = content["message"][numbers[0]]
        name = found.get("name") if isinstance(found, dict) else None
        place[0] = f"message {name or numbers[0] + 1}"
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _keys(FieldMapping if "fields" in place else MessageMapping)
        said = f"unknown key; {nearest(place[-1], known)}"
    return f"{path}: {': '.join(place[:1] + ['.'.join(place[1:])] * (len(place) > 1))}: {said}"


def _keys(kind: type[BaseModel]) -> list[str]:
    return sorted(field.alias or name for name, field in kind.model_fields.items())


def _problems(message: MessageMapping, kinds: Sequence[type[BaseModel]]) -> Iterator[str]:
    """What keeps a message from being one of these records."""
    given = set(message.fields)

    def apart(kind: type[BaseModel]) -> tuple[int, int]:
        known = kind.model_fields
        needed = {name for name, field in known.items() if field.is_required()}
        return len(given - set(known)) + len(needed - given), -len(given & set(known))

    kind = min(kinds, key=apart)
    for name in sorted(given - set(kind.model_fields)):
        yield f"{name} is no field of {kind.__name__}; {nearest(name, sorted(kind.model_fields))}"
    for name, field in kind.model_fields.items():
        if field.is_required() and name not in given:
            yield f"{name} is missing: {kind.__name__} needs it"
        elif field.is_required() and message.fields[name].optional:
            yield f"{name} is optional here, but {kind.__name__} needs it"


def _steps(path: str) -> Steps:
    return _PATH.validate_python(path)


def _word(value: Any) -> str:
    """A value as it is compared: 100, "100" and a constant true by their texts."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def decoded_json(raw: bytes) -> Any:
    """JSON without NaN and without any key twice.

    Raises:
        InputError: it is not that.
    """
    try:
        source = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InputError(
            "the message is not valid JSON",
            hint="send one JSON object in UTF-8",
            reason="malformed_json",
        ) from None
    refuse_double_keys(raw, source)
    return source


def _leaves(source: Any, taken: frozenset[Steps]) -> Iterator[tuple[Steps, Any]]:
    """Values that no field reads, with their paths.

    Raises:
        InputError: there are too many.
    """
    rest: list[tuple[Steps, Any]] = [((), source)]
    seen = 0
    while rest:
        path, one = rest.pop()
        seen += 1
        if seen > MAX_LEAVES:
            raise InputError(f"the message has more than {MAX_LEAVES} values", reason="too_large")
        if path in taken:
            continue
        if isinstance(one, dict) and one:
            rest.extend(((*path, key), inner) for key, inner in one.items())
        elif isinstance(one, list) and one:
            rest.extend(((*path, at), inner) for at, inner in enumerate(one))
        elif one is not None:
            yield path, one


def _as_json(value: Any) -> Any:
    """What Avro knows and JSON does not: decimals and bytes, where they are kept unmapped."""
    return str(value) if isinstance(value, Decimal) else f"{len(value)} bytes"
