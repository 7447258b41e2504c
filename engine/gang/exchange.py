"""What the ranks of a tensor-parallel group tell each other, beside what they compute.

A batch is cut into micro-batches, which take turns: while the sums of one travel, another computes.
Turns go round in one order, so that all ranks ask for the same sums in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class GroupLost(Exception):
    """The ranks of a group do not do the same any more: none of them can go on."""


class _Turns:
    """Lets one of several threads run at a time, in turn."""

    def __init__(self, count: int) -> None:
        self._may = [threading.Semaphore(0) for _ in range(count)]
        self._left = list(range(count))
        self._own = threading.local()

    def begin(self, number: int) -> None:
        """Wait for the first turn of a thread."""
        self._own.number = number
        self._may[number].acquire()

    def start(self) -> None:
        """Let the first one run."""
        self._may[0].release()

    def pass_on(self) -> None:
        """Let the next one run, and wait for a turn."""
        number = self._own.number
        following = self._after(number)
        if following != number:
            self._may[following].release()
            self._may[number].acquire()

    def end(self) -> None:
        """Let the next one run, for good."""
        number = self._own.number
        following = self._after(number)
        self._left.remove(number)
        if following != number:
            self._may[following].release()

    def _after(self, number: int) -> int:
        return self._left[(self._left.index(number) + 1) % len(self._left)]


class Exchange:
    """Sums and pieces of the ranks of a group, and the micro-batches that share its time.

    Args:
        group: the ranks.
        device: where tensors lie.
        most: micro-batches of a batch, at most.

    Attributes:
        ranks: how many there are.
        blocked: seconds for which nothing was computed because a sum was on its way.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, most: int = 1) -> None:
        self.blocked = 0.0
        self.most = most
        self.ranks = dist.get_world_size(group)
        self._group = group
        self._device = device
        self._turns: _Turns | None = None
        self._pool = ThreadPoolExecutor(most, "plinth-micro-batch") if most > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what each rank has, in place; other micro-batches run meanwhile.

        Raises:
            GroupLost: it does not come.
        """
        self._wait(lambda: dist.all_reduce(tensor, group=self._group, async_op=True))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """What each rank has, on the first of them; ``None`` on the others.

        Args:
            tensor: of one shape on all ranks.

        Raises:
            GroupLost: it does not come.
        """
        first = dist.get_rank(self._group) == 0
        found = [torch.empty_like(tensor) for _ in range(self.ranks)] if first else None
        self._wait(
            lambda: dist.gather(tensor, found, group=self._group, group_dst=0, async_op=True)
        )
        return found

    def _wait(self, begin: Callable[[], dist.Work | None]) -> None:
        try:
            work = begin()
            if self._turns is not None:
                self._turns.pass_on()
            begun = perf_counter()
            if work is not None:
                work.wait()
            self.blocked += perf_counter() - begun
        except RuntimeError as error:
            raise GroupLost(str(error)) from error

    def agree(self, failed: bool) -> None:
        """Find out whether what happened here happened on all ranks.

        Raises:
            GroupLost: a model raised on some of them alone.
        """
        told = torch.tensor([int(failed)], device=self._device)
        count = int(self.sum(told).item())
        if count not in (0, self.ranks):
            raise GroupLost(f"the model raised on {count} ranks alone")

    def in_turns(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Run micro-batches, one at a time, each until it waits for a sum.

        Raises:
            BaseException: what the first that failed raised; all have ended.
        """
        if len(works) == 1 or self._pool is None:
            return [work() for work in works]
        assert len(works) <= self.most
        turns = self._turns = _Turns(len(works))

        def run(number: int, work: Callable[[], T]) -> T:
            turns.begin(number)
            try:
                return work()
            finally:
                turns.end()

        futures = [self._pool.submit(run, *each) for each in enumerate(works)]
        turns.start()
        try:
            errors = [error for each in futures if (error := each.exception()) is not None]
        finally:
            self._turns = None
        lost = [error for error in errors if isinstance(error, GroupLost)]
        for error in (*lost, *errors):
            raise error
        return [each.result() for each in futures]

    def close(self) -> None:
        """Let its threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
