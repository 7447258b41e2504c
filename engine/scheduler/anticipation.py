"""Background work that waits a moment for callers who may ask for more at once.

Who is told of an alert asks for its reasons next, a moment after the answer. Where a slice has
begun meanwhile, that caller waits for a slice twice. After Iyer and Druschel, Anticipatory
scheduling (SOSP 2001): the device stays idle for a moment, where that has paid off lately.
"""

from __future__ import annotations

from math import inf

_SHARE = 0.1
"""Of its own seconds that a slice waits at most; and of the waits that have to bring somebody."""
_MEMORY = 0.02
"""Weight of the last wait in the share of those that brought somebody."""
_PROBE = 16
"""One of so many waits is made though they bring nobody: what is never tried is never learned."""


class Anticipation:
    """Whether the next slice of a lane waits: once at most between two slices.

    Attributes:
        is_open: callers were answered who may ask for more, and have not been heard of yet.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._lane = -1
        self._at = inf
        self._slice = 0.0
        self._spent = self._came = self._waited = False
        self._brought = 1.0
        self._skipped = 0

    def slice_begun(self, seconds: float) -> None:
        """A slice that is likely to take so many seconds has begun."""
        self._close()
        self._slice, self._spent = seconds, False

    def answered(self, lane: int, now: float) -> None:
        """A lane has done an urgent batch, and its callers are told now."""
        if not (self.is_open or self._spent):
            self.is_open, self._lane, self._at = True, lane, now

    def followed(self) -> None:
        """A caller who was answered has asked for more."""
        self._came |= self.is_open

    def resumed(self) -> None:
        """All callers who were answered have asked for more, or will not."""
        self._close()

    def until(self, lane: int, now: float) -> float:
        """When the next slice of a lane may begin; ``now``: it waits for nobody."""
        end = self._at + _SHARE * self._slice
        if not self.is_open or lane != self._lane or end <= now or not self._pays():
            return now
        self._waited = True
        return end

    def _pays(self) -> bool:
        if self._waited or self._brought >= _SHARE:
            return True
        self._skipped = (self._skipped + 1) % _PROBE
        return not self._skipped

    def _close(self) -> None:
        if self._waited:
            self._brought += _MEMORY * (self._came - self._brought)
        self._spent |= self.is_open
        self.is_open = self._came = self._waited = False
