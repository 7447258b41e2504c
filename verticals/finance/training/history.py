"""Past payments with their features and what became known of them: what models train on."""

from __future__ import annotations

import gzip
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError, InputError
from plinth.verticals.finance.features.online import (
    MODEL_FEATURES,
    Event,
    FeatureState,
    Flag,
    Labelled,
)
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.schema import Label, Transaction, is_follow_up, milliseconds, read
from plinth.verticals.finance.training.simulator import TABLE, Population, Table, events, simulate

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]
Advance = Callable[[int], None]
WEEK = 7
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Data:
    """Payments with their features, ascending in event time.

    Args:
        table: dtype as in ``simulator.TABLE``; ``customer`` numbers cards.
        rows: float32 (n, features), as serving computes them.
        day: (n,) days since the start.
    """

    table: Table
    rows: npt.NDArray[np.float32]
    day: npt.NDArray[np.int64]

    @property
    def days(self) -> int:
        """Days from the first payment to the last."""
        return int(self.day[-1]) + 1

    def between(self, first: int, days: int) -> Rows:
        """Row numbers of these days."""
        return np.nonzero((self.day >= first) & (self.day < first + days))[0]

    def test(self, first: int, known_from: int, days: int = WEEK) -> Rows:
        """Row numbers of test days without cards known as defrauded by then.

        A fraud is known from 7 days after its day on; frauds before ``known_from`` do not count.
        """
        parts = []
        for today in range(first, first + days):
            known = self.between(known_from, today - WEEK - known_from)
            gone = np.unique(self.table["customer"][known[self.table["fraud"][known]]])
            rows = self.between(today, 1)
            parts.append(rows[~np.isin(self.table["customer"][rows], gone)])
        return np.concatenate(parts)


def simulated(population: Population, seed: int, advance: Advance) -> Data:
    """Simulated payments; each fraud becomes known 7 days later.

    Args:
        population: what to simulate.
        seed: of the simulation.
        advance: told how many more payments are done.
    """
    table = simulate(population, seed=seed)
    frauds = table[table["fraud"]]
    labels = [
        Labelled(
            event.transaction,
            event.terminal,
            event.time,
            event.time + LABEL_DELAY,
            True,
            event.card,
        )
        for event in events(frauds)
    ]
    rows, _ = _features(events(table), labels, advance)
    return Data(table, rows, (table["time"] - population.start_ms) // DAY)


def recorded(files: Sequence[Path], rates: Mapping[str, float], advance: Advance) -> Data:
    """Recorded payments and labels, in any order; a payment without a label is genuine.

    Args:
        files: JSON lines as the doors take them, plain or ``.gz``.
        rates: currencies taken, and what one unit is worth in base currency.
        advance: told how many more payments are done.

    Raises:
        InputError: names the file and line of a record that cannot be read.
        ConfigError: a file is missing, or there are no transactions.
    """
    payments: list[Event] = []
    labels: list[Labelled] = []
    for file in files:
        for record in _records(file, rates):
            (payments if isinstance(record, Event) else labels).append(record)  # type: ignore[arg-type]
    if not payments:
        raise ConfigError(f"no transactions in {', '.join(map(str, files))}")
    payments.sort(key=lambda event: event.time)
    labels.sort(key=lambda label: label.known)
    rows, flags = _features(iter(payments), labels, advance)
    once = (flags & Flag.DUPLICATE.value) == 0
    table = _table(payments, labels)[once]
    day = table["time"] // DAY
    return Data(table, rows[once], day - day[0])


def _records(file: Path, rates: Mapping[str, float]) -> Iterator[Event | Labelled]:
    if not file.is_file():
        raise ConfigError(f"{file} is not a file")
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
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


def _record(made: Transaction | Label, rates: Mapping[str, float]) -> Event | Labelled:
    time = milliseconds(made.event_time)
    if isinstance(made, Label):
        known = milliseconds(made.label_time)
        return Labelled(made.transaction_id, made.terminal_id, time, known, made.fraud, made.card)
    if made.currency not in rates:
        raise InputError(f"currency: there is no rate for {made.currency}", field="currency")
    return Event(
        made.transaction_id,
        time,
        made.amount * rates[made.currency],
        made.card,
        made.customer_id,
        made.terminal_id,
        made.device_id,
    )


def _features(
    payments: Iterator[Event], labels: Sequence[Labelled], advance: Advance
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Model features (n, features) and flags (n,), through the code that serving runs."""
    state = FeatureState()
    waiting = deque(labels)
    unused: Counter[str] = Counter()

    def in_order() -> Iterator[Event]:
        for event in payments:
            while waiting and waiting[0].known <= event.time:
                try:
                    state.label(waiting.popleft())
                except InputError as error:
                    unused[error.reason] += 1
            yield event

    stream = in_order()
    rows: list[npt.NDArray[np.float32]] = []
    flags: list[npt.NDArray[np.uint8]] = []
    while True:
        batch = state.update(islice(stream, CHUNK))
        if not len(batch.flags):
            for reason, count in unused.items():
                log.warning("%d labels were not used: %s", count, reason)
            return np.concatenate(rows), np.concatenate(flags)
        rows.append(batch.rows[:, : len(MODEL_FEATURES)])
        flags.append(batch.flags)
        advance(len(batch.flags))


def _table(payments: Sequence[Event], labels: Sequence[Labelled]) -> Table:
    last = {(label.transaction, label.terminal, label.time): label.fraud for label in labels}
    cards: dict[str, int] = {}
    terminals: dict[str, int] = {}
    table = np.zeros(len(payments), TABLE)
    table["transaction"] = np.arange(len(payments))
    table["time"] = [event.time for event in payments]
    table["amount"] = [event.amount for event in payments]
    table["customer"] = [cards.setdefault(event.card, len(cards)) for event in payments]
    table["terminal"] = [terminals.setdefault(e.terminal, len(terminals)) for e in payments]
    table["fraud"] = [last.get((e.transaction, e.terminal, e.time), False) for e in payments]
    return table
