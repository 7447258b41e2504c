"""The features by their definition: look at every known event, keep those in the window.

Far too slow to serve. It is what tests hold ``features.online`` against, and
the baseline of its benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from plinth.verticals.finance.features.online import (
    FEATURES,
    Event,
    Labelled,
)
from plinth.verticals.finance.features.timeline import DAY, HOUR, LABEL_DELAY, MINUTE, UNITS

COLD_RECENCY = 30 * 86_400.0
"""Seconds since the last event where there is none within 30 days."""
WINDOWS = (5 * MINUTE, HOUR, DAY, 7 * DAY, 30 * DAY)


@dataclass(slots=True)
class Reference:
    """Every event and label so far, in order of arrival."""

    known: list[Event] = field(default_factory=list)
    labels: list[Labelled] = field(default_factory=list)
    given: dict[tuple[str, str], npt.NDArray[np.float32]] = field(default_factory=dict)

    def label(self, label: Labelled) -> None:
        """As :meth:`FeatureState.label`; one of an unknown transaction is left out."""
        means = {
            other.card
            for other in self.known
            if (other.transaction, other.terminal, other.time)
            == (label.transaction, label.terminal, label.time)
            and label.card in (None, other.card)
        }
        if len(means) == 1:
            self.labels.append(label._replace(transaction=f"{means.pop()} {label.transaction}"))

    def update(self, event: Event, *, count: bool = True) -> npt.NDArray[np.float32]:
        """The features of an event, float32 (FEATURE_COUNT,).

        Args:
            event: the event.
            count: remember it for later events.
        """
        key = (event.card, event.transaction)
        if key in self.given:
            return self.given[key]
        self.known.append(event)
        row = self._row(event)
        if count:
            self.given[key] = row
        else:
            self.known.pop()
        return row

    def _row(self, event: Event) -> npt.NDArray[np.float32]:
        now = event.time
        card = [other for other in self.known if other.card == event.card and other.time <= now]
        windows = [[other for other in card if other.time > now - width] for width in WINDOWS]
        units = [sum(round(other.amount * UNITS) for other in window) for window in windows]
        before = [other.time for other in card if other is not event]
        own = round(event.amount * UNITS)
        recency = min((now - max(before)) / 1000, COLD_RECENCY) if before else COLD_RECENCY
        day = [other for other in self.known if now - DAY < other.time <= now]
        on_device = {o.card for o in day if event.device is not None and o.device == event.device}
        values = (
            own / UNITS,
            (now // DAY + 3) % 7 >= 5,
            now % DAY < 7 * HOUR,
            *(len(window) for window in windows),
            *(total / UNITS for total in units),
            own * len(windows[-1]) / units[-1] if units[-1] else 1.0,
            recency,
            len({other.terminal for other in windows[2]}),
            sum(other.terminal == event.terminal for other in day),
            *(self._share(event, days) for days in (1, 7, 30)),
            sum(other.customer == event.customer for other in day),
            len(on_device),
        )
        assert len(values) == len(FEATURES)
        return np.array(values, np.float32)

    def _share(self, event: Event, days: int) -> float:
        end = event.time - LABEL_DELAY
        window = range(end - days * DAY + 1, end + 1)
        here = [o for o in self.known if o.terminal == event.terminal and o.time in window]
        frauds = [time for time in self._frauds(event.terminal, event.time) if time in window]
        return min(len(frauds), len(here)) / len(here) if here else 0.0

    def _frauds(self, terminal: str, now: int) -> list[int]:
        """Times of the terminal's transactions that are known as fraud at ``now``."""
        spans: dict[str, tuple[int, int, int | None]] = {}
        for transaction, where, time, known, fraud, _ in self.labels:
            if where != terminal:
                continue
            before = spans.get(transaction)
            if fraud:
                since = known if before is None else min(known, before[1])
                spans[transaction] = (time, since, None)
            elif before is not None:
                spans[transaction] = (before[0], before[1], known)
        return [
            time
            for time, since, until in spans.values()
            if since <= now and (until is None or now < until)
        ]
