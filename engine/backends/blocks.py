"""Rows in blocks of one size, so that an answer's bits do not depend on who shares its batch.

Libraries choose kernels by the shape of a batch, and the last rows of a batch often go another way
than the others: the same row then differs in its last bits from batch to batch, differently on
every kind of processor. A forward that always gets the same number of rows always goes one way.
Where a library's kernels give a larger forward the same bits, several blocks are one forward: which
kernels run depends on shapes and threads alone, so a trial on this machine tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from time import perf_counter

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable, Wrapped, another
from plinth.engine.models.spec import ModelSpec
from plinth.engine.rows import cat_rows, row_count

WIDEST = 16
"""Blocks of one forward at most, where it gives the same bits; halves of it are tried too."""
TRIED = 4
"""Forwards of each size that are compared, row for row."""
SLOW = 0.002
"""Seconds of a block from which on fewer calls save nothing worth a trial."""
MOST_FIXED = 4.0
"""Blocks that a forward may count for beside its rows, whatever was measured."""
DISTINCT = 0.5
"""Share of the compared rows whose outputs must differ from all others, or nothing was seen."""


class Blocks(Wrapped):
    """An executable that gives another one just so many rows at a time.

    Args:
        inner: what runs a block.
        rows: of a block; the last one is filled up with copies of its last row.
        sizes: rows of larger forwards, descending, of which each row has the bits it has in a
            block; see :meth:`widened`.
        fixed: what a forward takes however few its rows are, in times of a block's rows. Where
            one forward that is filled up takes less than several, it is filled up.
    """

    def __init__(
        self, inner: Executable, rows: int, sizes: tuple[int, ...] = (), fixed: float = 0.0
    ) -> None:
        super().__init__(inner)
        self.rows = rows
        self.sizes = sizes
        self.fixed = fixed

    def widened(self, spec: ModelSpec) -> Blocks:
        """Several blocks at once, where every row of a trial came out bit for bit as in a block.

        Only for a backend that runs a graph by a library alone: its order of arithmetic depends on
        the shape, the place of a row and the threads, and all places of each shape are tried.
        """
        if spec.free or not self.inner.is_native(self.rows):
            return self
        block = spec.example(self.rows)
        if min(self._seconds(block) for _ in range(3)) > SLOW:
            return self
        example = spec.example(TRIED * WIDEST * self.rows)
        alone = self.run(example)
        told = torch.cat([tensor.flatten(1).double() for tensor in alone.values()], 1)
        if len(set(map(tuple, told.tolist()))) < DISTINCT * len(told):
            return self
        sizes, blocks = list[int](), WIDEST
        while blocks > 1:
            size = blocks * self.rows
            part = {name: rows[: TRIED * size] for name, rows in example.items()}
            found = Blocks(self.inner, size).run(part)
            if all(torch.equal(rows, alone[name][: TRIED * size]) for name, rows in found.items()):
                sizes.append(size)
            blocks //= 2
        return Blocks(self.inner, self.rows, tuple(sizes), self._fixed(spec, sizes))

    def _fixed(self, spec: ModelSpec, sizes: list[int]) -> float:
        """What any forward takes, in times of a block's rows, from a block and a larger forward."""
        if not sizes:
            return 0.0
        block, large = (
            min(self._seconds(example) for _ in range(3))
            for example in (spec.example(self.rows), spec.example(sizes[0]))
        )
        each = (large - block) / (sizes[0] // self.rows - 1)
        return min(max(block / each - 1, 0.0), MOST_FIXED) if each > 0 else MOST_FIXED

    def _seconds(self, inputs: Mapping[str, Tensor]) -> float:
        begun = perf_counter()
        self.inner.run(inputs)
        return perf_counter() - begun

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`; inputs have at least one row."""
        count, first, outputs = row_count(inputs), 0, list[dict[str, Tensor]]()
        known = (*(size // self.rows for size in self.sizes), 1)
        for blocks in _plan(-(-count // self.rows), known, self.fixed):
            outputs.append(self.inner.run(_block(inputs, first, blocks * self.rows)))
            first += blocks * self.rows
        whole = cat_rows(outputs)
        if first == count:
            return whole
        return {name: tensor[:count] for name, tensor in whole.items()}

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        return self.run(inputs)

    def another(self) -> Blocks | None:
        """One more for another thread; see ``base.another``."""
        inner = another(self.inner)
        return None if inner is None else Blocks(inner, self.rows, self.sizes, self.fixed)

    def is_native(self, rows: int) -> bool:
        """See :class:`Executable`."""
        return self.inner.is_native(self.rows)


@lru_cache(maxsize=4096)
def _plan(count: int, sizes: tuple[int, ...], fixed: float) -> tuple[int, ...]:
    """The forwards that take least together for so many blocks, the largest first.

    Args:
        count: blocks.
        sizes: of forwards, in blocks, descending to 1.
        fixed: what each forward takes beside its blocks, in times of one.
    """
    many = max(0, count // sizes[0] - 1)  # all but the last few are as large as can be
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for left in range(1, count - many * sizes[0] + 1):
        behind = ((best[max(0, left - size)], size) for size in sizes)
        found = [(cost + size + fixed, (size, *plan)) for (cost, plan), size in behind]
        best.append(min(found, key=lambda one: one[0]))
    return (sizes[0],) * many + tuple(sorted(best[-1][1], reverse=True))


def _block(inputs: Mapping[str, Tensor], first: int, size: int) -> dict[str, Tensor]:
    """Rows from ``first`` on; where fewer are left the last one fills the block up."""
    block = {name: rows[first : first + size] for name, rows in inputs.items()}
    missing = size - row_count(block)
    if not missing:
        return block
    return {
        name: torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
        for name, rows in block.items()
    }
