"""A lane of several worker processes that hold one model together, each a share of it.

The ranks are sent the same models and batches in the same order. The end of any of them, or a batch
that one of them does not finish in time, ends them all: the lane dies, and is started again whole.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from plinth.engine.devices.device import Device, pick
from plinth.engine.errors import ModelError, OutOfMemory
from plinth.engine.gang.plan import ParallelPlan, Seat, parse
from plinth.engine.lanes.base import Held, LaneDied
from plinth.engine.lanes.process import START_SECONDS, UNKNOWN_SECONDS, Link, RemoteLane
from plinth.engine.lanes.worker import FORGET, LOAD, STEP, UNIT, send
from plinth.engine.lanes.worker_process import WorkerProcess

ServeRank = Callable[[int, int, Seat], None]
"""What each process runs: the descriptor of its socket, CPU threads of a forward, its seat."""


class GangLane(RemoteLane):
    """Runs batches on several worker processes, each of which holds a share of every model.

    Args:
        name: such as ``"gang:cpu:tensor=2"``; see :func:`plinth.engine.gang.plan.parse`.
        serve: a function of a module, which each process runs until its socket ends.
        threads: CPU threads of a forward, in each process.
        backend: of torch.distributed, by which the processes talk.
        budget: bytes of weights that a process may hold; ``None``: any.
        options: depth, costs and hung_seconds as :class:`RemoteLane` takes them. The depth is
            also the number of micro-batches.

    Attributes:
        plan: in how many parts models are cut.

    Raises:
        ConfigError: no such plan or device, or too few devices.
    """

    def __init__(
        self,
        name: str,
        serve: ServeRank,
        threads: int,
        backend: str,
        budget: int | None = None,
        **options: Any,
    ) -> None:
        kind, self.plan = parse(name)
        super().__init__(pick("cpu"), threads, **options)
        self.devices = _devices(kind, self.plan)
        self.backend = backend
        self.serve = serve
        self.micro_batches: int | None = options.get("depth")
        self._name = name
        self._budget = budget
        self._held: dict[str, list[int]] = {}

    @property
    def kind(self) -> str:
        """See :class:`Lane`."""
        return "gang"

    @property
    def label(self) -> str:
        """See :class:`Lane`."""
        return self._name

    @property
    def pids(self) -> list[int]:
        """The numbers of its processes, by rank; none while there are none."""
        link = self._link
        return link.pids if isinstance(link, _Ranks) and link.why is None else []

    def facts(self) -> dict[str, Any]:
        """See :class:`Lane`; the bytes of weights that each rank holds."""
        held = [sum(each) for each in zip(*self._held.copy().values(), strict=True)]
        return {"plan": str(self.plan), "weights_by_rank": held}

    def connect(self) -> Link:
        """See :class:`RemoteLane`."""
        self._held.clear()
        return _Ranks(self)

    def load(self, link: Link, model: Held) -> None:
        """See :class:`RemoteLane`; each rank keeps its share, then they answer together."""
        if model.id in link.loaded:
            return
        recipe: Any = model.recipe()
        try:
            held, _ = link.ask(LOAD, (model.id, recipe), START_SECONDS).result()
            self._hold_against_budget(link, model.id, held)
            if recipe.example is not None:
                asked = link.ask(UNIT, (model.id, recipe.example), START_SECONDS, unit=True)
                model.check(asked.result()[0][0])
        except LaneDied as error:
            raise ModelError(
                f"model {model.id.partition('@')[0]} could not be loaded by {self.label}: "
                f"{error.message}",
                hint="see the log",
            ) from error
        link.loaded.add(model.id)

    def _hold_against_budget(self, link: Link, name: str, held: list[int]) -> None:
        gone = [each for each in self._held if each not in self._models]
        for each in gone:
            del self._held[each]
        self._held[name] = held
        sums = self.facts()["weights_by_rank"]
        if self._budget is None or max(sums) <= self._budget:
            return
        del self._held[name]
        link.tell(FORGET, name)
        raise OutOfMemory(
            f"rank {sums.index(max(sums))} of {self.label} would hold {max(sums)} bytes of weights",
            needed=max(sums),
            available=self._budget,
            hint="use more stages or shares, or raise memory_budget",
        )


def _devices(kind: str, plan: ParallelPlan) -> list[Device]:
    """One for each rank."""
    if kind == "cpu":
        return [pick("cpu")] * plan.ranks
    first = pick(f"{kind}:0")
    plan.fit_devices(kind, torch.accelerator.device_count())
    return [first, *(pick(f"{kind}:{rank}") for rank in range(1, plan.ranks))]


class _Member(RemoteLane):
    """One rank, as its link knows it."""

    def __init__(self, lane: GangLane, ranks: _Ranks, seat: Seat) -> None:
        super().__init__(lane.device, lane.threads, hung_seconds=lane.hung_seconds)
        self.lost = ranks.end
        self._given = (lane.serve, (lane.threads, seat))
        self._name = f"rank {seat.rank} of {lane.label}"

    @property
    def kind(self) -> str:
        """See :class:`Lane`."""
        return "rank"

    @property
    def label(self) -> str:
        """See :class:`Lane`."""
        return self._name

    def connect(self) -> Link:
        """See :class:`RemoteLane`."""
        return Link(self, self._open_process)

    def _open_process(self) -> WorkerProcess:
        process = WorkerProcess(0)
        send(process.socket, b"p", sys.path)
        function, given = self._given
        send(process.socket, STEP, (function, (process.descriptor, *given)))
        return process


class _Ranks(Link):
    """The processes of a gang: links that are asked together and answer as one.

    Attributes:
        why: how the first of them ended; ``None``: all run.
    """

    def __init__(self, lane: GangLane) -> None:  # no process of its own
        self.why = None
        self.loaded = set()
        self._gang = lane
        self._order = threading.RLock()
        self._is_closing = False
        self._folder = Path(tempfile.mkdtemp(prefix="plinth-gang-"))  # of this user alone
        self._links: list[Link] = []
        self.pid = None
        plan = lane.plan
        with self._order:
            for rank in range(plan.ranks):
                meeting = (self._folder / f"replica-{plan.place(rank).replica}").as_uri()
                seat = Seat(
                    plan,
                    rank,
                    meeting,
                    str(lane.devices[rank]),
                    lane.backend,
                    UNKNOWN_SECONDS,
                    lane.micro_batches,
                )
                self._links.append(_Member(lane, self, seat).connect())

    @property
    def pids(self) -> list[int]:
        """The numbers of all processes."""
        return [link.pid for link in self._links if link.pid is not None]

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is one of theirs."""
        return any(link.is_current for link in self._links)

    def await_ready(self) -> None:
        """Wait until all have met.

        Raises:
            DeviceError: one ended before, or takes too long.
        """
        for link in self._links:
            link.await_ready()

    def ask(
        self, kind: bytes, value: tuple[Any, ...], limit: float, *, unit: bool = False
    ) -> Future[tuple[Any, float]]:
        """Send a message to all; the future has what they answer, as one, and the longest time.

        A unit is answered by the outputs of all copies, in the order of the rows, anything else by
        what each rank said.

        Raises:
            LaneDied: one of them has ended.
        """
        messages = self._messages(value) if unit else dict.fromkeys(range(len(self._links)), value)
        with self._order:  # the same order for all
            if self.why is not None:
                raise LaneDied(f"{self._gang.label} ended: {self.why}")
            try:
                asked = {
                    rank: self._links[rank].ask(kind, message, limit, unit=unit)
                    for rank, message in messages.items()
                }
            except BaseException:
                self.kill()  # some may have it, others do not
                raise
        return _together(asked, self._gang.plan if unit else None)

    def _messages(self, value: tuple[Any, ...]) -> dict[int, tuple[Any, ...]]:
        """What each rank is sent of a unit: the rows of its copy; those without rows, nothing."""
        plan, (name, rows) = self._gang.plan, value
        parts = {key: each.tensor_split(plan.replicas) for key, each in rows.items()}
        found = {}
        for rank in range(plan.ranks):
            own = {key: each[plan.place(rank).replica] for key, each in parts.items()}
            if len(next(iter(own.values()))):
                found[rank] = (name, own)
        return found

    def tell(self, kind: bytes, value: Any) -> None:
        """Send a message that is not answered to all."""
        with self._order:
            for link in self._links:
                link.tell(kind, value)

    def end(self, died: LaneDied) -> None:
        """One of them has ended: end all, and tell the lane once."""
        with self._order:
            first, self.why = self.why is None, self.why or died.message
            self.kill()
        if first and not self._is_closing and self._gang.lost is not None:
            self._gang.lost(LaneDied(f"{self._gang.label} ended: {self.why}"))

    def close(self) -> None:
        """Wait for what was sent, and let them end."""
        self._is_closing = True
        for link in self._links:
            link.close()
        self.why = self.why or "it was closed"
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End all at once."""
        for link in self._links:
            link.kill()


def _together(
    asked: dict[int, Future[tuple[Any, float]]], plan: ParallelPlan | None
) -> Future[tuple[Any, float]]:
    """What several ranks answer, as one."""
    whole: Future[tuple[Any, float]] = Future()
    lock, left = threading.Lock(), len(asked)

    def done(one: Future[tuple[Any, float]]) -> None:
        nonlocal left
        with lock:
            left -= 1
            over, died = left == 0, isinstance(one.exception(), LaneDied)
            if whole.done() or not (over or died):
                return
            if died:
                whole.set_exception(one.exception())
                return
        errors = [error for each in asked.values() if (error := each.exception()) is not None]
        if errors:
            whole.set_exception(errors[0])
            return
        values = {rank: each.result()[0] for rank, each in asked.items()}
        seconds = max(each.result()[1] for each in asked.values())
        try:
            answer = list(values.values()) if plan is None else _joined(values, plan)
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            whole.set_exception(error)
        else:
            whole.set_result((answer, seconds))

    for each in asked.values():
        each.add_done_callback(done)
    return whole


def _joined(values: dict[int, tuple[Any, ...]], plan: ParallelPlan) -> tuple[Any, ...]:
    """The outputs of all copies, in the order of the rows."""
    parts = [value[0] for rank, value in values.items() if plan.answers(rank)]
    outputs = parts[0]
    if len(parts) > 1:
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return outputs, *next(iter(values.values()))[1:]
