"""Real-time features over event time; one code for training and serving.

Every window is exact and reads (t - w, t] at the event's own time ``t``, the event included,
over the events known when it came. A late event is placed at its time; a repeated one is not
counted again and gets the row of its first time. Labels have a time of their own and are
never read before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import partial
from struct import Struct
from sys import intern
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.finance.features.language import KEYS, Key
from plinth.verticals.finance.features.places import Place
from plinth.verticals.finance.features.program import STANDARD, Again, Program
from plinth.verticals.finance.features.timeline import (
    DAY,
    LABEL_DELAY,
    NEVER,
    UNITS,
    Card,
    Device,
    Entities,
    Shelf,
    Terminal,
    Timeline,
)

FEATURES: tuple[str, ...] = STANDARD.names
"""Columns of the features that come with Plinth; amounts in base currency, shares in [0, 1]."""
MODEL_FEATURES: tuple[str, ...] = STANDARD.model_names
"""Those the model sees. Devices serve the rules: the training data has none."""
MAX_AMOUNT = 1e9
"""Base currency; keeps the integer sums of a card far from their bound."""
MAX_WORTH = 10_000_000
"""Base currency: no single card payment is larger; a larger one is a fault of the sender."""
CARD_REACH = 30 * DAY
"""Milliseconds for which a card's payments are remembered at least, so that repeats are known."""
LABEL_REACH = LABEL_DELAY + 30 * DAY
"""Milliseconds for which a terminal's are, so that labels find them."""


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
        place: latitude and longitude of the payment, degrees, if known.
    """

    transaction: str
    time: int
    amount: float
    card: str
    customer: str
    terminal: str
    device: str | None = None
    place: Place | None = None


Told = tuple[str, int, float, str, str, str, str | None, Place | None]
"""An :class:`Event` as a plain tuple, which takes a third of the time to make."""


def refused_amount(payment: Any, rate: float) -> InputError | None:
    """Why a payment of such an amount is not taken; ``None``: it is.

    Args:
        payment: a ``Transaction`` that was read.
        rate: base currency for one of its own.
    """
    if payment.amount * rate <= MAX_WORTH:
        return None
    return InputError(
        f"amount: worth more than {MAX_WORTH:,} of the base currency",
        field="amount",
        reason="too_large",
        hint="is it in the currency's smallest unit, or its rate of another unit?",
    )


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


class Past(NamedTuple):
    """A payment that is remembered: its id, milliseconds, base currency, where."""

    transaction: str
    time: int
    amount: float
    terminal: str


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
        rows: float32 (n, columns), as the declared features have them.
        flags: uint8 (n,), bits as in :class:`Flag`.
    """

    rows: npt.NDArray[np.float32]
    flags: npt.NDArray[np.uint8]


class FeatureState:
    """What is remembered of cards, terminals, customers and devices; for one thread at a time.

    Args:
        limits: bounds on memory and lateness.
        features: what is computed.

    Attributes:
        frauds: payments that became known as frauds since this was made or restored; a label that
            comes again is not counted again.
        journal: is told what was taken in, so that :meth:`enter` can take it in again.
    """

    def __init__(self, limits: Limits | None = None, features: Program = STANDARD) -> None:
        self.limits = limits if limits is not None else Limits()
        self.frauds = 0
        self.journal: Callable[[bytes], None] | None = None
        entries, lateness = self.limits.max_events, self.limits.lateness_ms
        self.features = features
        windows: list[int] = [features.window(key) for key in KEYS]
        self._card_window, self._terminal_window = windows[0], windows[1]
        self._customer_window, self._device_window = windows[2], windows[3]
        self._risk: int = max(features.risk, windows[1])
        self._card_keep = max(windows[0], CARD_REACH) + lateness
        self._terminal_keep = max(windows[1], LABEL_REACH, self._risk) + lateness
        self._customer_keep, self._device_keep = windows[2] + lateness, windows[3] + lateness
        self._more: bool = any(features.columns.values())
        self._row: Callable[..., bytes] = features.row
        limits = self.limits
        self.cards: Entities[Card] = Entities(
            _entity(Card, features, "card"), limits.max_cards, entries
        )
        self.terminals: Entities[Terminal] = Entities(
            _entity(Terminal, features, "terminal"), limits.max_terminals, entries
        )
        self.customers: Entities[Timeline] = Entities(
            _entity(Timeline, features, "customer"), limits.max_customers, entries
        )
        self.devices: Entities[Device] = Entities(
            _entity(Device, features, "device"), limits.max_devices, entries
        )

    @property
    def tables(self) -> dict[str, Entities[Any]]:
        """Its tables by name."""
        return {
            "cards": self.cards,
            "terminals": self.terminals,
            "customers": self.customers,
            "devices": self.devices,
        }

    @property
    def shelves(self) -> list[Shelf[Any]]:
        """Of its tables, where they are kept on disk."""
        return [table.shelf for table in self.tables.values() if table.shelf is not None]

    @property
    def unsaved(self) -> float:
        """What no durable checkpoint has, as a share of what may be in memory."""
        return max(table.unsaved for table in self.tables.values())

    def clear(self) -> None:
        """Forget all, as if nothing had come."""
        for table in self.tables.values():
            table.clear()

    def enter(self, entry: bytes) -> None:
        """Take in again what was told to the journal."""
        kind, *told = orjson.loads(entry)
        if kind == "label":
            *fields, elsewhere = told
            self.label(Labelled(*fields), elsewhere)
        else:
            transaction, time, amount, card, customer, terminal, device, place = told
            where = None if place is None else (place[0], place[1])
            self._take((transaction, time, amount, card, customer, terminal, device, where))

    def update(self, events: Iterable[Told]) -> Batch:
        """Take events in, in this order, and return the features of each as of its time.

        Raises:
            InputError: an amount is not in [0, MAX_AMOUNT]; the events before it are taken in.
        """
        rows: list[bytes] = []
        flags: list[int] = []
        journal = self.journal
        for event in events:
            row, flag = self._take(event)
            if journal is not None:
                journal(orjson.dumps(("event", *event)))
            rows.append(row)
            flags.append(flag)
        width = len(self.features.names)
        values = np.frombuffer(b"".join(rows), dtype=np.float32).reshape(-1, width)
        return Batch(values, np.frombuffer(bytearray(flags), dtype=np.uint8))

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
        place = self.terminals.find(label.terminal)
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
                hint="send the label after its payment: same ids and time, in Kafka the same key",
            )
        place = self.terminals.touch(label.terminal)
        if not sure:
            place.blind = max(place.blind, label.time)
        told = [label.card] if label.card is not None and label.time > floor else []
        for card in sure or forgotten[:1] or told:
            before = place.entries()
            payment = f"{card} {label.transaction}"
            self.frauds += label.fraud and payment not in place.marks
            place.mark(payment, label.time, label.known, label.fraud)
            self.terminals.entries += place.entries() - before
            self.terminals.hold()
        if self.journal is not None:
            self.journal(orjson.dumps(("label", *label, elsewhere)))
        return bool(sure)

    def history(self, card: str, limit: int) -> list[Past]:
        """The newest payments of a card that are remembered, newest first."""
        found = self.cards.peek(card)
        if found is None:
            return []
        newest = range(len(found.times) - 1, max(-1, len(found.times) - 1 - limit), -1)
        return [
            Past(found.ids[at], found.times[at], found.units(at) / UNITS, found.terminals[at])
            for at in newest
            if found.times[at] > found.floor
        ]

    def _cards_of(self, label: Labelled, place: Terminal) -> tuple[list[str], list[str]]:
        """Cards with the labelled payment, and cards that may have had it and were forgotten."""
        sure, forgotten = [], []
        for card_id in sorted({c for c in place.cards_at(label.time) if label.card in (None, c)}):
            card = self.cards.peek(card_id)
            if card is None or label.time <= card.floor:
                forgotten.append(card_id)
            elif label.transaction in card.known:
                at = card.index(label.transaction)
                if (card.times[at], card.terminals[at]) == (label.time, label.terminal):
                    sure.append(card_id)
        return sure, forgotten

    def _take(self, event: Told) -> tuple[bytes, int]:
        transaction, time, amount, card_id, customer_id, terminal_id, device_id, place = event
        if not 0 <= amount <= MAX_AMOUNT:
            raise InputError(f"amount: expected 0 to {MAX_AMOUNT:g}", field="amount")
        cards, limits = self.cards, self.limits
        card_id = intern(card_id)
        card = cards.touch(card_id)
        units = round(amount * UNITS)
        if transaction in card.known:
            if card.times[card.index(transaction)] > card.floor:
                return _repeated(card, transaction, units, terminal_id, self.features.again)
            cards.sink(card)
        partial = cards.reach(card, time, self._card_keep, self._card_window)
        if time <= card.floor:
            return self._answer_only(event)
        card_end = card.place(time, units, transaction, intern(terminal_id))
        flags = _LATE if card_end < len(card.times) else 0

        terminal = self.terminals.touch(terminal_id)
        risky = terminal.blind > NEVER or len(terminal.marks) > 0
        width = self._risk if risky else self._terminal_window
        partial |= self.terminals.reach(terminal, time, self._terminal_keep, width)
        partial |= terminal.blind > time - self._risk
        terminal_end = terminal.place(time, card_id)

        customer = self.customers.touch(customer_id)
        partial |= self.customers.reach(customer, time, self._customer_keep, self._customer_window)
        customer_end = customer.add(time)

        device, device_end = None, 0
        if device_id is not None:
            device = self.devices.touch(device_id)
            partial |= self.devices.reach(device, time, self._device_keep, self._device_window)
            device_end = device.place(time, card_id)

        if self._more:
            held = card, card_end, terminal, terminal_end, customer, customer_end
            told = {"sums": units, "place": place, "card": card_id, "customer": customer_id}
            told |= {"terminal": terminal_id, "device": device_id}
            self._keep((*held, device, device_end), told)
        row = self._row(
            time, units, card, card_end, terminal, terminal_end, customer, customer_end, device,
            device_end,
        )  # fmt: skip
        flags |= _PARTIAL if partial else 0
        card.keep_row(card_end, row, flags)
        cards.grown(card, self._card_keep, limits.card_events)
        self.terminals.grown(terminal, self._terminal_keep, limits.terminal_events)
        self.customers.grown(customer, self._customer_keep, limits.customer_events)
        if device is not None:
            self.devices.grown(device, self._device_keep, limits.device_events)
        return row, flags

    def _keep(self, held: Sequence[Any], told: Mapping[str, Any]) -> None:
        """Enter what declared features need of an event into its entities' columns."""
        columns = self.features.columns.values()
        for entity, end, names in zip(held[::2], held[1::2], columns, strict=True):
            if entity is not None:
                for column, name in zip(entity.columns, names, strict=True):
                    column.insert(end - 1, told[name])

    def _answer_only(self, event: Told) -> tuple[bytes, int]:
        row, _ = FeatureState(self.limits, self.features)._take(event)
        return row, Flag.LATE.value | Flag.PARTIAL.value | Flag.UNCOUNTED.value


def _repeated(
    card: Card, transaction: str, units: int, terminal: str, again: Again
) -> tuple[bytes, int]:
    """The first row of a transaction that comes again, judged by the amount asked for now.

    Every window ends with the transaction itself, so another amount changes each sum by the
    difference, and a ratio to the mean is amount * count / sum. Other columns stay.
    """
    at = card.index(transaction)
    row, flags = card.row(at)
    flags |= Flag.DUPLICATE.value
    first = card.units(at)
    if units == first and terminal == card.terminals[at]:
        return row, flags
    packed = Struct(f"{len(row) // 4}f")
    values = list(packed.unpack(row))
    for column in again.amount:
        values[column] = units / UNITS
    for column in again.sums:
        values[column] += (units - first) / UNITS
    for column, count, total, otherwise in again.ratios:
        whole = values[total]
        values[column] = units / UNITS * values[count] / whole if whole > 0 else otherwise
    return packed.pack(*values), flags | Flag.CONFLICT.value


def _entity(kind: Callable[..., Any], program: Program, key: Key) -> Callable[[int], Any]:
    """What makes an entity with the columns that its features need."""
    if not program.columns[key]:
        return kind
    return partial(_with_columns, kind, program, key)


def _with_columns(kind: Callable[..., Any], program: Program, key: Key, floor: int) -> Any:
    return kind(floor, program.timeline_columns(key))
