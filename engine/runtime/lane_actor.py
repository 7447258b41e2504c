"""What the actor of a lane does on its machine: it loads models, runs units and answers."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from plinth.engine.backends.base import cpu_threads
from plinth.engine.lanes import worker
from plinth.engine.lanes.cluster.identity import identity
from plinth.engine.lanes.cluster.parcel import Parcel, Shelf
from plinth.engine.runtime.lane_worker import Forward, Models, reply
from plinth.engine.runtime.recipe import Recipe

_APART = 100_000
_RECORDS = 1000


class Actor:
    """One lane's side on a machine of a cluster; values come and go packed.

    Args:
        threads: CPU threads of a forward.
        level: of log records that the engine wants to have.
        shelf: where models are kept that were sent here.
    """

    def __init__(self, threads: int, level: int, shelf: Shelf | None = None) -> None:
        self._models = Models(threads)
        self._held = threading.local()
        self._shelf = shelf or Shelf()
        self._coming: dict[str, tuple[Parcel, Path]] = {}
        self._places: dict[Path, Path] = {}
        self._records: deque[tuple[str, int, str]] = deque(maxlen=_RECORDS)
        root = logging.getLogger()
        root.handlers[:] = [Forward(self._records.append)]
        root.setLevel(level)
        worker.yield_to_others(0)

    def about(self) -> dict[str, Any]:
        """What runs here."""
        return {**identity(), "pid": os.getpid()}

    def records(self) -> Any:
        """What was logged since the last time."""
        found = []
        while self._records:
            found.append(self._records.popleft())
        return _packed(found)

    def unit(self, packed: Any) -> Any:
        """Run rows."""
        number, name, rows = worker.unpack(packed)
        return self._answer(number, name, lambda: self._models.run(name, rows))

    def load(self, packed: Any) -> Any:
        """Load a model by its recipe."""
        number, name, recipe = worker.unpack(packed)
        return self._answer(number, name, lambda: self._models.load(name, self._found(recipe)))

    def need(self, packed: Any) -> Any:
        """Which files of a model have to be sent: none, where it lies here, or was just sent."""
        number, parcel, sent = worker.unpack(packed)
        return self._answer(number, parcel.inner, lambda: self._wanted(parcel, sent))

    def piece(self, packed: Any) -> Any:
        """Put a piece of a file of a model where it belongs."""
        number, digest, name, offset, data = worker.unpack(packed)

        def put() -> None:
            parcel, folder = self._coming[digest]
            self._shelf.put(parcel, folder, name, offset, data)

        return self._answer(number, name, put)

    def forget(self, packed: Any) -> None:
        """Let a model go."""
        self._models.forget(worker.unpack(packed))

    def _wanted(self, parcel: Parcel, sent: bool) -> list[str]:
        if sent:
            self._places[parcel.path] = self._shelf.keep(*self._coming.pop(parcel.digest))
            return []
        found = self._shelf.find(parcel)
        if found is not None:
            self._places[parcel.path] = found
            return []
        self._coming[parcel.digest] = parcel, self._shelf.begin(parcel)
        return [file.name for file in parcel.files]

    def _found(self, recipe: Recipe) -> Recipe:
        return replace(recipe, path=self._places.get(recipe.path, recipe.path))

    def _answer(self, number: int, told: str, work: Callable[[], Any]) -> Any:
        if not hasattr(self._held, "threads"):  # for as long as this thread lives
            self._held.threads = cpu_threads(self._models.threads)
            self._held.threads.__enter__()
        return _packed(reply(number, told, work))


def _packed(value: Any) -> Any:
    memory = worker.pack(value)
    return bytes(memory) if len(memory) < _APART else numpy.frombuffer(memory, "u1")
