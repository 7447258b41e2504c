"""Rows in blocks of one size, so that an answer's bits do not depend on who shares its batch.

Libraries choose kernels by the shape of a batch, and the last rows of a batch often go another way
than the others: the same row then differs in its last bits from batch to batch, differently on
every kind of processor. A forward that always gets the same number of rows always goes one way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable, Wrapped, another
from plinth.engine.flow import cat_rows, row_count


class Blocks(Wrapped):
    """An executable that gives another one just so many rows at a time.

    Args:
        inner: what runs a block.
        rows: of a block; the last one is filled up with copies of its last row.
    """

    def __init__(self, inner: Executable, rows: int) -> None:
        super().__init__(inner)
        self.rows = rows

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`; inputs have at least one row."""
        count = row_count(inputs)
        outputs = [self.inner.run(self._block(inputs, at)) for at in range(0, count, self.rows)]
        whole = cat_rows(outputs)
        return {name: tensor[:count] for name, tensor in whole.items()}

    def _block(self, inputs: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
        block = {name: rows[first : first + self.rows] for name, rows in inputs.items()}
        missing = self.rows - row_count(block)
        if not missing:
            return block
        return {
            name: torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
            for name, rows in block.items()
        }

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :class:`Executable`."""
        return self.run(inputs)

    def another(self) -> Blocks | None:
        """One more for another thread; see ``base.another``."""
        inner = another(self.inner)
        return None if inner is None else Blocks(inner, self.rows)

    def is_native(self, rows: int) -> bool:
        """See :class:`Executable`."""
        return self.inner.is_native(self.rows)
