"""The journal of a batch: one JSON object a line, appended and synced, read back on resume."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import orjson

from plinth.engine import ConfigError, PlinthError


@dataclass(frozen=True, slots=True)
class Entry:
    """The latest word on one item.

    Args:
        id: the item's id.
        state: ``"done"`` or ``"failed"``; ``"withdrawn"`` when more of its files were found.
        models: version by name of the vertical's models at the time.
        inputs: fingerprint of the item's files and the settings at the time.
        seconds: how long it took.
        files: written files, relative to the item's output folder.
        facts: what the vertical says of the item, without personal data.
        numbers: the numbers of the result by dotted name; on disk alone, see
            :meth:`Journal.numbers`.
        error: the failure as ``PlinthError.as_dict()``.
        at: when, seconds since the epoch.
    """

    id: str
    state: Literal["done", "failed", "withdrawn"]
    models: dict[str, str]
    inputs: str
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    at: float = field(default_factory=time.time)


class Journal:
    """An append-only file that survives being killed at any byte.

    ``entries`` has the latest word on each item, without the numbers of its result: of a cohort
    they would fill the memory.

    Args:
        folder: the batch's output folder; the journal is ``journal.jsonl`` in it.

    Raises:
        ConfigError: another run holds the folder, or a line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "journal.jsonl"
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(
                f"another run is writing to {folder}", hint="wait for it, or choose another --out"
            ) from None
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, int] = {}
        try:
            self._read()
        except PlinthError:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):  # it was being written when the run was killed
                self._file.truncate(place)
                return
            try:
                entry = Entry(**orjson.loads(line))
            except (orjson.JSONDecodeError, TypeError):
                raise ConfigError(
                    f"{self.path}:{number}: this line is damaged",
                    hint="remove the line to have its item run again",
                ) from None
            self._keep(entry, place)
            place += len(line)

    def _keep(self, entry: Entry, place: int) -> None:
        self.entries[entry.id] = replace(entry, numbers={})
        self._places[entry.id] = place

    def add(self, entry: Entry) -> None:
        """Append an entry; when this returns, it is on disk."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(orjson.dumps(asdict(entry)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._keep(entry, place)

    def numbers(self, item: str) -> dict[str, float]:
        """The numbers of an item's latest result, read from the file; none if it has no entry."""
        if item not in self._places:
            return {}
        self._file.seek(self._places[item])
        found: dict[str, float] = orjson.loads(self._file.readline())["numbers"]
        return found

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
