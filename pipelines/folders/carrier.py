"""Whole items in worker processes, each of which has models and an engine of its own.

For a cohort, where nothing urgent shares the machine: a worker reads, infers and writes its item on
its own cores, and nothing but the name of the item and what became of it crosses. The process that
found the items keeps the journal.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from plinth.engine import Compute, ComputeError, ConfigError, Engine, EngineFailed, PlinthError, Sla
from plinth.engine.cache import cache_folder
from plinth.engine.devices.device import pick
from plinth.engine.memory.plan import budget
from plinth.engine.models.store import choose_store
from plinth.pipelines.assembly import load_vertical, running
from plinth.pipelines.config.settings import Config
from plinth.pipelines.folders.items import Finished, Steps, analyse, within_span
from plinth.verticals import Item, Vertical

ITEM_SECONDS = 6 * 3600.0
"""After which a process that still has its item is ended."""
Own = tuple[Vertical[Any, Any], Engine]
Make = Callable[..., AbstractContextManager[Own]]
"""Gives a worker its own vertical and its own started engine; a function of a module."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of an item in a worker.

    Args:
        done: it went well; without the result itself, which may be a volume.
        error: or it did not.
        stage: the last step it came to.
        begun: when each step began (``perf_counter`` there).
    """

    done: Finished | None
    error: PlinthError | None
    stage: str
    begun: dict[str, float]


@dataclass(frozen=True, slots=True)
class Carrier:
    """Has items carried to their outputs by the worker processes of an engine.

    Args:
        engine: whose processes; it needs no model of its own.
        vertical: that finds the items.
        make: what each process gets its own vertical and engine from.
        given: its arguments, picklable.
    """

    engine: Engine
    vertical: Vertical[Any, Any]
    make: Make
    given: tuple[Any, ...] = ()
    key: str = field(default_factory=lambda: uuid4().hex)

    def prepare(self) -> None:
        """Let the processes be forked from one that has imported what they need (Linux)."""
        modules = __name__, type(self.vertical).__module__, *self.vertical.preloaded
        self.engine.prepare_steps(*modules, niceness=0)

    def carry(self, item: Item, folder: Path, sla: Sla, steps: Steps) -> Finished:
        """As :func:`plinth.pipelines.folders.items.analyse`.

        Raises:
            ComputeError: the process ended, or had the item for six hours.
            EngineFailed: the process could not make an engine, or its engine ended.
            PlinthError: as in ``analyse``.
        """
        return within_span(self.vertical, steps, lambda: self._carry(item, folder, sla, steps))

    def _carry(self, item: Item, folder: Path, sla: Sla, steps: Steps) -> Finished:
        steps.begin("load")
        given = (self.key, self.make, self.given, item, self.vertical.hand_over(item), folder, sla)
        future = self.engine.compute(Compute(carry, *given, seconds=ITEM_SECONDS))
        try:
            found: Carried = future.result()
        except ComputeError:
            steps.stage = "carry"
            raise
        steps.stage = found.stage
        steps.begun.update(found.begun)
        if found.done is None:
            assert found.error is not None
            raise found.error
        return found.done


def carry(
    key: str,
    make: Make,
    given: tuple[Any, ...],
    item: Item,
    known: Any,
    folder: Path,
    sla: Sla,
) -> Carried:
    """Carry an item in this process, whose engine is made for the first one.

    Args:
        key: of the carrier.
        make, given: see :class:`Carrier`.
        item: found in another process.
        known: what was found out of it there; see :meth:`Vertical.hand_over`.
        folder: final place of its outputs.
        sla: the promise.

    Raises:
        EngineFailed: there is no engine.
    """
    vertical, engine = _owned(key, make, given)
    vertical.take_over(item, known)
    steps = Steps()
    try:
        done = analyse(vertical, engine, item, folder, sla=sla, steps=steps)
    except PlinthError as error:
        told = error.with_traceback(None)
        told.__cause__ = told.__context__ = None
        return Carried(None, told, steps.stage, steps.begun)
    done = replace(done, answer=replace(done.answer, value=None))
    return Carried(done, None, steps.stage, steps.begun)


_owns: dict[str, tuple[ExitStack, Own]] = {}


def _owned(key: str, make: Make, given: tuple[Any, ...]) -> Own:
    """This process's vertical and engine for a carrier; those of another one are closed."""
    if key not in _owns:
        while _owns:
            _owns.popitem()[1][0].close()
        stack = ExitStack()
        try:
            with _first_alone(key):
                _owns[key] = stack, stack.enter_context(make(*given))
        except PlinthError as error:
            stack.close()
            raise EngineFailed(
                f"a worker process could not be made ready: {error.message}", hint=error.hint
            ) from None
    return _owns[key][1]


@contextmanager
def _first_alone(key: str) -> Iterator[None]:
    """Let the first process of a carrier make its engine while the others wait.

    Which backend and precision is fastest it measures undisturbed, and keeps; the others take what
    was kept, so that all items of a cohort are inferred alike.
    """
    with (cache_folder("batch") / "first").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() == key:
            fcntl.flock(file, fcntl.LOCK_UN)
            yield
            return
        yield
        file.truncate(0)
        file.write(key)


@contextmanager
def own_engine(config: Config, name: str) -> Iterator[Own]:
    """A vertical and a started engine, as the config says; for :class:`Carrier`."""
    vertical = load_vertical(config, name)
    with (
        choose_store(config.models.store),
        running(config, {name: vertical}, follow=True) as engine,
    ):
        yield vertical, engine


def shares_of(config: Config, processes: int) -> Config | None:
    """The config of each of so many processes that have a CPU engine of their own.

    Returns:
        None where each should not: the config names lanes, or the device is an accelerator, which
        several processes would have to share. Then their forwards are left to one engine.

    Raises:
        ConfigError, DeviceError: there is no such device.
    """
    engine = config.engine
    if processes < 1:
        raise ConfigError(f"batch.processes is {processes}, expected 1 or more")
    device = pick(engine.device)
    if engine.devices is not None or device.kind != "cpu":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = engine.memory_budget or budget(device)
    changes: dict[str, Any] = {
        "device": "cpu",
        "compute_workers": 0,
        "latency_file": None,
        "threads": engine.threads or max(1, (cores or 1) // processes),
        "memory_budget": max(1 << 20, memory // processes),
    }
    return config.model_copy(update={"engine": engine.model_copy(update=changes)})
