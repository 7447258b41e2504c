"""The folder door: every item below a folder, resumable, one bad item never stops the rest.

Work begins with the first item found. ``workers + 1`` items are in work, ``workers`` of them may be
with the engine: while one waits for the device, the next one loads or goes through its own steps.
Each item's outputs appear whole in ``<out>/<id>/``; ``journal.jsonl`` remembers, ``failed.jsonl``
lists what failed and why, and ``cohort.csv`` says which files each result is of.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

import orjson

from plinth.engine import (
    Cancelled,
    Closed,
    ConfigError,
    Engine,
    EngineFailed,
    PlinthError,
    Sla,
)
from plinth.engine.files import replace_file
from plinth.pipelines.folders.items import (
    Finished,
    Steps,
    analyse,
    fingerprint,
    printable,
    survey,
    versions,
)
from plinth.pipelines.folders.journal import Entry, Journal
from plinth.pipelines.folders.storage import StorageError, check_folders, storing, sweep
from plinth.pipelines.observability.tracing import Begun
from plinth.verticals import Item, LeftOut, Vertical

AGAIN = "make room or change the permissions, then run it again: it goes on"
MAX_COLUMNS = 16_384
"""Columns of the cohort's table: as many as a spreadsheet opens."""
COLUMNS = ("id", "state", "source", "files", "seconds", "reason", "message")
LEFT_OUT = ".partial-left-out.csv"
"""Rows of files that are no item, until they become part of the cohort's table."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet run a cell."""
Carry = Callable[[Item, Path, Sla, Steps], Finished]
"""Carries an item to its outputs in a folder, as :func:`plinth.pipelines.folders.items.analyse`."""
State = Literal["done", "failed", "skipped", "failed before", "open"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that happened; given to ``on_progress`` from worker threads, one at a time.

    Args:
        kind: ``"found"`` (with the ``total`` so far), ``"stage"`` or ``"finished"``.
        item: id of the item.
        stage: ``"load"``, ``"infer"`` or ``"write"``.
        state: how the item ended.
        total: number of items found so far.
    """

    kind: Literal["found", "stage", "finished"]
    item: str = ""
    stage: str = ""
    state: State = "open"
    total: int = 0


@dataclass(slots=True)
class Summary:
    """What a batch came to.

    Args:
        states: how each item of the folder stands, by id, in the order found.
        left_out: rows of the cohort's table for files that are no item, by state.
        entries: the journal's word on each item that has one, by id.
        sources: the file or folder each item was found in, relative to the input, and how many
            files it is made of, by id.
        seconds: wall time of this run.
        interrupted: the run was told to stop before the end.
    """

    states: dict[str, State] = field(default_factory=dict)
    left_out: Counter[State] = field(default_factory=Counter)
    entries: dict[str, Entry] = field(default_factory=dict)
    sources: dict[str, tuple[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    def count(self, *states: State) -> int:
        """Number of items in any of the states."""
        return sum(state in states for state in self.states.values())

    @property
    def failed(self) -> list[Entry]:
        """Entries of the items that stand as failed, in the order found."""
        kept = ("failed", "failed before")
        return [self.entries[name] for name, state in self.states.items() if state in kept]

    @property
    def exit_code(self) -> int:
        """0 when every item is done, 1 when items or files failed, or items stayed open."""
        return 1 if self.failed or self.left_out["failed"] or self.count("open") else 0

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data."""
        return {
            "found": len(self.states) + self.left_out.total(),
            "items": len(self.states),
            "done": self.count("done"),
            "skipped": self.count("skipped") + self.left_out["skipped"],
            "failed": len(self.failed) + self.left_out["failed"],
            "open": self.count("open"),
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "states": self.states,
            "failures": [{"id": entry.id, **(entry.error or {})} for entry in self.failed],
        }

    def cohort(self, numbers: Callable[[str], Mapping[str, float]]) -> Iterator[str]:
        """A table as CSV, line by line: each item, its state, its source, its result's numbers.

        Args:
            numbers: those of an item's result by name; asked for twice and never kept.
        """
        names: set[str] = set()
        for name in self.states:
            for key in numbers(name):
                if len(names) < MAX_COLUMNS - len(COLUMNS):
                    names.add(key)
        columns = sorted(names)
        yield _row([*COLUMNS, *columns])
        for name, state in self.states.items():
            entry = self.entries.get(name)
            error = (entry and entry.error) or {}
            source, files = self.sources.get(name, ("", 0))
            found = numbers(name)
            more = len(found.keys() - names)
            reason, message = error.get("reason"), error.get("message")
            if state == "skipped":
                reason, message = "done_before", "done by an earlier run"
            if more:
                message = f"{more} more numbers stand in its own files alone"
            cells = [name, state, source, files, entry and round(entry.seconds, 3), reason, message]
            yield _row([*cells, *map(found.get, columns)])


class Batch:
    """One run over one folder.

    Args:
        vertical: a folder vertical.
        engine: a started engine that has the vertical's models.
        folder: where items are found.
        out: where outputs go; not inside ``folder``.
        sla: the promise per item; background by default.
        workers: items with the engine at the same time; one more is in work.
        processes: worker processes that the engine has; one item more than these is in work.
        carry: what carries an item to its outputs, whole; ``None``: the engine here, and its
            processes the heavy steps.
        resume: skip what the journal has as done by the same models on the same files.
        retry_failed: run items again that failed before.
        on_progress: told what happens.
        within: the span in which those of the items are, if traces are asked for.

    Raises:
        ConfigError: the folder is absent, or ``out`` lies inside it.
    """

    def __init__(
        self,
        vertical: Vertical[Any, Any],
        engine: Engine,
        folder: Path,
        out: Path,
        *,
        sla: Sla | None = None,
        workers: int = 1,
        processes: int = 0,
        carry: Carry | None = None,
        resume: bool = True,
        retry_failed: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        within: Begun | None = None,
    ) -> None:
        check_folders(folder, out)
        self.vertical = vertical
        self.engine = engine
        self.folder = folder
        self.out = out
        self.sla = sla or Sla()
        self.workers = workers
        self.in_work = max(workers, processes) + 1
        self.resume = resume
        self.retry_failed = retry_failed
        self.models = versions(vertical)
        self.summary = Summary()
        self._carry = carry or self._analyse
        self._tell, self._within = on_progress, within
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._finding = threading.Lock()
        self._device = threading.BoundedSemaphore(workers)
        self._broken: PlinthError | None = None

    def stop(self) -> None:
        """Begin no new item; those in work end by themselves, or at once with the engine."""
        self._stop.set()

    def run(self) -> Summary:
        """Work through the folder.

        Raises:
            ConfigError: nothing found, or another run holds ``out``.
            InputError: the vertical cannot read the folder, or could not to its end; what it
                found before has been worked through.
            SoftwareFault: as above, through a fault of the vertical.
            StorageError: ``out`` cannot be written to.
        """
        started = time.perf_counter()
        try:
            with Journal(self.out) as journal, storing():
                self.summary.entries = journal.entries
                sweep(self.out)
                replace_file(self.out / "failed.jsonl", b"")
                with os.fdopen(_owners_file(self.out / LEFT_OUT), "w") as left_out:
                    self._work_all(self._open_items(journal, left_out), journal)
                self._finish(started, journal)
        except StorageError as error:
            self._broken = error
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.out}: {error.strerror}", hint=AGAIN
            ) from error
        if isinstance(self._broken, StorageError):
            raise type(self._broken)(
                f"cannot write to {self.out}: {self._broken.message}", hint=AGAIN
            ) from self._broken
        if self._broken is not None:
            raise self._broken
        return self.summary

    def _work_all(self, todo: Iterator[Item], journal: Journal) -> None:
        with ThreadPoolExecutor(self.in_work, thread_name_prefix="plinth-batch") as pool:
            workers = [pool.submit(self._work, todo, journal) for _ in range(self.in_work)]
        for worker in workers:
            worker.result()
        if not self.summary.states and self._broken is None and not self._stop.is_set():
            self._broken = ConfigError(
                f"{self.vertical.name} found nothing to do in {self.folder}",
                hint="check the folder and the vertical",
            )

    def _open_items(self, journal: Journal, left_out: TextIO) -> Iterator[Item]:
        """Items that are to be worked on, as they are found; the others are told at once."""
        for item in survey(self.vertical, self.folder):
            if isinstance(item, LeftOut):
                self._leave_out(item, left_out)
                continue
            for name in item.replaces:
                self._withdraw(name, journal)
            state = self._known(item, journal.entries.get(item.id))
            with self._lock:
                self.summary.states[item.id] = state
                self.summary.sources[item.id] = _source(item, self.folder), len(item.paths)
                self._tell(Progress("found", total=len(self.summary.states)))
                if state != "open":
                    self._tell(Progress("finished", item.id, state=state))
            if state == "failed before":
                self._note_failed(journal.entries[item.id])
            if state == "open":
                yield item

    def _leave_out(self, one: LeftOut, table: TextIO) -> None:
        state: State = "failed" if one.failed else "skipped"
        self.summary.left_out[state] += 1
        source = printable(os.path.relpath(one.path, self.folder))
        message = printable(one.message)
        with storing():
            table.write(_row(["", state, source, one.files, None, one.reason, message]))

    def _withdraw(self, name: str, journal: Journal) -> None:
        """Remove an item that was told before all its files were seen, once it is not in work."""
        with self._settled:
            while self.summary.states.get(name) == "open" and not self._stop.is_set():
                self._settled.wait(0.5)
            self.summary.states.pop(name, None)
            with storing():
                if name in journal.entries:
                    journal.add(Entry(name, "withdrawn", {}, ""))
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)

    def _known(self, item: Item, entry: Entry | None) -> State:
        if entry is None or not self.resume:
            return "open"
        if entry.models != self.models or entry.inputs != self._inputs(item):
            return "open"
        if entry.state == "failed":
            return "open" if self.retry_failed else "failed before"
        return "skipped" if (self.out / item.id).is_dir() else "open"

    def _inputs(self, item: Item) -> str:
        return fingerprint(item, self.vertical.settings)

    def _work(self, todo: Iterator[Item], journal: Journal) -> None:
        while not self._stop.is_set():
            try:
                with self._finding:
                    item = next(todo, None)
                if item is None:
                    return
                self._one(item, journal)
            except (StorageError, EngineFailed) as error:
                self._broken = error
                self._stop.set()
            except PlinthError as error:  # no more items can be found
                self._broken = error
                return

    def _one(self, item: Item, journal: Journal) -> None:
        started = time.perf_counter()
        steps = Steps(self._device, lambda stage: self._stage(item, stage), self._within)
        facts = printable(item.facts)
        entry = Entry(item.id, "failed", self.models, self._inputs(item), facts=facts)
        change: dict[str, Any]
        try:
            change = _success(self._carry(item, self.out / item.id, self.sla, steps))
        except (Closed, Cancelled):
            self._stop.set()
            return
        except (StorageError, EngineFailed):  # no other item would fare better
            raise
        except PlinthError as error:
            change = {"error": steps.failure(error), "seconds": time.perf_counter() - started}
        entry = replace(entry, **change)
        with self._lock, storing():
            journal.add(entry)
            state: State = "failed" if entry.state == "failed" else "done"
            self.summary.states[entry.id] = state
            self._settled.notify_all()
            self._tell(Progress("finished", entry.id, state=state))
        if entry.state == "failed":
            self._note_failed(entry)

    def _analyse(self, item: Item, folder: Path, sla: Sla, steps: Steps) -> Finished:
        return analyse(self.vertical, self.engine, item, folder, sla=sla, steps=steps)

    def _stage(self, item: Item, stage: str) -> None:
        with self._lock:
            self._tell(Progress("stage", item.id, stage=stage))

    def _note_failed(self, entry: Entry) -> None:
        with self._lock, storing(), (self.out / "failed.jsonl").open("ab") as file:
            file.write(_failed_line(entry))

    def _finish(self, started: float, journal: Journal) -> None:
        self.summary.seconds = time.perf_counter() - started
        self.summary.interrupted = self._stop.is_set()
        replace_file(self.out / "failed.jsonl", b"".join(map(_failed_line, self.summary.failed)))
        left_out = self.out / LEFT_OUT
        with left_out.open("rb") as rows:
            items = (row.encode() for row in self.summary.cohort(journal.numbers))
            table = itertools.chain(items, rows)
            replace_file(self.out / "cohort.csv", table, mode=0o600)
        left_out.unlink()
        replace_file(
            self.out / "summary.json",
            orjson.dumps(self.summary.as_dict(), option=orjson.OPT_INDENT_2),
        )


def _success(done: Finished) -> dict[str, Any]:
    return {
        "state": "done",
        "seconds": done.seconds,
        "files": done.files,
        "numbers": dict(_numbers(orjson.loads(done.encoded), "")),
    }


def _owners_file(path: Path) -> int:
    """A new file that only its owner can read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _failed_line(entry: Entry) -> bytes:
    return orjson.dumps({"id": entry.id, **(entry.error or {}), "facts": entry.facts}) + b"\n"


def _source(item: Item, folder: Path) -> str:
    """The file an item was found in, or the folder that all its files lie in."""
    places = item.paths
    if not places:
        return ""
    common = places[0] if len(places) == 1 else Path(os.path.commonpath(places))
    return str(printable(os.path.relpath(common, folder)))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float | bool]]:
    """The numbers of a result by dotted name.

    Of a list, those of entries that have a ``key`` and a ``value``; the rest of it, and texts, are
    left out. Of ``warnings`` it is how many there are.
    """
    if name == "warnings" and isinstance(value, list):
        yield name, len(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, dict) and isinstance(one.get("key"), str):
                yield from _numbers(one.get("value"), f"{name}.{one['key']}")
    elif isinstance(value, bool | int | float) and math.isfinite(value):
        yield name, value


def _row(cells: Sequence[Any]) -> str:
    """A line of a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(_cell, cells))
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet takes for text, whatever it begins with."""
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULA else value
