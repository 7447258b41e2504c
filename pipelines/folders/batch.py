"""The folder door: every item below a folder, resumable, one bad item never stops the rest.

While one item infers, the next one loads: ``workers`` items are in the engine and one more is
ready. Each item's outputs appear whole in ``<out>/<id>/``; ``journal.jsonl`` remembers, and
``failed.jsonl`` lists what failed and why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from plinth.engine import Cancelled, Closed, ConfigError, Engine, PlinthError, Sla
from plinth.pipelines.folders.items import (
    Finished,
    Steps,
    analyse,
    discover,
    fingerprint,
    replace_file,
    sweep,
    versions,
)
from plinth.pipelines.folders.journal import Entry, Journal
from plinth.verticals import Item, Vertical

State = Literal["done", "failed", "skipped", "failed before", "open"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that happened; given to ``on_progress`` from worker threads, one at a time.

    Args:
        kind: ``"total"`` (once, with ``total``), ``"stage"`` or ``"finished"``.
        item: id of the item.
        stage: ``"load"``, ``"infer"`` or ``"write"``.
        state: how the item ended.
        total: number of items found.
    """

    kind: Literal["total", "stage", "finished"]
    item: str = ""
    stage: str = ""
    state: State = "open"
    total: int = 0


@dataclass(slots=True)
class Summary:
    """What a batch came to.

    Args:
        states: how each item of the folder stands, by id, in the order found.
        entries: the journal's word on each item that has one, by id.
        seconds: wall time of this run.
        interrupted: the run was told to stop before the end.
    """

    states: dict[str, State] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
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
        """0 when every item is done, 1 when some failed or stayed open."""
        return 1 if self.failed or self.count("open") else 0

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON-ready data."""
        return {
            "items": len(self.states),
            "done": self.count("done"),
            "skipped": self.count("skipped"),
            "failed": len(self.failed),
            "open": self.count("open"),
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "states": self.states,
            "failures": [{"id": entry.id, **(entry.error or {})} for entry in self.failed],
        }


class Batch:
    """One run over one folder.

    Args:
        vertical: a folder vertical.
        engine: a started engine that has the vertical's models.
        folder: where items are found.
        out: where outputs go; not inside ``folder``.
        sla: the promise per item; background by default.
        workers: items in the engine at the same time.
        resume: skip what the journal has as done by the same models on the same files.
        retry_failed: run items again that failed before.
        on_progress: told what happens.

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
        resume: bool = True,
        retry_failed: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        check_folders(folder, out)
        self.vertical = vertical
        self.engine = engine
        self.folder = folder
        self.out = out
        self.sla = sla or Sla()
        self.workers = workers
        self.resume = resume
        self.retry_failed = retry_failed
        self.models = versions(vertical)
        self.summary = Summary()
        self._tell = on_progress
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._device = threading.BoundedSemaphore(workers)

    def stop(self) -> None:
        """Begin no new item; those in work end by themselves, or at once with the engine."""
        self._stop.set()

    def run(self) -> Summary:
        """Work through the folder.

        Raises:
            ConfigError: nothing found, or another run holds ``out``.
            InputError: the vertical cannot read the folder.
            PlinthError: ``out`` cannot be written to.
        """
        started = time.perf_counter()
        try:
            with Journal(self.out) as journal:
                sweep(self.out)
                todo = iter(self._open_items(self._found(), journal))
                self._work_all(todo, journal)
                self._finish(journal, started)
        except OSError as error:
            raise PlinthError(
                f"cannot write to {self.out}: {error.strerror}",
                hint="make room or change the permissions, then run it again: it goes on",
            ) from error
        return self.summary

    def _found(self) -> list[Item]:
        items: list[Item] = []
        for item in discover(self.vertical, self.folder):
            if self._stop.is_set():
                return items
            items.append(item)
        if not items:
            raise ConfigError(
                f"{self.vertical.name} found nothing to do in {self.folder}",
                hint="check the folder and the vertical",
            )
        self._tell(Progress("total", total=len(items)))
        return items

    def _work_all(self, todo: Iterator[Item], journal: Journal) -> None:
        with ThreadPoolExecutor(self.workers + 1, thread_name_prefix="plinth-batch") as pool:
            workers = [pool.submit(self._work, todo, journal) for _ in range(self.workers + 1)]
        for worker in workers:
            worker.result()

    def _open_items(self, items: Sequence[Item], journal: Journal) -> list[Item]:
        left = []
        for item in items:
            state = self._known(item, journal.entries.get(item.id))
            self.summary.states[item.id] = state
            if state == "open":
                left.append(item)
            else:
                self._tell(Progress("finished", item.id, state=state))
        return left

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
            with self._lock:
                item = next(todo, None)
            if item is None:
                return
            self._one(item, journal)

    def _one(self, item: Item, journal: Journal) -> None:
        started = time.perf_counter()
        steps = Steps(self._device, lambda stage: self._stage(item, stage))
        entry = Entry(item.id, "failed", self.models, self._inputs(item), facts=item.facts)
        change: dict[str, Any]
        try:
            done = analyse(
                self.vertical, self.engine, item, self.out / item.id, sla=self.sla, steps=steps
            )
            change = _success(done)
        except (Closed, Cancelled):
            self._stop.set()
            return
        except PlinthError as error:
            change = {"error": error.as_dict(), "seconds": time.perf_counter() - started}
        with self._lock:
            entry = replace(entry, **change)
            journal.add(entry)
            self.summary.states[item.id] = entry.state
            if entry.state == "failed":
                self._write_failed(journal)
            self._tell(Progress("finished", item.id, state=entry.state))

    def _stage(self, item: Item, stage: str) -> None:
        with self._lock:
            self._tell(Progress("stage", item.id, stage=stage))

    def _write_failed(self, journal: Journal) -> None:
        self.summary.entries = journal.entries
        lines = [
            orjson.dumps({"id": entry.id, **(entry.error or {}), "facts": entry.facts})
            for entry in self.summary.failed
        ]
        replace_file(self.out / "failed.jsonl", b"".join(line + b"\n" for line in lines))

    def _finish(self, journal: Journal, started: float) -> None:
        self._write_failed(journal)
        self.summary.seconds = time.perf_counter() - started
        self.summary.interrupted = self._stop.is_set()
        replace_file(
            self.out / "summary.json",
            orjson.dumps(self.summary.as_dict(), option=orjson.OPT_INDENT_2),
        )


def check_folders(folder: Path, out: Path) -> None:
    """Refuse an absent input folder and an output folder that lies inside it."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", hint="name an existing folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"the output {out} lies inside the input {folder}",
            hint="choose an --out beside the input, so that results are never read as input",
        )


def _success(done: Finished) -> dict[str, Any]:
    return {"state": "done", "seconds": done.seconds, "files": done.files}
