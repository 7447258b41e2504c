"""Weights that have left memory are brought back beside the lanes, which run others meanwhile.

One model at a time: of the earliest deadline that waits for one. It may leave again only when a
batch has used it, or when nothing waits for it any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from plinth.engine.backends.base import cpu_threads
from plinth.engine.errors import OutOfMemory
from plinth.engine.lanes.beside_thread import BesideThread
from plinth.engine.scheduler.batcher import Batcher
from plinth.engine.scheduler.loads import Loads
from plinth.engine.scheduler.work import BatchKey

MOST_WAIT = 30.0
"""Seconds that a model waits for the memory of others that run."""
_LOOK = 0.02
"""Seconds after which it looks again whether others have left it room, at the latest."""
END_SECONDS = 10.0
"""In which the thread ends after the engine, unless what it loads does not come back."""


class Leaves(Protocol):
    """A model that leaves memory while it is idle; see :class:`Evictable`."""

    @property
    def is_away(self) -> bool:
        """Whether its weights are not in memory."""
        ...

    @property
    def is_kept(self) -> bool:
        """Whether it came back and was not used since."""
        ...

    def unpin(self) -> None:
        """A batch that used it has been run."""
        ...

    def bring_back(self) -> bool:
        """Load it, to stay until it is used; False: others that are in use leave no room now."""
        ...

    def let_go(self) -> None:
        """Let it leave although it was not used."""
        ...


class LoadThread(BesideThread):
    """Loads what waits for weights.

    Args:
        lock: the engine's.
        batcher: knows what waits.
        clock: the engine's.
        threads: CPU threads of a lane; ``None`` as torch has it.
        loaded: told, with the lock held, that a model is there, or that there is room for it.
        failed: told, with the lock free, of which lanes a model could not be loaded, and why.
        broke: told of an error in the engine's own books.
    """

    def __init__(
        self,
        lock: threading.RLock,
        batcher: Batcher,
        clock: Callable[[], float],
        threads: Callable[[], int | None],
        loaded: Callable[[], None],
        failed: Callable[[Loads, BatchKey, BaseException], None],
        broke: Callable[[BaseException], None],
    ) -> None:
        super().__init__(lock, "plinth-loads")
        self._batcher = batcher
        self._clock = clock
        self._threads = threads
        self._tell = loaded, failed, broke
        self._models: dict[tuple[Loads, BatchKey], Leaves] = {}
        self._fresh: list[tuple[Loads, BatchKey]] = []

    def watch(self, loads: Loads, model: BatchKey, runs: Leaves) -> None:
        """Load a model whenever something waits for it; with the lock held."""
        loads.watch(model, lambda: runs.is_away)
        self._models[loads, model] = runs

    def forget(self, loads: Loads, model: BatchKey) -> None:
        """Load a model no more; with the lock held. What waits for it loads it itself."""
        if self._models.pop((loads, model), None) is not None:
            loads.forget(model)

    def wake(self) -> None:
        """Something may wait for weights; with the lock held."""
        if not self._models or self._over or self._batcher.next_load() is None:
            return
        self._begin()
        self._changed.notify()

    def join(self, seconds: float | None = END_SECONDS) -> None:
        """As of every such thread; not for ever, for what it loads may hang."""
        super().join(seconds)

    def _run(self) -> None:
        _, failed, broke = self._tell
        try:
            with cpu_threads(self._threads()):
                while (found := self._next()) is not None:
                    loads, model, runs = found
                    try:
                        self._load(loads, model, runs)
                    except BaseException as error:  # noqa: BLE001 - told to those who wait for it
                        failed(loads, model, error)
        except BaseException as error:  # noqa: BLE001 - the engine's own books: ends the lanes
            broke(error)

    def _next(self) -> tuple[Loads, BatchKey, Leaves] | None:
        """Wait for a model to load, which is the current one then; None: it is over."""
        with self._changed:
            while not self._over:
                found = self._batcher.next_load()
                if found is not None:
                    loads, model = found
                    loads.current = model, self._clock()
                    return loads, model, self._models[found]
                self._let_go()
                self._changed.wait(_LOOK if self._fresh else None)
            self._thread = None
            return None

    def _load(self, loads: Loads, model: BatchKey, runs: Leaves) -> None:
        """Load a model as soon as there is room for it, unless nobody waits for it any more.

        Raises:
            OutOfMemory: others ran for half a minute and left no room.
            BaseException: whatever loading it raises.
        """
        loaded, *_ = self._tell
        begun, came = self._clock(), False
        try:
            while not (came := runs.bring_back()):
                with self._changed:
                    self._let_go()
                    if self._over or not self._batcher.waits_for(loads, model):
                        return
                    if self._clock() - begun > MOST_WAIT:
                        raise OutOfMemory(
                            f"model {model.partition('@')[0]} finds no room beside those that run",
                            needed=1,
                            available=0,
                            hint="raise memory_budget, or use fewer lanes",
                        )
                    self._changed.wait(_LOOK)
        finally:
            with self._changed:
                loads.ended(model)
                if came:
                    loads.learn(model, self._clock() - begun)
                    self._fresh.append((loads, model))
                loaded()

    def _let_go(self) -> None:
        """Let those leave that came back and nobody wants any more; with the lock held."""
        kept = []
        for loads, model in self._fresh:
            runs = self._models.get((loads, model))
            if runs is None or not runs.is_kept:
                continue
            if self._batcher.waits_for(loads, model):
                kept.append((loads, model))
            else:
                runs.let_go()
        self._fresh = kept
