"""A few rows of recent calls, in memory alone: what a new way to run a model is checked on."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from torch import Tensor

ROWS = 8
WINDOW = 2048  # calls; older ones give way to newer ones
MAX_BYTES = 4 << 20  # of all rows together


class Recent:
    """Single rows, drawn by reservoir sampling from about the last 2,048 calls.

    Each call is kept with the same chance, and the longer ago it was the likelier another has its
    place. Rows are never written anywhere, and go with the model.
    """

    def __init__(self) -> None:
        self._random = Random(0)
        self._seen = 0
        self._rows: list[dict[str, Tensor]] = []

    def see(self, rows: Mapping[str, Tensor]) -> None:
        """A call was answered; keep one of its rows, perhaps."""
        self._seen += 1
        place = len(self._rows)
        if place >= ROWS:
            place = self._random.randrange(min(self._seen, WINDOW))
            if place >= ROWS:
                return
        count = len(next(iter(rows.values())))
        row = self._random.randrange(count)
        if sum(tensor.nbytes for tensor in rows.values()) // count > MAX_BYTES // ROWS:
            return
        kept = {name: tensor[row : row + 1].clone() for name, tensor in rows.items()}
        self._rows[place : place + 1] = [kept]

    def rows(self) -> list[dict[str, Tensor]]:
        """The rows that are kept, one each."""
        return list(self._rows)
