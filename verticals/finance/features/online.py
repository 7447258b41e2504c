"""Real-time features over event time; one code for training and serving.

Every window is exact and reads (t - w, t] at the event's own time ``t``, the event included,
over the events known when it came. A late event is placed at its time; a repeated one is not
counted again and gets the row of its first time. Labels have a time of their own and are
never read before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from sys import intern
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.finance.features.timeline import (
    DAY,
    FEATURE_COUNT,
    HOUR,
    LABEL_DELAY,
    MINUTE,
    NEVER,
    ROW,
    Card,
    Device,
    Entities,
    Terminal,
    Timeline,
)

FEATURES: tuple[str, ...] = (
    "amount",
    "weekend",
    "night",
    "card_count_5m",
    "card_count_1h",
    "card_count_24h",
    "card_count_7d",
    "card_count_30d",
    "card_sum_5m",
    "card_sum_1h",
    "card_sum_24h",
    "card_sum_7d",
    "card_sum_30d",
    "card_amount_ratio_30d",
    "card_recency",
    "card_terminals_24h",
    "terminal_count_24h",
    "terminal_risk_1d",
    "terminal_risk_7d",
    "terminal_risk_30d",
    "customer_count_24h",
    "device_cards_24h",
)
"""Names of the columns; amounts in base currency, recency in seconds, shares in [0, 1]."""
_AMOUNT = FEATURES.index("amount")
_SUMS = tuple(place for place, name in enumerate(FEATURES) if name.startswith("card_sum"))
_RATIO = FEATURES.index("card_amount_ratio_30d")
_COUNT_30D = FEATURES.index("card_count_30d")
MODEL_FEATURES: tuple[str, ...] = FEATURES[:-1]
"""The columns the model sees. Devices serve the rules: the training data has none."""
UNITS = 10_000
"""Amounts are counted in 1/10000 of the base currency, the finest subdivision of ISO 4217."""
MAX_AMOUNT = 1e9
"""Base currency; keeps the integer sums of a card far from their bound."""
COLD_RECENCY = 30 * 86_400.0
"""Seconds since the last event where there is none within 30 days."""
CARD_REACH = 30 * DAY
RISK_REACH = LABEL_DELAY + 30 * DAY


class Flag(IntFlag):
    """What was special about an event.

    LATE: a later event of the card had come before it. PARTIAL: a window reached below what
    is still remembered, so counts may be too low. DUPLICATE: the transaction was taken in before.
    UNCOUNTED: the event is older than what its card has forgotten, so it cannot be told from a
    repeated one; it is answered as the first of its card and not remembered. CONFLICT: the
    transaction was taken in before with another amount or terminal; its row is that of the first
    time, with the amount that is asked for now.
    """

    NONE = 0
    LATE = 1
    PARTIAL = 2
    DUPLICATE = 4
    UNCOUNTED = 8
    CONFLICT = 16


_LATE, _PARTIAL = Flag.LATE.value, Flag.PARTIAL.value


class Event(NamedTuple):
    """One transaction as the features see it.

    Args:
        transaction: id, unique on the card.
        time: event time, milliseconds since 1970-01-01T00:00Z.
        amount: base currency, 0 or more (0 verifies a card).
        card: token of the card.
        customer: id.
        terminal: id.
        device: id, if known.
    """

    transaction: str
    time: int
    amount: float
    card: str
    customer: str
    terminal: str
    device: str | None = None


class Labelled(NamedTuple):
    """What became known of one transaction.

    Args:
        transaction: its id.
        terminal: where it happened.
        time: its event time, milliseconds since 1970-01-01T00:00Z.
        known: when this became known, milliseconds; events before it never see it.
        fraud: fraud or, to withdraw an earlier label, genuine.
        card: token of its card, where the id alone may mean several payments.
    """

    transaction: str
    terminal: str
    time: int
    known: int
    fraud: bool
    card: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on memory, and how late an event may be.

    Args:
        lateness_ms: an event up to this much older than the newest of its card, customer,
            terminal and device still has complete windows.
        max_cards, max_terminals, max_customers, max_devices: entities remembered; beyond, the
            one longest without an event is forgotten.
        max_events: events remembered over all cards together, likewise events and labels over
            all terminals, events over all customers and all devices; beyond, the entities
            longest without an event are forgotten.
        card_events, terminal_events, customer_events, device_events: events remembered per
            entity; beyond, the oldest are forgotten.
    """

    lateness_ms: int = 7 * DAY
    max_cards: int = 200_000
    max_terminals: int = 200_000
    max_customers: int = 200_000
    max_devices: int = 200_000
    max_events: int = 10_000_000
    card_events: int = 4096
    terminal_events: int = 65_536
    customer_events: int = 4096
    device_events: int = 1024

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < (0 if name == "lateness_ms" else 8):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 8 or more")


@dataclass(frozen=True, slots=True)
class Batch:
    """Features of events, in order.

    Args:
        rows: float32 (n, FEATURE_COUNT), columns as in :data:`FEATURES`.
        flags: uint8 (n,), bits as in :class:`Flag`.
    """

    rows: npt.NDArray[np.float32]
    flags: npt.NDArray[np.uint8]


class FeatureState:
    """What is remembered of cards, terminals, customers and devices; for one thread at a time.

    Args:
        limits: bounds on memory and lateness.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits if limits is not None else Limits()
        entries, lateness = self.limits.max_events, self.limits.lateness_ms
        self._card_keep, self._terminal_keep, self._day_keep = (
            reach + lateness for reach in (CARD_REACH, RISK_REACH, DAY)
        )
        self.cards = Entities(Card, self.limits.max_cards, entries)
        self.terminals = Entities(Terminal, self.limits.max_terminals, entries)
        self.customers = Entities(Timeline, self.limits.max_customers, entries)
        self.devices = Entities(Device, self.limits.max_devices, entries)

    def update(self, events: Iterable[Event]) -> Batch:
        """Take events in, in this order, and return the features of each as of its time.

        Raises:
            InputError: an amount is not in [0, MAX_AMOUNT]; the events before it are taken in.
        """
        rows: list[bytes] = []
        flags = bytearray()
        for event in events:
            row, flag = self._take(*event)
            rows.append(row)
            flags.append(flag)
        values = np.frombuffer(b"".join(rows), dtype=np.float32).reshape(-1, FEATURE_COUNT)
        return Batch(values, np.frombuffer(flags, dtype=np.uint8))

    def label(self, label: Labelled, elsewhere: int = NEVER) -> bool:
        """Enter what became known of a transaction that was taken in.

        Args:
            label: what became known.
            elsewhere: milliseconds; up to this event time another state may have had the
                transaction.

        Returns:
            False where the transaction is too old to be found, its card was forgotten, or another
            state may have had it: then the label is believed, and windows that reach down to it
            are partial from now on.

        Raises:
            InputError: there was no such transaction, or the label may mean several.
        """
        place = self.terminals.items.get(label.terminal)
        if place is not None and label.time <= place.floor:
            self.terminals.sink(place)
        sure, forgotten = ([], []) if place is None else self._cards_of(label, place)
        floor = self.terminals.floor if place is None else place.floor
        if len(sure) > 1:
            raise InputError(
                "the label may mean payments of several cards",
                field="card",
                reason="ambiguous_label",
                hint="send the payment's card with the label",
            )
        if not sure and not forgotten and label.time > max(floor, elsewhere):
            raise InputError(
                "no payment has this transaction_id, terminal_id and event_time",
                field="transaction_id",
                reason="unknown_payment",
                hint="send the label after its payment, with the same ids and time",
            )
        place = self.terminals.touch(label.terminal)
        if not sure:
            place.blind = max(place.blind, label.time)
        told = [label.card] if label.card is not None and label.time > floor else []
        for card in sure or forgotten[:1] or told:
            before = place.entries()
            place.mark(f"{card} {label.transaction}", label.time, label.known, label.fraud)
            self.terminals.entries += place.entries() - before
            self.terminals.hold()
        return bool(sure)

    def _cards_of(self, label: Labelled, place: Terminal) -> tuple[list[str], list[str]]:
        """Cards with the labelled payment, and cards that may have had it and were forgotten."""
        sure, forgotten = [], []
        for card_id in sorted({c for c in place.cards_at(label.time) if label.card in (None, c)}):
            card = self.cards.items.get(card_id)
            if card is None or label.time <= card.floor:
                forgotten.append(card_id)
            elif label.transaction in card.known:
                at = card.index(label.transaction)
                if (card.times[at], card.terminals[at]) == (label.time, label.terminal):
                    sure.append(card_id)
        return sure, forgotten

    def _take(
        self,
        transaction: str,
        time: int,
        amount: float,
        card_id: str,
        customer_id: str,
        terminal_id: str,
        device_id: str | None,
    ) -> tuple[bytes, int]:
        if not 0 <= amount <= MAX_AMOUNT:
            raise InputError(f"amount: expected 0 to {MAX_AMOUNT:g}", field="amount")
        card_id = intern(card_id)
        card = self.cards.touch(card_id)
        units = round(amount * UNITS)
        if transaction in card.known:
            if card.times[card.index(transaction)] > card.floor:
                return _repeated(card, transaction, units, terminal_id)
            self.cards.sink(card)
        limits, day_keep = self.limits, self._day_keep
        partial = self.cards.reach(card, time, self._card_keep, CARD_REACH)
        if time <= card.floor:
            return self._answer_only(
                transaction, time, amount, card_id, customer_id, terminal_id, device_id
            )
        end = card.place(time, units, transaction, intern(terminal_id))
        late = end < len(card.times)

        terminal = self.terminals.touch(terminal_id)
        width = RISK_REACH if terminal.marks or terminal.blind > NEVER else DAY
        partial |= self.terminals.reach(terminal, time, self._terminal_keep, width)
        partial |= terminal.blind > time - RISK_REACH
        terminal_count = terminal.enter_with(time, DAY, card_id)
        risks = terminal.shares(time) if terminal.marks else (0.0, 0.0, 0.0)

        customer = self.customers.touch(customer_id)
        partial |= self.customers.reach(customer, time, day_keep, DAY)
        customer_count = customer.enter(time, DAY)

        device_cards = 0
        if device_id is not None:
            device = self.devices.touch(device_id)
            partial |= self.devices.reach(device, time, day_keep, DAY)
            device_cards = device.enter_with(time, DAY, card_id)
            self.devices.grown(device, day_keep, limits.device_events)

        row = ROW.pack(
            *_card_features(card, time, units, end),
            terminal_count,
            *risks,
            customer_count,
            device_cards,
        )
        flags = (_LATE if late else 0) | (_PARTIAL if partial else 0)
        card.keep_row(end, row, flags)
        self.cards.grown(card, self._card_keep, limits.card_events)
        self.terminals.grown(terminal, self._terminal_keep, limits.terminal_events)
        self.customers.grown(customer, day_keep, limits.customer_events)
        return row, flags

    def _answer_only(self, *event: Any) -> tuple[bytes, int]:
        row, _ = FeatureState(self.limits)._take(*event)
        return row, Flag.LATE.value | Flag.PARTIAL.value | Flag.UNCOUNTED.value


def _repeated(card: Card, transaction: str, units: int, terminal: str) -> tuple[bytes, int]:
    """The first row of a transaction that comes again, judged by the amount asked for now.

    Every window of the card ends with the transaction itself, so another amount changes each
    sum by the difference, and the ratio is amount * count / sum.
    """
    at = card.index(transaction)
    row, flags = card.row(at)
    flags |= Flag.DUPLICATE.value
    first = card.units(at)
    if units == first and terminal == card.terminals[at]:
        return row, flags
    values = list(ROW.unpack(row))
    values[_AMOUNT] = units / UNITS
    for column in _SUMS:
        values[column] += (units - first) / UNITS
    month = values[_SUMS[-1]]
    values[_RATIO] = values[_AMOUNT] * values[_COUNT_30D] / month if month > 0 else 1.0
    return ROW.pack(*values), flags | Flag.CONFLICT.value


def _card_features(card: Card, time: int, units: int, end: int) -> tuple[float, ...]:
    """The first sixteen columns; ``end`` counts the card's entries up to the event itself."""
    times, sums = card.times, card.sums
    start30 = bisect_right(times, time - 30 * DAY, 0, end)
    start7 = bisect_right(times, time - 7 * DAY, start30, end)
    start1 = bisect_right(times, time - DAY, start7, end)
    hour = bisect_right(times, time - HOUR, start1, end)
    five = bisect_right(times, time - 5 * MINUTE, hour, end)
    total = sums[end]
    month = total - sums[start30]
    recency = (time - times[end - 2]) / 1000 if end > 1 else COLD_RECENCY
    if recency > COLD_RECENCY:
        recency = COLD_RECENCY
    return (
        units / UNITS,
        (time // DAY + 3) % 7 >= 5,
        time % DAY < 7 * HOUR,
        end - five,
        end - hour,
        end - start1,
        end - start7,
        end - start30,
        (total - sums[five]) / UNITS,
        (total - sums[hour]) / UNITS,
        (total - sums[start1]) / UNITS,
        (total - sums[start7]) / UNITS,
        month / UNITS,
        units * (end - start30) / month if month else 1.0,
        recency,
        1 if end - start1 == 1 else len(set(card.terminals[start1:end])),
    )
