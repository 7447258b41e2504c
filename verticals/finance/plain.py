"""A payment as most of them are, read in a tenth of the time that the schema takes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

MAX_ID, MAX_CARD = 64, 128
"""Characters of an id, and of a card's token."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
_Card = Annotated[str, Meta(min_length=1, max_length=MAX_CARD)]


class PlainPayment(Struct, gc=False):
    """What :class:`~plinth.verticals.finance.schema.Transaction` is, with the same attributes.

    Made by :func:`~plinth.verticals.finance.reading.read_plain` alone, which checks what the types
    leave open; nobody changes one after it.

    Args:
        transaction_id, amount, currency, card, customer_id, terminal_id: as there.
        written: the event time as it was sent, ``2025-09-01T12:00:00.000Z`` or without fraction.
        version, kind, device, latitude, longitude: as they were sent, if they were.
        milliseconds: the event time since 1970-01-01T00:00Z.
    """

    transaction_id: _Id
    written: str = field(name="event_time")
    amount: float
    currency: str
    card: _Card
    customer_id: _Id
    terminal_id: _Id
    version: Literal[1] | UnsetType = field(default=UNSET, name="schema_version")
    kind: Literal["payment"] | UnsetType = UNSET
    device: _Id | UnsetType | None = field(default=UNSET, name="device_id")
    north: float | UnsetType | None = field(default=UNSET, name="latitude")
    east: float | UnsetType | None = field(default=UNSET, name="longitude")
    milliseconds: int = 0

    model_extra: ClassVar[dict[str, Any] | None] = None
    received_time: ClassVar[datetime | None] = None

    @property
    def event_time(self) -> datetime:
        """When the payment happened."""
        return _EPOCH + timedelta(milliseconds=self.milliseconds)

    @property
    def device_id(self) -> str | None:
        """The device of an online payment, if known."""
        return None if self.device is UNSET else self.device

    @property
    def latitude(self) -> float | None:
        """Where the payment is made, degrees, if known."""
        return None if self.north is UNSET else self.north

    @property
    def longitude(self) -> float | None:
        """Where the payment is made, degrees, if known."""
        return None if self.east is UNSET else self.east

    def __repr__(self) -> str:
        """Without the card, as the schema's."""
        return f"PlainPayment(transaction_id={self.transaction_id!r})"
