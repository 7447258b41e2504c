"""How long will a batch take? An on-line model of seconds by batch key and rows.

The cost curve of a key over rows is seeded by warm-up; each finished batch then scales it:
``seconds(rows, q) = curve(rows) * median ratio + delay quantile(q)``. Predictions are upper
quantiles, so that a promise made from them is kept.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import islice
from math import exp, inf, log
from pathlib import Path
from random import Random
from statistics import median
from typing import Generic, TypeVar

import numpy as np

from plinth.engine.errors import ConfigError
from plinth.engine.scheduler.loads import Loads
from plinth.engine.scheduler.work import BatchKey

T = TypeVar("T")
_MEMORY = 256  # batches remembered for the quantiles
_SHIFT = 6  # batches in a row on one side of the band mean that the cost has changed
_BAND = 1.2
_LEARN = 0.05  # how fast the curve's own shape follows
_SPREAD, _KEPT = 101, 1 << 16  # delays of each key in the file, at least; of all keys, about
_SEEN, _ONE_IN = 512, 16  # of what plans are made from; once full, one in so many is taken
_REBUILD = 8  # batches after which the moved curve is tabulated anew
_LEAK = 2e-4  # of what the shape was moved, forgotten with each batch
_YOUNG = 5  # batches of which a knot that no warm-up measured becomes the median


@dataclass(slots=True)
class _Sample:
    """The last values seen, in order of arrival and of size."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    ordered: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        if len(self.values) == _MEMORY:
            del self.ordered[bisect_right(self.ordered, self.values[0]) - 1]
        self.values.append(value)
        insort(self.ordered, value)

    def quantile(self, share: float) -> float:
        if not self.ordered:
            return 0.0
        return self.ordered[min(int(share * len(self.ordered)), len(self.ordered) - 1)]

    def spread(self, count: int) -> list[float]:
        """So many of the values, each for an equal share of them; all if they are fewer."""
        if len(self.ordered) <= count:
            return list(self.ordered)
        return [self.ordered[int((at + 0.5) / count * len(self.ordered))] for at in range(count)]

    def keep(self, count: int) -> None:
        recent = list(self.values)[-count:] if count else []
        self.values.clear()
        self.values.extend(recent)
        self.ordered = sorted(recent)


@dataclass(slots=True)
class _Seen(Generic[T]):
    """Some of thousands, for plans: the later the more likely.

    The last few hundred in a row would be those of a few seconds, in which what is rare and
    makes the tail of a plan is mostly missing.
    """

    values: list[T] = field(default_factory=list)
    random: Random = field(default_factory=lambda: Random(0))

    def add(self, value: T) -> None:
        if len(self.values) < _SEEN:
            self.values.append(value)
        elif self.random.random() < 1 / _ONE_IN:
            self.values[self.random.randrange(_SEEN)] = value


@dataclass(slots=True)
class _Curve:
    """Cost of one batch key: a curve over rows, times a level, plus a delay.

    The level is the median of seen / curve over the last batches. The delay is what single
    batches took beyond curve * level. It is added, not multiplied: a core taken away for 5 ms
    costs a batch of one as much as a batch of a hundred. ``seeded`` are the knots as
    they were measured, ``common`` is the moving mean of the steps by which knots move. ``young``
    has what was seen, less the level, at knots that so far one or a few batches have made: the
    first batches of a size are slow, and some more rows seem to cost next to nothing after them.
    ``warm`` are the knots that warm-up measured. ``seen`` are batches, rows and seconds; ``turns``
    are the seconds from the end of a batch until the lane has begun the next; ``followed`` those
    from an answer until its caller asks for more.
    """

    knots: dict[int, float] = field(default_factory=dict)
    seeded: dict[int, float] = field(default_factory=dict)
    warm: dict[int, float] = field(default_factory=dict)
    ratios: _Sample = field(default_factory=_Sample)
    delays: _Sample = field(default_factory=_Sample)
    table: list[float] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    moved: int = 0
    common: float = 0.0
    young: dict[int, list[float]] = field(default_factory=dict)
    seen: _Seen[tuple[int, float]] = field(default_factory=lambda: _Seen[tuple[int, float]]())
    turns: _Seen[float] = field(default_factory=lambda: _Seen[float]())
    followed: _Seen[float] = field(default_factory=lambda: _Seen[float]())

    def rebuild(self, rows: int) -> None:
        size = max(rows, len(self.table) - 1, max(self.knots, default=1))
        self.order = sorted(self.knots)
        at = np.array(self.order, dtype=float)
        # A cost that falls with rows is measurement noise; rows_within() needs it monotone.
        cost = np.maximum.accumulate([self.knots[k] for k in self.order])
        grid = np.arange(size + 1, dtype=float)
        # Beyond the largest, at least half of its cost is taken to grow with the rows.
        slope = 0.5 * cost[-1] / at[-1]
        if len(at) == 1:
            curve = cost[0] + slope * (grid - at[0])
        else:
            slope = max(slope, (cost[-1] - cost[-2]) / (at[-1] - at[-2]))
            curve = np.interp(grid, at, cost)
            beyond = grid > at[-1]
            curve[beyond] = cost[-1] + slope * (grid[beyond] - at[-1])
        self.table = curve.tolist()

    def base(self, rows: int) -> float:
        if not self.knots:
            return 0.0
        if rows >= len(self.table):
            self.rebuild(max(rows, 2 * len(self.table)))
        return self.table[rows]

    def is_far(self, rows: int) -> bool:
        """Whether so many rows lie outside (min/2, 2 max) of the measured ones."""
        return not self.order or not self.order[0] / 2 < rows < self.order[-1] * 2

    def level(self) -> float:
        ordered = self.ratios.ordered
        return ordered[len(ordered) // 2] if ordered else 1.0

    def delay(self, share: float) -> float:
        return max(0.0, self.delays.quantile(share)) if share > 0.5 else 0.0

    def observe(self, rows: int, seconds: float) -> None:
        base = self.base(rows)
        self.seen.add((rows, seconds))
        self.ratios.add(seconds / base)
        self._forget_if_shifted()
        expected = self.level() * base
        self.delays.add(seconds - expected)
        if rows in self.young:
            self._grow(rows, seconds / self.level())
        else:
            self._follow(rows, seconds / expected - 1)

    def usual(self) -> tuple[float, _Sample]:
        """Level and delays over all that is remembered, also of before the cost last changed.

        A change drops what is to be predicted from, but not what a plan has to reckon with.
        """
        seen = self.seen.values
        if not seen:
            return self.level(), _Sample()
        ratios = sorted(seconds / self.base(rows) for rows, seconds in seen)
        level = ratios[len(ratios) // 2]
        delays = sorted(seconds - level * self.base(rows) for rows, seconds in seen)
        return level, _Sample(deque(delays), delays)

    def _forget_if_shifted(self) -> None:
        """Drop the past once the last few batches all lie on one side of it."""
        if len(self.ratios.values) < 2 * _SHIFT:
            return
        middle = self.level()
        if middle / _BAND <= self.ratios.values[-1] <= middle * _BAND:
            return
        recent = list(islice(reversed(self.ratios.values), _SHIFT))
        if min(recent) > middle * _BAND or max(recent) < middle / _BAND:
            self.ratios.keep(_SHIFT)
            self.delays.keep(0)

    def _follow(self, rows: int, off: float) -> None:
        """Move the two knots next to ``rows`` a little, by how far off the curve was there.

        Only by what it was off more than others lately: what all have in common is the level's,
        which is a median, and durations are skewed. Moved by that too, the knots in use would
        drift off from the others without end. Less their moving mean, the steps add up to a
        change of that mean, which has a bound. In logarithms up and down by as much is back again.
        """
        if self.moved >= _REBUILD:
            self._settle(rows)
        self.moved += 1
        own = _LEARN * max(-0.5, min(off, 0.5)) - self.common
        self.common += _LEARN * own
        if rows in self.knots:
            self._raise(rows, own)
        elif len(self.order) == 1:
            self._raise(self.order[0], own)
        else:
            after = bisect_left(self.order, rows)
            around = self.order[max(0, after - 2) : after + 2]
            first, second = sorted(around, key=lambda knot: abs(knot - rows))[:2]
            span = abs(first - rows) + abs(second - rows)
            self._raise(first, own * (1 - abs(first - rows) / span))
            self._raise(second, own * (1 - abs(second - rows) / span))

    def _grow(self, rows: int, cost: float) -> None:
        """Make a young knot the median of what was seen there so far."""
        seen = self.young[rows]
        seen.append(cost)
        self._raise(rows, log(median(seen) / self.knots[rows]))
        self.seeded[rows] = self.knots[rows]
        self.rebuild(rows)
        if len(seen) >= _YOUNG:
            del self.young[rows]

    def _raise(self, knot: int, step: float) -> None:
        """Move a knot and take along those that it passes, as in isotonic regression.

        Cost grows with rows. Were others left behind, they would go on unseen below the largest
        before them, and what they lose the rest would gain.
        """
        knots, order = self.knots, self.order
        moved = knots[knot] = knots[knot] * exp(step)
        place = bisect_left(order, knot)
        for other in reversed(order[:place]):
            if knots[other] <= moved:
                break
            knots[other] = moved
        for other in order[place + 1 :]:
            if knots[other] >= moved:
                break
            knots[other] = moved

    def _settle(self, rows: int) -> None:
        """Tabulate what has moved; a little of it is forgotten, towards what was measured."""
        self.moved, least = 0, 0.0
        for knot in self.order:
            kept = (self.seeded[knot] / self.knots[knot]) ** (_REBUILD * _LEAK)
            least = self.knots[knot] = max(least, self.knots[knot] * kept)
        self.rebuild(rows)


class LatencyModel:
    """Seconds by (batch key, rows), learned on line.

    Args:
        path: where the curves are kept between runs; ``None`` keeps them in memory only.

    Attributes:
        loads: of models whose weights leave memory while others need it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._curves: dict[BatchKey, _Curve] = {}
        self.path = path
        self.loads = Loads()

    def seed(self, key: BatchKey, rows: int, seconds: float) -> None:
        """Set the curve at ``rows`` from a warm-up measurement (seconds)."""
        self._set(key, rows, seconds)
        self._curves[key].warm[rows] = seconds

    def _set(self, key: BatchKey, rows: int, seconds: float) -> None:
        curve = self._curves.setdefault(key, _Curve())
        curve.knots[rows] = curve.seeded[rows] = max(seconds, 1e-7)
        curve.young.pop(rows, None)
        curve.moved = _REBUILD
        curve.rebuild(rows)

    def observe(self, key: BatchKey, rows: int, seconds: float) -> None:
        """Learn from a finished batch."""
        curve = self._curves.get(key)
        if curve is None:
            curve = self._curves[key] = _Curve()
        if curve.is_far(rows):
            self._set(key, rows, seconds / curve.level())
            curve.young[rows] = []
        curve.observe(rows, max(seconds, 1e-7))

    def turned(self, key: BatchKey, seconds: float) -> None:
        """Note how long a lane took from the end of a batch until it had begun the next."""
        curve = self._curves.get(key)
        if curve is not None:
            curve.turns.add(seconds)

    def followed(self, key: BatchKey, seconds: float) -> None:
        """Note how long an answer was away until its caller asked for more of the same."""
        curve = self._curves.get(key)
        if curve is not None:
            curve.followed.add(seconds)

    def predict(self, key: BatchKey, rows: int, quantile: float = 0.99) -> float:
        """Upper quantile of the seconds a batch of ``rows`` takes; 0.0 for an unknown key."""
        curve = self._curves.get(key)
        if curve is None:
            return 0.0
        likely = curve.base(rows) * curve.level()
        return likely + curve.delay(quantile) if quantile > 0.5 else likely

    def hoped(self, key: BatchKey, rows: int) -> float:
        """The least seconds that a batch may take after all: as in warm-up, else any."""
        curve = self._curves.get(key)
        if curve is None or not curve.warm:
            return 0.0
        at = sorted(curve.warm)
        return float(np.interp(rows, at, np.maximum.accumulate([curve.warm[each] for each in at])))

    def learned(self, key: BatchKey) -> dict[int, float]:
        """Seconds that a batch takes, by the numbers of rows at which that is known."""
        curve = self._curves.get(key)
        if curve is None:
            return {}
        return {rows: cost * curve.level() for rows, cost in sorted(curve.knots.items())}

    def tries(self, key: BatchKey, rows: int) -> float:
        """Batches of about so many rows that were seen; infinity: enough, or they were measured."""
        curve = self._curves.get(key)
        if curve is None or curve.is_far(rows):
            return 0
        return len(curve.young[rows]) if rows in curve.young else inf

    def rows_within(
        self, key: BatchKey, seconds: float, max_rows: int, quantile: float = 0.99
    ) -> int:
        """The most rows, up to ``max_rows``, predicted to take ``seconds`` or less."""
        curve = self._curves.get(key)
        if curve is None or not curve.knots:
            return max_rows
        curve.base(max_rows)
        budget = (seconds - curve.delay(quantile)) / curve.level() * (1 + 1e-9)
        return bisect_right(curve.table, budget, 1, max_rows + 1) - 1

    def rows_worth(self, key: BatchKey, rows: int, share: float) -> int:
        """The fewest rows, up to ``rows``, that have this share of the best rows per second.

        Args:
            key: of a batch.
            rows: the most it may have, 1 or more.
            share: of the rows per second of the best number up to that; 0 to 1.
        """
        curve = self._curves.get(key)
        if curve is None or not curve.knots or rows < 2:
            return rows
        # Between two knots the curve is a line, on which rows per second only rise or only fall.
        ends = [each for each in curve.order if each < rows]
        wanted = share * max(each / curve.base(each) for each in (1, *ends, rows))
        return next(n for n in range(1, rows + 1) if n >= wanted * curve.base(n) or n == rows)

    def rows_weighed(self, key: BatchKey, rows: int, price: float, beside: float) -> int:
        """The rows, up to ``rows``, with the least of what is lost and what the time costs.

        Lost is the share by which their rows per second are below the best number's.

        Args:
            key: of a batch.
            rows: the most it may have, 1 or more.
            price: of a second of the batch, as such a share.
            beside: seconds that pass between two batches, whatever their rows.
        """
        curve = self._curves.get(key)
        if curve is None or not curve.knots or rows < 2:
            return rows
        counts, count = [rows], 1
        while count < rows:
            counts.append(count)
            count += max(1, count // 4)
        level = curve.level()
        sizes = {each: level * curve.base(each) for each in counts}
        best = max(each / (seconds + beside) for each, seconds in sizes.items())
        return min(
            sizes, key=lambda each: price * sizes[each] - each / (sizes[each] + beside) / best
        )

    def __len__(self) -> int:
        return len(self._curves)

    def forget(self, key: BatchKey) -> None:
        """Drop what is known of a key."""
        self._curves.pop(key, None)

    def move(self, key: BatchKey, to: BatchKey) -> None:
        """Let what is known of a key be known of another one, of which nothing was."""
        curve = self._curves.pop(key, None)
        if curve is not None:
            self._curves.setdefault(to, curve)

    def keep(self, keys: Set[BatchKey]) -> None:
        """Drop what is known of all other keys."""
        for key in self._curves.keys() - keys:
            del self._curves[key]

    def save(self) -> None:
        """Write the curves to ``path`` (JSON), atomically; the rest for who plans ahead."""
        if self.path is None:
            return
        usual = {key: curve.usual() for key, curve in self._curves.items()}
        data = {
            key: {str(rows): cost * usual[key][0] for rows, cost in curve.knots.items()}
            for key, curve in self._curves.items()
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        # A request is late by the longest of several: the last half per cent counts, too.
        each = max(_SPREAD, min(_SEEN, _KEPT // max(1, len(usual))))
        delays = {key: found.spread(each) for key, (_, found) in usual.items()}

        def spread(seen: _Seen[float]) -> list[float]:
            return _Sample(deque(), sorted(seen.values)).spread(each)

        turns = {key: spread(curve.turns) for key, curve in self._curves.items()}
        followed = {key: spread(curve.followed) for key, curve in self._curves.items()}
        told = {
            "format": 1,
            "seconds": data,
            "delays": delays,
            "turns": turns,
            "followed": followed,
            "loads": self.loads.learned(),
        }
        part.write_text(json.dumps(told))
        part.replace(self.path)

    def restore(self) -> int:
        """Read what :meth:`save` wrote; returns how many batch keys are known.

        Raises:
            ConfigError: the file is not what :meth:`save` writes.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            told = json.loads(self.path.read_text())
            for key, knots in told["seconds"].items():
                for rows, seconds in knots.items():
                    self._set(str(key), int(rows), float(seconds))
            for key, seconds in told.get("loads", {}).items():
                self.loads.learn(str(key), float(seconds))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} is not a latency file: {error}",
                hint="delete it; it is measured again",
            ) from error
        return len(self._curves)
