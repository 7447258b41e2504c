"""Who asks the engine on LoadGen's behalf, and what became of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from plinth.engine.benchmark import loadgen
from plinth.engine.errors import InputError, PlinthError, Refused
from plinth.engine.flow import Flow, Sla
from plinth.engine.runtime.engine import Engine

LATE = 1.05  # a refused query is reported to LoadGen at this multiple of the allowed latency
AHEAD = 4  # Offline: flows in work at a time, so that the device never runs dry


@dataclass(frozen=True)
class Sut:
    """The system under test, as MLPerf calls it: what is measured.

    Args:
        name: for the report.
        samples: how many different requests there are; LoadGen draws among them.
        flow: makes the flow for some of them, by number from 0.
        chunk: Offline: samples per flow.
        heavy: the flow's own steps take long, so each runs on a worker thread.
    """

    name: str
    samples: int
    flow: Callable[[Sequence[int]], Flow[Any]]
    chunk: int = 256
    heavy: bool = False


@dataclass
class Tally:
    """What became of the samples of one test.

    Args:
        issued: by LoadGen.
        answered: by the engine.
        refused: by the engine, by reason.
        failed: all others, by reason.
        bug: the first error that is not one of ours.
    """

    issued: int = 0
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    bug: Exception | None = None

    def note(self, value: Any, count: int) -> None:
        """A flow ended; InputErrors in a list of answers are failures."""
        values = value if isinstance(value, list) else []
        wrong = Counter(one.reason for one in values if isinstance(one, InputError))
        self.failed += wrong
        self.answered += count - wrong.total()

    def fail(self, error: Exception, count: int) -> None:
        """A flow raised."""
        if isinstance(error, Refused):
            self.refused[error.reason] += count
        elif isinstance(error, PlinthError):
            self.failed[error.reason] += count
        else:
            self.failed["bug"] += count
            self.bug = self.bug or error


@dataclass
class LoneCaller:
    """Asks in LoadGen's own thread, one query after the other."""

    engine: Engine
    sut: Sut
    sla: Sla
    tally: Tally

    def issue(self, queries: Sequence[Any]) -> None:
        """Answer them; LoadGen is C++, so an error must not leave this function."""
        for query in queries:
            self.tally.issued += 1
            try:
                answer = self.engine.run(self.sut.flow([query.index]), self.sla)
                self.tally.note(answer.value, 1)
            except Exception as error:  # noqa: BLE001 - raised again after the test
                self.tally.fail(error, 1)
            loadgen.complete([query.id])


class Callers:
    """Many callers: tasks of an event loop in a thread, as at the HTTP door. A context manager.

    Args:
        engine: started.
        sut: what to ask.
        sla: the promise asked for.
        tally: what became of it.
    """

    def __init__(self, engine: Engine, sut: Sut, sla: Sla, tally: Tally) -> None:
        self._engine, self._subject, self._sla, self._tally = engine, sut, sla, tally
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="plinth-callers")
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(AHEAD)

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def issue_each(self, queries: Sequence[Any]) -> None:
        """Start a flow for each query at once."""
        self._tally.issued += len(queries)
        now = time.monotonic()
        for query in queries:
            self._loop.call_soon_threadsafe(self._begin, self._in_time(query.id, query.index, now))

    def issue_chunks(self, queries: Sequence[Any]) -> None:
        """Start flows of many samples each; a few are in work at a time."""
        self._tally.issued += len(queries)
        pairs = [(query.id, query.index) for query in queries]
        for first in range(0, len(pairs), self._subject.chunk):
            part = pairs[first : first + self._subject.chunk]
            self._loop.call_soon_threadsafe(self._begin, self._in_bulk(part))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_bulk(self, pairs: list[tuple[int, int]]) -> None:
        async with self._places:
            await self._ask([number for _, number in pairs])
        loadgen.complete(one for one, _ in pairs)

    async def _in_time(self, one: int, number: int, issued: float) -> None:
        if not await self._ask([number]) and self._sla.deadline_ms is not None:
            over = issued + LATE * self._sla.deadline_ms / 1e3
            await asyncio.sleep(max(0.0, over - time.monotonic()))
        loadgen.complete([one])

    async def _ask(self, numbers: Sequence[int]) -> bool:
        """Whether there is an answer; LoadGen waits for each query, so nothing may be raised."""
        try:
            flow = self._subject.flow(numbers)
            if self._subject.heavy:
                answer = await asyncio.to_thread(self._engine.run, flow, self._sla)
            else:
                answer = await self._engine.run_async(flow, self._sla)
        except Exception as error:  # noqa: BLE001 - raised again after the test
            self._tally.fail(error, len(numbers))
            return False
        self._tally.note(answer.value, len(numbers))
        return True
