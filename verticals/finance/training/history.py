"""Past payments with their features and what became known of them: what models train on."""

from __future__ import annotations

import gzip
import logging
import zlib
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.finance.asked import Asked
from plinth.verticals.finance.features.online import (
    Event,
    FeatureState,
    Flag,
    Labelled,
    refused_amount,
)
from plinth.verticals.finance.features.program import STANDARD, Program
from plinth.verticals.finance.features.timeline import ALWAYS, DAY, LABEL_DELAY, milliseconds
from plinth.verticals.finance.schema import (
    Label,
    Payment,
    is_follow_up,
    read,
)
from plinth.verticals.finance.training.simulator import TABLE, Population, Table, events, simulate

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Advance = Callable[[int], None]
WEEK = 7
FIRST_RECORDED = 37
"""Day of a history from which on the windows of the features are full."""
CHUNK = 4096
MAX_LINE = 1_000_000
"""Bytes of one record."""


What = TypeVar("What", covariant=True)


@dataclass(frozen=True, slots=True)
class Arrival(Generic[What]):
    """When a door received something, milliseconds, and what."""

    at: int
    what: What


@dataclass(frozen=True, slots=True)
class Data:
    """Payments with their features, ascending in event time.

    Args:
        table: dtype as in ``simulator.TABLE``; ``customer`` numbers cards.
        rows: float32 (n, features), as serving computes them.
        day: (n,) days since the start.
        known: (n,) since when a fraud is known to be one, milliseconds.
        features: of which ``rows`` has what models see.
    """

    table: Table
    rows: npt.NDArray[np.float32]
    day: npt.NDArray[np.int64]
    known: npt.NDArray[np.int64]
    features: Program = STANDARD

    @property
    def days(self) -> int:
        """Days from the first payment to the last."""
        return int(self.day[-1]) + 1

    def between(self, first: int, days: int) -> Rows:
        """Row numbers of these days."""
        return np.nonzero((self.day >= first) & (self.day < first + days))[0]

    def start(self, day: int) -> int:
        """When a day begins, milliseconds since 1970-01-01T00:00Z."""
        return int(self.table["time"][0] // DAY - self.day[0] + day) * DAY

    def as_known(self, moment: int) -> Data:
        """The same with the frauds that were known at a moment; milliseconds."""
        table = self.table.copy()
        table["fraud"] &= self.known < moment
        return replace(self, table=table)

    def test(self, first: int, known_from: int, days: int = WEEK) -> Rows:
        """Row numbers of test days without cards known as defrauded when the day began.

        Frauds before ``known_from`` do not count.
        """
        parts = []
        for today in range(first, first + days):
            past = self.between(known_from, today - known_from)
            known = self.table["fraud"][past] & (self.known[past] < self.start(today))
            gone = np.unique(self.table["customer"][past[known]])
            rows = self.between(today, 1)
            parts.append(rows[~np.isin(self.table["customer"][rows], gone)])
        return np.concatenate(parts)


def simulated(
    population: Population, seed: int, advance: Advance, features: Program = STANDARD
) -> Data:
    """Simulated payments; each fraud becomes known 7 days later.

    Args:
        population: what to simulate.
        seed: of the simulation.
        advance: told how many more payments are done.
        features: to compute.
    """
    table = simulate(population, seed=seed)
    frauds = table[table["fraud"]]
    labels = [
        Arrival(
            event.time + LABEL_DELAY,
            Labelled(
                event.transaction,
                event.terminal,
                event.time,
                event.time + LABEL_DELAY,
                True,
                event.card,
            ),
        )
        for event in events(frauds)
    ]
    payments = (Arrival(event.time, event) for event in events(table))
    rows, _ = _features(payments, labels, features, advance)
    day = (table["time"] - population.start_ms) // DAY
    return Data(table, rows, day, table["time"] + LABEL_DELAY, features)


def recorded(
    files: Sequence[Path],
    rates: Mapping[str, float],
    advance: Advance,
    features: Program = STANDARD,
) -> Data:
    """Recorded payments and labels, in any order; a payment without a label is genuine.

    Features are computed in the order of ``received_time``, so that each row is what serving saw.
    Where it is not told, a payment came at its time, a label when it became known.

    Args:
        files: JSON lines as the doors take them, plain or ``.gz``.
        rates: currencies taken, and what one unit is worth in base currency.
        advance: told how many more payments are done.
        features: to compute.

    Raises:
        InputError: names the file and line of a record that cannot be read.
        ConfigError: a file is missing, or there are no transactions.
    """
    payments: list[Arrival[Event]] = []
    labels: list[Arrival[Labelled]] = []
    for file in files:
        for came in _records(file, rates):
            (payments if isinstance(came.what, Event) else labels).append(came)  # type: ignore[arg-type]
    if not payments:
        raise ConfigError(f"no transactions in {', '.join(map(str, files))}")
    payments.sort(key=lambda came: came.at)
    labels.sort(key=lambda came: came.at)
    rows, flags = _features(iter(payments), labels, features, advance)
    table, known = _table([came.what for came in payments], [came.what for came in labels])
    once = np.flatnonzero((flags & Flag.DUPLICATE.value) == 0)
    order = once[np.argsort(table["time"][once], kind="stable")]
    table = table[order]
    table["transaction"] = np.arange(len(table))
    day = table["time"] // DAY
    return Data(table, rows[order], day - day[0], known[order], features)


def _records(file: Path, rates: Mapping[str, float]) -> Iterator[Arrival[Event | Labelled]]:
    if not file.is_file():
        raise ConfigError(f"{file} is not a file")
    number = 0
    try:
        for number, line in enumerate(_lines(file), 1):
            try:
                made = read(line) if line.strip() else None
                if made is not None and not is_follow_up(made):
                    yield _record(made, rates)
            except InputError as error:
                raise InputError(
                    f"{file}:{number}: {error.message}",
                    field=error.field,
                    hint=error.hint,
                    reason=error.reason,
                ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{file}: cannot be read after line {number}: {error}",
            hint="it is damaged, or not yet copied in full: copy to another name, then rename",
            reason="damaged_file",
        ) from None


def _lines(file: Path) -> Iterator[bytes]:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        while line := lines.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise InputError(
                    f"{file}: a line has more than {MAX_LINE:,} bytes",
                    hint="one JSON object a line; is it a file of records?",
                    reason="too_large",
                )
            yield line.removeprefix(BOM_UTF8)


def _record(made: Payment | Label, rates: Mapping[str, float]) -> Arrival[Event | Labelled]:
    time = milliseconds(made.event_time)
    received = None if made.received_time is None else milliseconds(made.received_time)
    if isinstance(made, Label):
        known = milliseconds(made.label_time)
        label = Labelled(made.transaction_id, made.terminal_id, time, known, made.fraud, made.card)
        return Arrival(known if received is None else received, label)
    if made.currency not in rates:
        raise InputError(f"currency: there is no rate for {made.currency}", field="currency")
    if refused := refused_amount(made, rates[made.currency]):
        raise refused
    (told,) = Asked.of([made], rates).events()
    return Arrival(time if received is None else received, Event(*told))


def _features(
    payments: Iterator[Arrival[Event]],
    labels: Sequence[Arrival[Labelled]],
    features: Program,
    advance: Advance,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Model features (n, features) and flags (n,), through the code that serving runs."""
    state = FeatureState(features=features)
    waiting = deque(labels)
    unused: Counter[str] = Counter()

    def in_order() -> Iterator[Event]:
        for came in payments:
            while waiting and waiting[0].at <= came.at:
                try:
                    state.label(waiting.popleft().what)
                except InputError as error:
                    unused[error.reason] += 1
            yield came.what

    stream = in_order()
    rows: list[npt.NDArray[np.float32]] = []
    flags: list[npt.NDArray[np.uint8]] = []
    while True:
        batch = state.update(islice(stream, CHUNK))
        if not len(batch.flags):
            for reason, count in unused.items():
                log.warning("%d labels were not used: %s", count, reason)
            return np.concatenate(rows), np.concatenate(flags)
        rows.append(batch.rows[:, : features.model])
        flags.append(batch.flags)
        advance(len(batch.flags))


def _told(labels: Sequence[Labelled]) -> dict[tuple[str, str, int], list[Labelled]]:
    """Labels by what they name a payment by, cards aside, as they became known."""
    found: dict[tuple[str, str, int], list[Labelled]] = {}
    for label in sorted(labels, key=lambda label: label.known):
        found.setdefault((label.transaction, label.terminal, label.time), []).append(label)
    return found


def _since(labels: Sequence[Labelled], card: str) -> int:
    """Since when a payment is known to be a fraud; the label that became known last is right."""
    since = ALWAYS
    for label in labels:
        if label.card in (None, card):
            since = min(since, label.known) if label.fraud else ALWAYS
    return since


def _table(payments: Sequence[Event], labels: Sequence[Labelled]) -> tuple[Table, Rows]:
    """The payments, and since when those that are frauds are known to be."""
    told = _told(labels)
    cards: dict[str, int] = {}
    terminals: dict[str, int] = {}
    table = np.zeros(len(payments), TABLE)
    table["transaction"] = np.arange(len(payments))
    table["time"] = [event.time for event in payments]
    table["amount"] = [event.amount for event in payments]
    table["customer"] = [cards.setdefault(event.card, len(cards)) for event in payments]
    table["terminal"] = [terminals.setdefault(e.terminal, len(terminals)) for e in payments]
    known = [
        _since(told.get((one.transaction, one.terminal, one.time), ()), one.card)
        for one in payments
    ]
    table["fraud"] = [since < ALWAYS for since in known]
    return table, np.array(known, np.int64)
