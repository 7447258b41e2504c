"""Declared features by their definition, over a pandas table of everything that came before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.features.online import Event, Labelled
from plinth.verticals.finance.features.timeline import HOUR

KEYS = ("card", "terminal", "customer", "device")


class Brute:
    """Every event and label so far.

    Args:
        declaration: what is computed.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self.events: list[Event] = []
        self.labels: list[Labelled] = []

    def update(self, event: Event) -> dict[str, float]:
        """Take an event in; its columns."""
        self.events.append(event)
        table = pd.DataFrame(self.events)
        table["units"] = (table["amount"] * 10_000).round().astype("int64")
        values = {one.name: self._value(one, table, event) for one in self.declaration.feature}
        for one in self.declaration.feature:
            if one.kind == "ratio":
                below = values[one.to]
                values[one.name] = values[one.of] / below if below else one.otherwise
        return {one.name: values[one.name] for one in self.declaration.columns()}

    def _value(self, one: Any, table: pd.DataFrame, event: Event) -> float:
        if one.kind == "ratio":
            return 0.0
        if one.kind == "value":
            moment = pd.Timestamp(event.time, unit="ms")
            told = {"amount": event.amount, "weekend": moment.day_of_week >= 5}
            return float({**told, "night": moment.hour < 7}[one.of])
        key = getattr(event, one.by)
        if key is None:
            return 0.0
        mine = table[table[one.by] == key]
        if one.kind == "risk":
            return self._risk(one, mine, event)
        window = mine[(mine["time"] > event.time - one.over) & (mine["time"] <= event.time)]
        if one.kind == "recency":
            before = mine[mine.index != len(table) - 1]
            before = before[before["time"] <= event.time]
            gap = event.time - before["time"].max() if len(before) else one.over
            return float(min(gap, one.over)) / 1000
        if one.kind == "speed":
            return self._speed(window, event)
        if one.kind == "count":
            return float(len(window))
        if one.kind == "distinct":
            return float(window[one.of].nunique())
        return float(getattr(window["units"], one.kind)()) / 10_000

    def _risk(self, one: Any, mine: pd.DataFrame, event: Event) -> float:
        end = event.time - one.after
        window = mine[(mine["time"] > end - one.over) & (mine["time"] <= end)]
        bad = 0
        for label in self.labels:
            if label.terminal == event.terminal and label.known <= event.time:
                bad += int(end - one.over < label.time <= end)
        return min(bad, len(window)) / len(window) if len(window) else 0.0

    def _speed(self, window: pd.DataFrame, event: Event) -> float:
        before = window[(window.index != window.index.max()) & window["place"].notna()]
        if event.place is None or not len(before):
            return 0.0
        last = before.sort_values("time", kind="stable").iloc[-1]
        one, other = (np.radians(place) for place in (event.place, last["place"]))
        arc = np.sin((other - one) / 2) ** 2
        half = arc[0] + np.cos(one[0]) * np.cos(other[0]) * arc[1]
        km = 2 * 6371 * np.arcsin(np.sqrt(min(1.0, half)))
        return float(km / (max(event.time - last["time"], 1000) / HOUR))
