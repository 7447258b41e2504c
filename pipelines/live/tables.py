"""Tables of a vertical that lie in files of their own, and are read again when they change.

A field named in ``Settings.live_tables`` may be the path of a TOML file with the table: rules,
say, which people change more often than the service is restarted. What cannot be read or is wrong
changes nothing: the error is logged and counted, and what was in force stays.
"""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from pydantic import TypeAdapter, ValidationError

from plinth.engine import ConfigError, PlinthError
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.config.settings import Config
from plinth.pipelines.config.source import validated
from plinth.pipelines.lines import toml, whole
from plinth.verticals import Settings, Vertical

MAX_BYTES = 64 << 20
"""Of a file with a table."""
SETTLED = 0.25
"""Seconds after which whoever writes a file is done with it."""
RELOADS = Counter(
    "plinth_settings_reloads_total",
    "Files of settings that were read again because they changed; outcome: taken, or wrong.",
    ("vertical", "outcome"),
    registry=REGISTRY,
)

log = logging.getLogger("plinth.settings")
Mark = tuple[int, int, int, int] | None


def settings_of(
    config: Config, name: str, kind: type[Settings]
) -> tuple[Settings, dict[Path, Mark]]:
    """The checked settings of a vertical, and the files its tables were read from.

    Args:
        config: has its table; paths in it start from the config file's folder.
        name: of the vertical.
        kind: its type of settings.

    Raises:
        ConfigError: names the file, the key and what was expected.
    """
    table = dict(config.vertical(name).settings)
    files: dict[Path, Mark] = {}
    for field in kind.live_tables:
        given = table.get(field)
        if isinstance(given, str):
            base = config.origin.file.parent if config.origin.file else Path()
            path = base / Path(given).expanduser()
            files[path] = mark_of(path)
            table[field] = _read(path, kind, field, table)
    return validated(kind, table, ("verticals", name), config.origin), files


def mark_of(path: Path) -> Mark:
    """What tells whether a file has changed; ``None`` where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


class Marks:
    """Tells whether files have changed since it was last asked.

    A file that somebody is writing may hold nothing, or half of its keys: a change is told once it
    is :data:`SETTLED` seconds old.

    Args:
        paths: the files; make this before they are read, so that no change is missed.
        seen: how they were when they were read; ``None``: as they are now.
    """

    def __init__(self, *paths: Path, seen: Mapping[Path, Mark] | None = None) -> None:
        self._seen = dict(seen or {path: mark_of(path) for path in paths})

    def changed(self) -> list[Path]:
        """Those that have; each change is told once."""
        now = {path: mark_of(path) for path in self._seen}
        found = [path for path, mark in now.items() if mark != self._seen[path]]
        if any(_is_young(now[path]) for path in found):
            return []
        self._seen = now
        return found


def _is_young(mark: Mark) -> bool:
    return mark is not None and 0 <= time.time() - mark[0] / 1e9 < SETTLED


def _read(
    path: Path, kind: type[Settings], field: str, others: Mapping[str, Any]
) -> Mapping[str, Any]:
    try:
        content = toml(whole(path, MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", hint=f"{field} is the path of a TOML file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", hint="see https://toml.io for the syntax") from None
    if not content:
        raise ConfigError(
            f"{path} is empty", hint="was it cut off? a file that says nothing is not taken"
        )
    try:
        wanted: Any = kind.model_fields[field].annotation
        TypeAdapter(wanted).validate_python(kind.live_table(field, content, others))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        lines = [
            f"{path}: {_place(problem['loc'], content) or field}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in problems[:20]
        ]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    return content


def _place(loc: Sequence[int | str], content: Any) -> str:
    """Where in a table something is, as people count and name: ``rule 2 (B02), action``."""
    words: list[str] = []
    for part in loc:
        if isinstance(part, int) and words:
            content = content[part] if isinstance(content, list) and part < len(content) else None
            named = content if isinstance(content, Mapping) else {}
            own = next((named[key] for key in ("code", "name") if key in named), None)
            words[-1] += f" {part + 1}" + (f" ({own})" if isinstance(own, str) else "")
        else:
            content = content.get(part) if isinstance(content, Mapping) else None
            words.append(str(part))
    return ", ".join(words)


class LiveTables:
    """Looks after the files of some verticals' tables.

    Args:
        config: has their tables.
        verticals: by name.
    """

    def __init__(self, config: Config, verticals: Mapping[str, Vertical[Any, Any]]) -> None:
        self._config = config
        self._verticals = verticals
        self._files = {
            name: Marks(seen=settings_of(config, name, vertical.settings_type)[1])
            for name, vertical in verticals.items()
            if vertical.settings_type.live_tables
        }

    def look(self) -> None:
        """Take over what has changed; call it between two batches, about once a second."""
        for name, files in self._files.items():
            if changed := files.changed():
                self._take_over(name, ", ".join(map(str, changed)))

    def _take_over(self, name: str, files: str) -> None:
        try:
            vertical = self._verticals[name]
            settings, _ = settings_of(self._config, name, vertical.settings_type)
            vertical.reconfigure(settings)
        except PlinthError as error:
            RELOADS.labels(name, "wrong").inc()
            log.error("%s: what was in force stays: %s", name, error)
        else:
            RELOADS.labels(name, "taken").inc()
            log.info("%s: took over %s", name, files)
