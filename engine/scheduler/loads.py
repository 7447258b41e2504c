"""Models whose weights have left memory: what loading them takes, and when they can run again.

One is loaded at a time, beside the lanes, which run others meanwhile. What that takes is learned,
and counts in what is promised to work of that model alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

from plinth.engine.scheduler.work import BatchKey

_MEMORY = 16
"""Loads of a model from which the next is predicted."""


class Loads:
    """Of lanes that are alike: which models are away, and which one is being loaded.

    Attributes:
        current: the model that is being loaded, and since when; ``None``: none is.
        missed: models that work was refused for the want of, which the next could use.
    """

    def __init__(self) -> None:
        self.current: tuple[BatchKey, float] | None = None
        self.missed: dict[BatchKey, None] = {}
        self._away: dict[BatchKey, Callable[[], bool]] = {}
        self._seen: dict[BatchKey, deque[float]] = {}

    def watch(self, model: BatchKey, is_away: Callable[[], bool]) -> None:
        """Know of a model whose weights may leave.

        Args:
            model: the prefix of its batch keys.
            is_away: whether they are not in memory now; asked under the engine's lock.
        """
        self._away[model] = is_away

    def forget(self, model: BatchKey) -> None:
        """Drop a model, and what was learned of it."""
        self._away.pop(model, None)
        self.missed.pop(model, None)
        self._seen.pop(model, None)

    def __bool__(self) -> bool:
        return bool(self._away)

    def model_of(self, key: BatchKey) -> BatchKey:
        """The model of a batch key, whose shapes stand in brackets behind it."""
        return key if key in self._away else key.partition("[")[0]

    def is_away(self, key: BatchKey) -> bool:
        """Whether a batch of this key would have to wait for weights."""
        if not self._away:
            return False
        is_away = self._away.get(self.model_of(key))
        return is_away is not None and is_away()

    def miss(self, key: BatchKey) -> None:
        """Work of a key is refused: its model is loaded all the same, if it is away."""
        if self.is_away(key):
            self.missed[self.model_of(key)] = None

    def ended(self, model: BatchKey) -> None:
        """A model is not being loaded any more: it is there, or cannot be."""
        self.current = None
        self.missed.pop(model, None)

    def seconds(self, model: BatchKey) -> float:
        """How long loading a model is likely to take, by the median; 0.0: nobody knows."""
        seen = self._seen.get(model)
        return median(seen) if seen else 0.0

    def learn(self, model: BatchKey, seconds: float) -> None:
        """Note how long a model took until it could run."""
        self._seen.setdefault(model, deque(maxlen=_MEMORY)).append(seconds)

    def learned(self) -> dict[BatchKey, float]:
        """What loading takes, by model, seconds."""
        return {model: median(seen) for model, seen in self._seen.items()}

    def ready_at(self, key: BatchKey, now: float, before: Iterable[BatchKey] = ()) -> float:
        """When a batch of a key could begin, as far as weights go; ``now``: at once.

        Args:
            key: of the batch.
            now: seconds.
            before: models that are loaded before its own one; itself and the current one may be
                among them.
        """
        if not self.is_away(key):
            return now
        own, at, waits = self.model_of(key), now, {self.model_of(each) for each in before}
        if self.current is not None:
            current, since = self.current
            # As with a batch: one that is t seconds over its time is expected to take t more.
            # Of a first one nobody knows: who waits for it is told at his deadline.
            known = self.seconds(current)
            at += abs(since + known - now) if known else 0.0
            if current == own:
                return at
            waits.discard(current)
        return at + self.seconds(own) + sum(self.seconds(each) for each in waits - {own})
