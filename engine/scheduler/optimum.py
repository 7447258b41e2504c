"""The most that any policy could answer in time on two lanes alike, knowing all arrivals.

What a policy is held to where the long run says too little: a lull leaves lanes empty, and what
they could have done then no policy makes up for.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from plinth.engine.scheduler.simulate import Arrivals, Setting

Values = NDArray[np.int32]
_NEVER = -(1 << 24)


def best_of_two(setting: Setting, arrivals: Arrivals) -> int:
    """The most that can be answered in time, or a little more: a step may be too much to know.

    Dynamic programming over (time, when the other lane is free, first request not yet decided), in
    steps of the cost of one row. Nothing is lost by three restrictions:

    - Steps. Let every arrival and every start be early by less than a step: what was in time
      stays so, and a lane that was free stays free.
    - Who starts first ends first. Let A run from a to d and B from b to c, a <= b < c < d. With
      rows moved from one to the other, A can run from a to c and B from b to d, for a row costs a
      step: together they have as many rows as before. Of those, B had at most as many that are
      too old for d, or came after a, as A and B now have room for; the others may be in either.
    - The oldest first. Of two requests that a batch could take, the younger one can do whatever
      the older could in any batch that starts no earlier and ends no earlier.

    Args:
        setting: the scene; a fixed cost between two steps counts as the lower.
        arrivals: times, seconds, sorted.
    """
    return _Pair(setting, arrivals).solve()


class _Pair:
    """The values of all states, from the last time on backwards; steps throughout.

    ``value[time][other lane is free after][request - first that is not too old]``, and to the
    left of it as much again for requests that are.
    """

    def __init__(self, setting: Setting, arrivals: Arrivals) -> None:
        step, slack = setting.per_row, 1e-9
        at = np.floor(arrivals / step + slack).astype(int)
        self.fixed = int(setting.fixed / step + slack)
        self.most = setting.max_rows
        due = int(np.ceil(setting.deadline / step - slack))
        self.longest = self.fixed + self.most
        self.steps = int(setting.duration / step) + due + 1
        times = np.arange(self.steps + 2 * self.longest + 2)
        self.here = np.searchsorted(at, times, side="right")
        """How many have come."""
        self.young = np.searchsorted(at, times - due)
        """The first that a batch which ends then is in time for."""
        self.first = self.young[self.fixed + 1 :]
        """The first that a batch of one row which starts then is in time for."""
        waiting = self.here[: len(self.first)] - self.first
        passed = self.first[self.longest :] - self.first[: -self.longest]
        self.width = int(max(waiting.max(), passed.max())) + 2
        self.slots = self.longest + 1
        shape = self.slots, self.longest + 1, 2 * self.width
        # What lies behind a row is read too, and never counts; behind the last one are zeros.
        whole = np.zeros(math.prod(shape) + self.most, dtype=np.int32)
        self.values: Values = whole[: -self.most].reshape(shape)

    def solve(self) -> int:
        """What can be answered from the first step on."""
        for time in range(self.steps - 1, -1, -1):
            self._at(time)
        return int(self.values[0, 0, self.width])

    def _at(self, time: int) -> None:
        """The values of one time, from those of later ones."""
        width, low = self.width, int(self.first[time])
        mine, later = self.values[time % self.slots], self.values[(time + 1) % self.slots]
        moved = int(self.first[time + 1]) - low
        waited = later[:, width - moved : 2 * width - moved]
        mine[1:, width:] = waited[:-1]
        mine[0, width:] = waited[0]
        count = int(self.here[time]) - low
        rows = np.arange(1, min(self.most, count) + 1)[:, None]
        places = np.arange(count + 1)
        oldest = self.young[time + self.fixed + rows] - low
        gain = np.where((places >= oldest) & (places + rows <= count), rows, _NEVER)
        gain = gain.astype(np.int32)
        for other in range(1, self.longest + 1):
            self._start(mine[other], gain, time, other)
        self._settle(mine[1:])
        self._start(mine[0], gain, time, 0)
        self._settle(mine[:1])

    def _start(self, value: Values, gain: Values, time: int, other: int) -> None:
        """Let a lane start a batch while the other one is busy for so long."""
        fewest = max(1, other - self.fixed)
        if fewest > len(gain):
            return
        then = self.values[(time + other) % self.slots]
        passed = int(self.first[time + other] - self.first[time])
        corner = then[self.fixed + fewest - other, self.width + fewest - passed :]
        down, right = then.strides
        after = as_strided(
            corner, (len(gain) - fewest + 1, gain.shape[1]), (down + right, right), writeable=False
        )
        best = (after + gain[fewest - 1 :]).max(0)
        into = value[self.width : self.width + len(best)]
        np.maximum(into, best, out=into)

    def _settle(self, values: Values) -> None:
        """Whoever may begin with a request may leave it; what is too old is left."""
        width = self.width
        own = values[:, width:]
        own[:] = np.maximum.accumulate(own[:, ::-1], axis=1)[:, ::-1]
        values[:, :width] = own[:, :1]
