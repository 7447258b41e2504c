"""Where a config's values come from, and errors that name the place."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from plinth.engine.errors import ConfigError, nearest

ENV_PREFIX = "PLINTH_"

M = TypeVar("M", bound=BaseModel)
Place = tuple[str, ...]

_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"))*)\s*=""")


@dataclass(frozen=True)
class Origin:
    """Where each key of a config came from.

    Args:
        file: the TOML file, if there is one.
        lines: line number by dotted place in the file.
        variables: environment variable by dotted place.
    """

    file: Path | None = None
    lines: Mapping[Place, int] = field(default_factory=dict)
    variables: Mapping[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """``"plinth.toml:12: "``, the variable's name, or an empty string."""
        for end in range(len(place), 0, -1):
            if name := self.variables.get(place[:end]):
                return f"{name}: "
            if line := self.lines.get(place[:end]):
                return f"{self.file}:{line}: "
        said = [f"{name}: " for below, name in self.variables.items() if _below(below, place)]
        said += [f"{self.file}:{n}: " for below, n in self.lines.items() if _below(below, place)]
        return said[0] if said and place else ""


def _below(key: Place, table: Place) -> bool:
    return key[: len(table)] == table


def validated(kind: type[M], data: Mapping[str, Any], at: Place, origin: Origin) -> M:
    """Data as a pydantic model, or one ConfigError with every problem on a line.

    Args:
        kind: the type to build.
        data: its keys and values.
        at: place of this table in the file, such as ``("verticals", "finance")``.
        origin: where values came from.
    """
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False):
            loc = tuple(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(_unknown(kind, loc, at, origin))
            else:
                said = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{origin.where(at + loc)}{'.'.join(at + loc)}: {said}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _unknown(kind: Any, loc: Place, at: Place, origin: Origin) -> str:
    known = _known(kind, loc[:-1])
    near = f"; {nearest(loc[-1], sorted(known))}" if known else ""
    return f"{origin.where(at + loc)}unknown key {'.'.join(at + loc)}{near}"


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _known(kind: Any, path: Place = ()) -> dict[str, Any]:
    """Field name to annotation of the table that ``path`` leads to."""
    if not _is_model(kind):
        return {}
    fields = {name: info.annotation for name, info in kind.model_fields.items()}
    if not path:
        return fields
    return _known(*_descend(fields.get(path[0]), path[1:]))


def _descend(annotation: Any, path: Place) -> tuple[Any, Place]:
    if _is_model(annotation):
        return annotation, path
    inner = next((arg for arg in get_args(annotation) if _is_model(arg)), None)
    is_table_of_tables = getattr(annotation, "__origin__", None) is dict
    return inner, path[1:] if is_table_of_tables else path


def from_env(env: Mapping[str, str]) -> Iterator[tuple[Place, str, Any]]:
    """Place, variable and value of every override in the environment."""
    for name in sorted(env):
        if name.startswith(ENV_PREFIX) and "__" in name:
            place = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
            yield place, name, toml_value(env[name])


def toml_value(text: str) -> Any:
    """A value as TOML writes it; what is none is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def put(data: dict[str, Any], place: Place, value: Any, source: str) -> None:
    """Set a nested value; raises ConfigError where a value stands in a table's place."""
    for part in place[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: {part} is a value, not a table")
    data[place[-1]] = value


def places(text: str) -> Iterator[tuple[Place, int]]:
    """Place and line number of every table and key of a TOML text."""
    table: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = _split_key(match[1])
            yield table, number
        elif match := _KEY.match(line):
            yield table + _split_key(match[1]), number


def _split_key(key: str) -> Place:
    return tuple(part.strip().strip("\"'") for part in key.split("."))
