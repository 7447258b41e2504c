"""A seeded simulator of card payments with three kinds of fraud, vectorised.

Written from the published description of the simulator in the Fraud Detection Handbook
(Le Borgne, Siblini, Lebichot, Bontempi; Université Libre de Bruxelles, 2022, chapter 3).
Customers and terminals lie on a square of 100 x 100; a customer pays at the terminals within
a radius. Frauds: (1) amounts above 220; (2) compromised terminals: every payment for 28 days;
(3) compromised cards: a third of the payments of 14 days, at five times the amount. A later
kind overwrites the number of an earlier one. All data is synthetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from plinth.engine.errors import ConfigError
from plinth.verticals.finance.features.online import Event
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY

TABLE = np.dtype(
    [
        ("transaction", np.int64),
        ("time", np.int64),
        ("customer", np.int32),
        ("terminal", np.int32),
        ("amount", np.float64),
        ("fraud", np.bool_),
        ("scenario", np.int8),
    ]
)
"""Row number in order of time; event time in epoch milliseconds; amounts in EUR, whole cents;
scenario 0 (genuine) to 3."""
Table = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BIG_AMOUNT = 220.0
TERMINAL_DAYS = 28
CARD_DAYS = 14
CARD_FACTOR = 5.0


@dataclass(frozen=True, slots=True)
class Population:
    """What to simulate; the defaults are the published setting.

    Args:
        customers: each with one card.
        terminals: on the square.
        days: length.
        start: first day, UTC.
        radius: a customer pays at terminals nearer than this, square side 100.
        bad_terminals: compromised per day on average; default 2 per 10,000 terminals.
        bad_cards: compromised per day on average; default 3 per 5,000 customers.
    """

    customers: int = 5000
    terminals: int = 10_000
    days: int = 183
    start: datetime = datetime(2018, 4, 1, tzinfo=UTC)
    radius: float = 5.0
    bad_terminals: float | None = None
    bad_cards: float | None = None

    def __post_init__(self) -> None:
        for name in ("customers", "terminals", "days"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 to 1,000,000")
        if self.start.tzinfo is None:
            raise ConfigError("start has no time zone", hint="pass datetime(..., tzinfo=UTC)")

    @property
    def start_ms(self) -> int:
        """The first moment, epoch milliseconds."""
        return int(self.start.timestamp()) * 1000


def simulate(population: Population | None = None, *, seed: int = 0) -> Table:
    """Simulate payments; the same seed gives the same table.

    Args:
        population: what to simulate.
        seed: of the random numbers.

    Returns:
        structured array of dtype :data:`TABLE`, ascending in time.
    """
    people = population if population is not None else Population()
    rng = np.random.default_rng(seed)
    table = _payments(people, rng)
    table["scenario"][table["amount"] > BIG_AMOUNT] = 1
    _compromise_terminals(table, people, rng)
    _compromise_cards(table, people, rng)
    table["fraud"] = table["scenario"] > 0
    return table


def _payments(people: Population, rng: np.random.Generator) -> Table:
    homes = rng.uniform(0, 100, (people.customers, 2))
    mean_amount = rng.uniform(5, 100, people.customers)
    mean_count = rng.uniform(0, 4, people.customers)
    first, near = _terminals_near(homes, rng.uniform(0, 100, (people.terminals, 2)), people.radius)

    counts = rng.poisson(mean_count[:, None], (people.customers, people.days))
    who = np.repeat(np.arange(people.customers), counts.sum(axis=1))
    day = np.repeat(np.tile(np.arange(people.days), people.customers), counts.ravel())
    second = np.trunc(rng.normal(43_200, 20_000, len(who))).astype(np.int64)
    reach = np.diff(first)
    keep = (second > 0) & (second < 86_400) & (reach[who] > 0)
    who, day, second = who[keep], day[keep], second[keep]

    mean = mean_amount[who]
    amount: Floats = rng.normal(mean, mean / 2)
    amount = np.where(amount < 0, rng.uniform(0, 2 * mean), amount).round(2)
    pick = np.minimum((rng.random(len(who)) * reach[who]).astype(np.int64), reach[who] - 1)

    order = np.argsort(day * 86_400 + second, kind="stable")
    table = np.zeros(len(order), TABLE)
    table["transaction"] = np.arange(len(order))
    table["time"] = people.start_ms + day[order] * DAY + second[order] * 1000
    table["customer"] = who[order]
    table["terminal"] = near[first[who] + pick][order]
    table["amount"] = np.maximum(amount[order], 0.01)
    return table


def _terminals_near(
    homes: Floats, places: Floats, radius: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Terminals within ``radius`` of each home, joined; customer i has first[i]:first[i + 1]."""
    parts, counts = [], [0]
    for start in range(0, len(homes), 256):
        gaps = homes[start : start + 256, None, :] - places[None, :, :]
        inside = np.square(gaps).sum(axis=2) < radius**2
        parts.append(np.nonzero(inside)[1])
        counts.extend(inside.sum(axis=1).tolist())
    return np.cumsum(counts, dtype=np.int64), np.concatenate(parts)


def _daily(average: float, limit: int, rng: np.random.Generator) -> int:
    """A whole number with this average, at most ``limit``."""
    return min(int(average) + int(rng.random() < average % 1), limit)


def _windows(table: Table, column: str, size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows grouped by an id, each group in order of time, and where each group starts."""
    order = np.argsort(table[column], kind="stable")
    return order, np.searchsorted(table[column][order], np.arange(size + 1))


def _compromise_terminals(table: Table, people: Population, rng: np.random.Generator) -> None:
    average = people.bad_terminals
    average = people.terminals / 5000 if average is None else average
    order, starts = _windows(table, "terminal", people.terminals)
    day = (table["time"] - people.start_ms) // DAY
    for today in range(people.days - 1):
        count = _daily(average, people.terminals, rng)
        for bad in rng.choice(people.terminals, count, replace=False):
            rows = order[starts[bad] : starts[bad + 1]]
            hit = (day[rows] >= today) & (day[rows] < today + TERMINAL_DAYS)
            table["scenario"][rows[hit]] = 2


def _compromise_cards(table: Table, people: Population, rng: np.random.Generator) -> None:
    average = people.bad_cards
    average = 3 * people.customers / 5000 if average is None else average
    order, starts = _windows(table, "customer", people.customers)
    day = (table["time"] - people.start_ms) // DAY
    for today in range(people.days - 1):
        count = _daily(average, people.customers, rng)
        for bad in rng.choice(people.customers, count, replace=False):
            rows = order[starts[bad] : starts[bad + 1]]
            rows = rows[(day[rows] >= today) & (day[rows] < today + CARD_DAYS)]
            hit = rng.choice(rows, len(rows) // 3, replace=False)
            table["amount"][hit] = np.round(table["amount"][hit] * CARD_FACTOR, 2)
            table["scenario"][hit] = 3


def card_token(customer: int) -> str:
    """The token of a simulated customer's card: a keyed hash, as a real sender would make it."""
    return "tok_" + blake2b(f"{customer}".encode(), digest_size=8, key=b"simulated").hexdigest()


def events(table: Table) -> Iterator[Event]:
    """The table as events for :class:`plinth.verticals.finance.features.online.FeatureState`."""
    tokens = {int(who): card_token(int(who)) for who in np.unique(table["customer"])}
    columns = ("transaction", "time", "amount", "customer", "terminal")
    for number, time, amount, who, where in zip(
        *(table[column].tolist() for column in columns), strict=True
    ):
        yield Event(f"x{number:08d}", time, amount, tokens[who], f"c{who:06d}", f"t{where:06d}")


def transactions_json(table: Table) -> Iterator[bytes]:
    """Each row as one Transaction record, JSON without a newline."""
    for event in events(table):
        yield orjson.dumps(
            {
                "schema_version": 1,
                "transaction_id": event.transaction,
                "event_time": rfc3339(event.time),
                "amount": event.amount,
                "currency": "EUR",
                "card": event.card,
                "customer_id": event.customer,
                "terminal_id": event.terminal,
            }
        )


def labels_json(table: Table, *, delay_ms: int = LABEL_DELAY) -> Iterator[bytes]:
    """The fraudulent rows as Label records, JSON; each becomes known ``delay_ms`` later."""
    for event in events(table[table["fraud"]]):
        yield orjson.dumps(
            {
                "schema_version": 1,
                "transaction_id": event.transaction,
                "terminal_id": event.terminal,
                "event_time": rfc3339(event.time),
                "fraud": True,
                "label_time": rfc3339(event.time + delay_ms),
            }
        )


def rfc3339(time: int) -> str:
    """Epoch milliseconds as RFC 3339 in UTC with milliseconds."""
    moment = datetime.fromtimestamp(time // 1000, tz=UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time % 1000:03d}Z"
