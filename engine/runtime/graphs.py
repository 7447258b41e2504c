"""Forwards captured once and replayed: one launch in place of one for every operation.

A graph holds the operations of one forward at one number of rows, and where their tensors lie.
Python of the model does not run again when it is replayed.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from statistics import median

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable, Wrapped
from plinth.engine.backends.choice import TOLERANCE, difference
from plinth.engine.devices.device import Device

_log = logging.getLogger(__name__)

MOST = 12
"""Graphs of one model that are kept."""
SECONDS = 6.0
"""Of capturing and timing all graphs of a model, about."""
SHARE = 0.1
"""Of the model's memory budget that all its graphs may take."""
LOSS = 1.05
"""Times the seconds of a forward that a replay may take. It asks for the interpreter once, a
forward once for each operation, and beside busy threads may wait for it each time."""
EACH = 8
"""Rows up to which a number gets a graph of its own where that of a larger one takes longer."""
_WARM = 3  # runs before a capture, so that libraries have chosen their kernels
_TIMED = 7


class Graph:
    """One captured forward; see :class:`Graphed`.

    Args:
        executable: what it is captured from.
        inputs: rows that the forward takes.
        stream: where it is captured.

    Raises:
        RuntimeError: it cannot be captured: it waits for the device, or uses the host's memory.
    """

    def __init__(
        self, executable: Executable, inputs: Mapping[str, Tensor], stream: torch.Stream
    ) -> None:
        device = executable.device
        self._graph = device.graph()
        self.rows = len(next(iter(inputs.values())))
        with torch.inference_mode(), stream:
            self._inputs = {name: each.to(device.torch, copy=True) for name, each in inputs.items()}
            for _ in range(_WARM):
                executable.run(self._inputs)
            device.synchronize()
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._outputs = executable.run(self._inputs)
            finally:
                self._graph.capture_end()
        device.synchronize()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay it for as many rows or fewer; what lies behind them is computed and dropped."""
        rows = len(next(iter(inputs.values())))
        with torch.inference_mode():
            for name, tensor in inputs.items():
                self._inputs[name][:rows].copy_(tensor, non_blocking=True)
            self._graph.replay()
            return {name: tensor[:rows].clone() for name, tensor in self._outputs.items()}


@dataclass(frozen=True, slots=True)
class _Kept:
    """A graph for ``first`` rows up to its own, which are ``last``."""

    first: int
    last: int
    graph: Graph


_LAST = attrgetter("last")


class Graphed(Wrapped):
    """An executable that replays graphs where those take no longer; see :class:`Executable`.

    One thread at a time may run it: its graphs read and write memory of their own.

    Args:
        executable: what is captured, and runs all other numbers of rows.

    Attributes:
        bytes: memory of the device that the graphs take.
    """

    def __init__(self, executable: Executable) -> None:
        super().__init__(executable)
        self.bytes = 0
        self._kept: list[_Kept] = []
        self._ends: list[int] = []

    def capture(
        self, make_rows: Callable[[int], Mapping[str, Tensor]], most: int, budget: int
    ) -> None:
        """Capture 1, 2, 4 ... ``most`` rows, for as long as a replay takes no longer.

        Fewer rows are padded where that takes no longer either; else their numbers up to
        :data:`EACH` are captured, too. Each graph is held against the forward itself on two sets
        of rows. What cannot be captured, is off, or takes longer runs as before; the report says
        why.

        Args:
            make_rows: valid rows, so many.
            most: rows of the largest batch.
            budget: bytes that the graphs may take.
        """
        until, before = time.perf_counter() + SECONDS, _reserved(self.device)
        stream, below, reason = self.device.stream(), (0, 0.0), None
        for rows in (*(1 << power for power in range(most.bit_length())), most):
            if rows == below[0]:
                break
            reason, below = self._capture(make_rows, rows, stream, below)
            self.bytes = max(0, _reserved(self.device) - before)
            if reason is None and rows != most:
                reason = self._bounded(rows, budget, until)
            if reason is not None:
                break
        for rows in range(3, min(most, EACH, self._largest)):
            if self._graph(rows) is None and self._bounded(rows, budget, until) is None:
                self._capture(make_rows, rows, stream, (rows - 1, 0.0))
                self.bytes = max(0, _reserved(self.device) - before)
        self.report["graphs"] = {
            "rows": [[kept.first, kept.last] for kept in self._kept],
            "bytes": self.bytes,
            "reason": reason,
        }

    @property
    def _largest(self) -> int:
        return self._kept[-1].last if self._kept else 0

    def _bounded(self, rows: int, budget: int, until: float) -> str | None:
        """Why no more is captured; ``rows``: of what was the last."""
        if len(self._kept) < MOST and self.bytes <= budget and time.perf_counter() <= until:
            return None
        return f"stopped behind {rows} rows by its bound of number, memory or time"

    def _capture(
        self,
        make_rows: Callable[[int], Mapping[str, Tensor]],
        rows: int,
        stream: torch.Stream,
        below: tuple[int, float],
    ) -> tuple[str | None, tuple[int, float]]:
        """Capture a forward of so many rows, and keep it if it is worth it.

        Args:
            make_rows: as in :meth:`capture`.
            rows: how many.
            stream: where it is captured.
            below: the next lower number that was captured, and seconds of its forward.

        Returns:
            Why it is not kept, and its number of rows with the seconds of a forward.
        """
        more = make_rows(rows + 1)  # one row the other way round would be itself again
        inputs = {name: each[:-1] for name, each in more.items()}
        others = {name: each[1:].flip(0) for name, each in more.items()}
        try:
            graph = Graph(self.inner, inputs, stream)
            reason, times = self._judge(graph, inputs, others)
        except Exception as error:  # noqa: BLE001 - a model may do anything while it is captured
            self.device.synchronize()
            return f"not captured at {rows} rows: {_said(error)}", (rows, 0.0)
        if reason is None:
            self._keep(graph, below, times)
        return reason, (rows, times[0])

    def _judge(
        self, graph: Graph, inputs: Mapping[str, Tensor], others: Mapping[str, Tensor]
    ) -> tuple[str | None, tuple[float, float]]:
        """Why not to keep a graph, and seconds of the forward and of the graph."""
        allowed = max(TOLERANCE.get(each, 0.0) for each in (*self.precision.split("+"), "fp32"))
        for rows in (inputs, others):
            want = self.inner.run(rows)
            got = graph.run(rows)
            worst = max(difference(got[name], each) for name, each in want.items())
            if not worst <= allowed:
                why = f"a replay of {graph.rows} rows is off the forward by {worst:.3g}"
                return why, (0.0, 0.0)
        times = tuple(self._seconds(run, inputs) for run in (self.inner.run, graph.run))
        if times[1] > times[0] * LOSS:
            why = f"at {graph.rows} rows a replay takes {times[1]:.2g} s, a forward {times[0]:.2g}"
            return why, (times[0], times[1])
        return None, (times[0], times[1])

    def _seconds(
        self, run: Callable[[Mapping[str, Tensor]], object], inputs: Mapping[str, Tensor]
    ) -> float:
        given = {name: each.to(self.device.torch) for name, each in inputs.items()}
        taken = []
        for _ in range(_TIMED):
            self.device.synchronize()
            begun = time.perf_counter()
            run(given)
            self.device.synchronize()
            taken.append(time.perf_counter() - begun)
        return median(taken)

    def _keep(self, graph: Graph, below: tuple[int, float], times: tuple[float, float]) -> None:
        """Use a graph from as many rows on as take the forward longer, by a straight line."""
        low, least = below
        first = low + 1
        while first < graph.rows:
            forward = least + (times[0] - least) * (first - low) / (graph.rows - low)
            if low and forward * LOSS >= times[1]:
                break
            first += 1
        insort(self._kept, _Kept(first, graph.rows, graph), key=_LAST)
        self._ends = [kept.last for kept in self._kept]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay the graph of so many rows, or run the forward."""
        graph = self._graph(len(next(iter(inputs.values()))))
        return self.inner.run(inputs) if graph is None else graph.run(inputs)

    def _graph(self, rows: int) -> Graph | None:
        """The one that runs so many rows, if one does."""
        at = bisect_left(self._ends, rows)
        if at < len(self._kept) and self._kept[at].first <= rows:
            return self._kept[at].graph
        return None

    def release(self) -> bool:
        """Drop all graphs: their memory is wanted."""
        had = bool(self._kept)
        if had:
            self.report["graphs"] = {"rows": [], "bytes": 0, "reason": "dropped: memory was short"}
        self._kept, self._ends, self.bytes = [], [], 0
        self.device.give_back_memory()
        return self.inner.release() or had

    def is_native(self, rows: int) -> bool:
        """A replay is, a forward may do anything."""
        return False


def _reserved(device: Device) -> int:
    return int(torch.accelerator.memory_reserved(device.torch))


def _said(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
