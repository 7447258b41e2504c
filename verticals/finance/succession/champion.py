"""Which version of the model answers: a file in the store, and how it came to be.

``<store>/fraud/champion.json`` names the version, ``<store>/fraud/decisions.jsonl`` has a line for
each change: when, from what, to what, on whose word, by which figures. Servers that follow the
store take a change up within a second or two, each between two batches.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from plinth.engine import ConfigError, ModelError, ModelStore
from plinth.engine.files import replace_file

NAME = "fraud"
WINDOW = "window"
"""Under this name the store keeps of which payments a version was trained."""
LOCK_SECONDS = 5.0
"""How long one process waits for another that is writing a decision."""
MAX_BYTES = 4 << 20
"""Read of the file of decisions: the newest ten thousand or so."""
By = Literal["rule", "hand", "rollback", "training"]


class Champion:
    """The version that answers, in one store.

    Args:
        store: folder of the model store.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._file = store / NAME / "champion.json"
        self._decisions = store / NAME / "decisions.jsonl"
        self._lock = store / NAME / "champion.lock"

    def version(self) -> str | None:
        """The version that answers; ``None``: nobody chose one, which means the newest.

        Raises:
            ModelError: the file is damaged.
        """
        try:
            found = json.loads(self._file.read_bytes()[:MAX_BYTES])
            return str(found["version"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self._file} cannot be read: {error}",
                hint="plinth finance promote VERSION writes it anew",
            ) from None

    def newest_challenger(self, champion: str) -> str | None:
        """The newest version behind the champion that was not rolled back."""
        known = ModelStore(self.store).versions(NAME)
        later = known[known.index(champion) + 1 :] if champion in known else known
        back = self.rolled_back()
        return next((version for version in reversed(later) if version not in back), None)

    def rolled_back(self) -> set[str]:
        """Versions whose last decision was a rollback away from them."""
        back: set[str] = set()
        for line in self.decisions():
            if line["by"] == "rollback":
                back.add(line["from"])
            back.discard(line["to"])
        return back

    def promote(
        self, version: str, *, by: By, champion: str | None, why: Mapping[str, Any] | None = None
    ) -> bool:
        """Let a version answer from now on, and write down why.

        What a rule or a training decided holds for the champion it was decided against, and for
        versions that were not rolled back: both are looked at again when no other process writes.

        Args:
            version: what is to answer.
            by: a rule, a person, a rollback, or a training that keeps what answers.
            champion: what answers now, as far as the caller knows.
            why: rule and figures it was decided by.

        Returns:
            False where another version was chosen meanwhile; then nothing was written.

        Raises:
            ModelError: there is no such version, or it is damaged.
            ConfigError: the store cannot be written.
        """
        ModelStore(self.store).verify(NAME, version)
        with self._alone():
            try:
                now = self.version()
            except ModelError:
                if by != "hand":
                    raise
                now = None  # a person writes the damaged file anew
            decided = by in ("rule", "training")
            if decided and (now not in (None, champion) or version in self.rolled_back()):
                return False
            self._write(version, by, now or champion, why)
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While this lasts no other process changes what answers.

        Raises:
            ConfigError: the folder cannot be written, or another process does not end.
        """
        with writing(self._lock):
            file = self._lock.open("ab")
        with file:
            end = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise ConfigError(
                            f"another process has held {self._lock} for {LOCK_SECONDS:g} s",
                            hint="look for a plinth process that was stopped (fuser names it)",
                        ) from None
                    time.sleep(0.01)
            yield

    def _write(
        self, version: str, by: By, champion: str | None, why: Mapping[str, Any] | None
    ) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "from": champion,
            "to": version,
            "by": by,
            **({"why": dict(why)} if why else {}),
        }
        with writing(self._file):
            with self._decisions.open("a+b") as lines:
                end = lines.seek(0, os.SEEK_END)
                lines.seek(max(0, end - 1))
                half = lines.read(1) not in (b"", b"\n")  # of a process that was killed
                lines.write(b"\n" * half + json.dumps(line).encode() + b"\n")
                lines.flush()
                os.fsync(lines.fileno())
            replace_file(self._file, json.dumps({"version": version}).encode() + b"\n")

    def roll_back(self) -> tuple[str, str]:
        """Let the version answer again that did before; returns what did, and what does now.

        Raises:
            ConfigError: there was none before.
        """
        with self._alone():
            now, before = self._before()
            self._write(before, "rollback", now, None)
        return now, before

    def take_back(self, version: str, why: Mapping[str, Any]) -> str | None:
        """Let the version answer again that did before this one, if this one still does.

        Args:
            version: that is taken back.
            why: the figures.

        Returns:
            What answers now; ``None`` where another does than ``version``, and nothing was done.

        Raises:
            ConfigError: there was none before.
        """
        with self._alone():
            if self.version() != version:
                return None
            _, before = self._before()
            self._write(before, "rollback", version, why)
        return before

    def _before(self) -> tuple[str, str]:
        now = self.version()
        changes = [line for line in self.decisions() if line["to"] != line["from"]]
        chosen = [line for line in changes if line["to"] == now and line["by"] != "rollback"]
        last = chosen[-1] if chosen else None
        if now is None or last is None or last["from"] is None:
            raise ConfigError(
                f"no version answered before {now or 'the newest'}",
                hint="plinth finance promote VERSION names one",
            )
        ModelStore(self.store).verify(NAME, last["from"])
        return now, last["from"]

    def decisions(self) -> list[dict[str, Any]]:
        """What was decided, oldest first; of a very long file its end."""
        try:
            with self._decisions.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MAX_BYTES))
                lines = file.read(MAX_BYTES).splitlines()[1 if size > MAX_BYTES else 0 :]
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # half a line, of a process that was killed
                found.append(json.loads(line))
        return [one for one in found if isinstance(one, dict) and {"from", "to", "by"} <= set(one)]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written.

    Raises:
        ConfigError: instead of OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}",
            hint="set verticals.finance.store to a folder of your own, with the models in it",
        ) from None
