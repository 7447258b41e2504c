"""The payments of one flow as columns: each is looked up once, for features and answers alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from math import inf
from typing import Any

import orjson
from msgspec import UNSET

from plinth.verticals.finance.features.online import MAX_WORTH, Told
from plinth.verticals.finance.features.places import Place
from plinth.verticals.finance.features.timeline import milliseconds
from plinth.verticals.finance.plain import PlainPayment
from plinth.verticals.finance.schema import Payment


@dataclass(frozen=True, eq=False)
class Asked:
    """Payments in the order of their records.

    Args:
        payments: were read.
        rates: base currency for one of each payment's own.
    """

    payments: Sequence[Payment]
    rates: Sequence[float]

    @classmethod
    def of(cls, payments: Sequence[Payment], rates: Mapping[str, float]) -> Asked:
        """Those of them whose currency has a rate, and whose amount can be."""
        found = [rates.get(one.currency, inf) for one in payments]
        fits = [one.amount * rate <= MAX_WORTH for one, rate in zip(payments, found, strict=True)]
        if all(fits):
            return cls(payments, found)
        return cls([*compress(payments, fits)], [*compress(found, fits)])

    def __len__(self) -> int:
        return len(self.payments)

    @cached_property
    def plain(self) -> Sequence[PlainPayment] | None:
        """The payments, where all of them are plain."""
        plain = [one for one in self.payments if type(one) is PlainPayment]
        return plain if len(plain) == len(self.payments) else None

    @cached_property
    def ids(self) -> list[str]:
        """Transaction ids."""
        return [one.transaction_id for one in self.payments]

    @cached_property
    def cards(self) -> list[str]:
        """Tokens of cards."""
        return [one.card for one in self.payments]

    @cached_property
    def customers(self) -> list[str]:
        """Who holds the cards."""
        return [one.customer_id for one in self.payments]

    @cached_property
    def terminals(self) -> list[str]:
        """Where the payments are made."""
        return [one.terminal_id for one in self.payments]

    @cached_property
    def devices(self) -> list[str | None]:
        """Devices of online payments, where they are known."""
        if self.plain is not None:
            return [None if one.device is UNSET else one.device for one in self.plain]
        return [one.device_id for one in self.payments]

    @property
    def names(self) -> dict[str, Sequence[str | None]]:
        """Of what they are of, by the tables in which the features keep it."""
        return {
            "cards": self.cards,
            "terminals": self.terminals,
            "customers": self.customers,
            "devices": self.devices,
        }

    @cached_property
    def currencies(self) -> list[str]:
        """ISO 4217 codes."""
        return [one.currency for one in self.payments]

    @cached_property
    def amounts(self) -> list[float]:
        """In each payment's currency."""
        return [one.amount for one in self.payments]

    @cached_property
    def worth(self) -> list[float]:
        """Amounts in base currency."""
        return [amount * rate for amount, rate in zip(self.amounts, self.rates, strict=True)]

    @cached_property
    def times(self) -> list[int]:
        """Event times, milliseconds since 1970-01-01T00:00Z."""
        if self.plain is not None:
            return [one.milliseconds for one in self.plain]
        return [milliseconds(one.event_time) for one in self.payments]

    @cached_property
    def extras(self) -> list[dict[str, Any] | None]:
        """Unknown fields, where they are kept."""
        return [one.model_extra for one in self.payments]

    @cached_property
    def places(self) -> list[Place | None]:
        """Latitude and longitude, where they are known."""
        if self.plain is not None and all(one.north is UNSET for one in self.plain):
            return [None] * len(self.plain)
        where = [(one.latitude, one.longitude) for one in self.payments]
        return [None if lat is None or lon is None else (lat, lon) for lat, lon in where]

    def events(self) -> Iterator[Told]:
        """Each as the features see it."""
        return zip(
            self.ids, self.times, self.worth, self.cards, self.customers, self.terminals,
            self.devices, self.places, strict=True,
        )  # fmt: skip

    def written_times(self) -> list[bytes]:
        """Event times as JSON has them, in UTC where they were sent so."""
        if self.plain is not None:
            return [_written(one.written) for one in self.plain]
        return orjson.dumps([one.event_time for one in self.payments])[1:-1].split(b",")


def _written(time: str) -> bytes:
    """A plain time as one that was read is written: whole seconds, or six digits more."""
    rest = time[20:23]
    more = f".{rest}000" if rest and rest != "000" else ""
    return f'"{time[:19]}{more}+00:00"'.encode()
