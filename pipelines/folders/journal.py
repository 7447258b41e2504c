"""The journal of a batch: one JSON object a line, appended and synced, read back on resume."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import asdict, dataclass, field
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
        numbers: the numbers of the result by dotted name.
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
        try:
            self.entries = self._read()
        except PlinthError:
            self._file.close()
            raise

    def _read(self) -> dict[str, Entry]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the last line was being written when the run was killed
            self._file.truncate(whole)
        entries = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = Entry(**orjson.loads(line))
            except (orjson.JSONDecodeError, TypeError):
                raise ConfigError(
                    f"{self.path}:{number}: this line is damaged",
                    hint="remove the line to have its item run again",
                ) from None
            entries[entry.id] = entry
        return entries

    def add(self, entry: Entry) -> None:
        """Append an entry; when this returns, it is on disk."""
        self._file.write(orjson.dumps(asdict(entry)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries[entry.id] = entry

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
