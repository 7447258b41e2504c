"""Many payments at once: what is plain by msgspec and checks of whole columns.

What is plain reads just as by :func:`plinth.verticals.finance.schema.read`; of anything else
nothing is said here, and it is read there, with its errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from math import copysign

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from plinth.verticals.card_numbers import MIN_DIGITS, is_card_number
from plinth.verticals.finance.plain import PlainPayment
from plinth.verticals.finance.schema import MAX_AMOUNT, MIN_AMOUNT, CardNumbers

FEWEST = 16
"""Payments from which on columns are faster than one after another."""
_decode = msgspec.json.Decoder(PlainPayment).decode
_CURRENCY = re.compile(r"[A-Z]{3}")
_TEXT = re.compile(r"[!-~]+")
_KINDS = bytes(97 if chr(code).isalpha() else 32 if chr(code) == " " else 48 for code in range(256))
"""Letters as ``a``; all else as 0, of which card numbers are, but the space between texts."""
_MANY = b" " + b"0" * MIN_DIGITS
_DAY = 86_400_000
_SECONDS, _MILLISECONDS = 20, 24
"""Characters of a time in UTC, ``2025-09-01T12:00:00Z``, and of one with milliseconds."""
_DIGITS = {
    _SECONDS: np.array([0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18]),
    _MILLISECONDS: np.array([0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 22]),
}
_BETWEEN = {
    _SECONDS: (np.array([4, 7, 10, 13, 16, 19]), np.frombuffer(b"--T::Z", np.uint8)),
    _MILLISECONDS: (np.array([4, 7, 10, 13, 16, 19, 23]), np.frombuffer(b"--T::.Z", np.uint8)),
}
_PARTS = np.zeros((17, 7))
"""Of digits in year, month, day, hour, minute, second and millisecond."""
for _part, _places in enumerate(((0, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 14), (14, 17))):
    _PARTS[range(*_places), _part] = 10.0 ** np.arange(_places[1] - _places[0])[::-1]
_MONTHS = np.array([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
_BEFORE = np.cumsum(_MONTHS) - _MONTHS
Bools = npt.NDArray[np.bool_]


def read_plain(raws: Sequence[bytes], card_numbers: CardNumbers) -> list[PlainPayment | None]:
    """Payments of which nothing is to be said; ``None`` for each of the others.

    Args:
        raws: one JSON object each.
        card_numbers: what becomes of a record with an id that looks like a card number.
    """
    found: list[PlainPayment | None] = [None] * len(raws)
    if len(raws) < FEWEST:
        return found
    made = _decoded(raws)
    known = [one for one in made if one is not None]
    if not known:
        return found
    told = [raw.count(b'"') for raw, one in zip(raws, made, strict=True) if one is not None]
    times = _times([one.written for one in known])
    fine = (_quotes(known) == told) & (times >= 0) & _amounts_fit(known) & _places_fit(known)
    fine &= _texts_fit(known, refused=card_numbers == "refuse")
    for one, time in zip(known, times.tolist(), strict=True):
        one.milliseconds = time
    if len(known) == len(made) and fine.all():
        return list(known)
    plain = (one if fits else None for one, fits in zip(known, fine.tolist(), strict=True))
    return [None if one is None else next(plain) for one in made]


def _decoded(raws: Sequence[bytes]) -> Sequence[PlainPayment | None]:
    """Each as the types have it."""
    try:
        return [_decode(raw) for raw in raws]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return [_decoded_alone(raw) for raw in raws]


def _decoded_alone(raw: bytes) -> PlainPayment | None:
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _quotes(made: Sequence[PlainPayment]) -> npt.NDArray[np.int64]:
    """Quotation marks of keys and texts, if no field is there twice and none is unknown.

    A field more adds at least two: equality proves that there is none, as in the schema.
    """
    seven = 2 * 7 + 2 * 6
    return np.array(
        [
            seven
            + 2 * (one.version is not UNSET)
            + 4 * (one.kind is not UNSET)
            + (0 if one.device is UNSET else 2 if one.device is None else 4)
            + 2 * (one.north is not UNSET)
            + 2 * (one.east is not UNSET)
            for one in made
        ]
    )


def _amounts_fit(made: Sequence[PlainPayment]) -> Bools:
    amounts = np.array([one.amount for one in made])
    fine = (amounts >= MIN_AMOUNT) & (amounts <= MAX_AMOUNT)
    for place in np.flatnonzero(amounts == 0):
        fine[place] = copysign(1, amounts[place]) > 0
    return fine


def _places_fit(made: Sequence[PlainPayment]) -> Bools:
    """Where latitude and longitude are none, or both there and within their range."""
    both = [(one.north, one.east) for one in made]
    fine = np.ones(len(made), bool)
    for place, (north, east) in enumerate(both):
        if north is UNSET and east is UNSET:
            continue
        if north is None or east is None or north is UNSET or east is UNSET:
            fine[place] = not (isinstance(north, float) or isinstance(east, float))
        else:
            fine[place] = -90 <= north <= 90 and -180 <= east <= 180
    return fine


def _texts_fit(made: Sequence[PlainPayment], *, refused: bool) -> Bools:
    """Where texts have the characters and the meaning that they may have.

    Args:
        made: the payments.
        refused: whether an id may not look like a card number either.
    """
    fine = _fit([one.card for one in made], refused=True)
    ids = [
        [one.transaction_id for one in made],
        [one.customer_id for one in made],
        [one.terminal_id for one in made],
    ]
    devices = [one.device for one in made]
    if {*map(type, devices)} != {UnsetType}:
        ids.append([device if isinstance(device, str) else "-" for device in devices])
    fits = _fit([*chain.from_iterable(ids)], refused=refused)
    fine &= fits.reshape(len(ids), -1).all(0)
    currencies = [one.currency for one in made]
    for odd in {one for one in {*currencies} if _CURRENCY.fullmatch(one) is None}:
        fine &= np.array([one != odd for one in currencies])
    return fine


def _fit(texts: Sequence[str], *, refused: bool) -> Bools:
    joined = " ".join(texts)
    if not (joined.isascii() and joined.isprintable() and joined.count(" ") == len(texts) - 1):
        return np.array([_fits(text, refused=refused) for text in texts])
    if refused and _MANY in b" " + joined.encode().translate(_KINDS):
        return np.array([not is_card_number(text) for text in texts])
    return np.ones(len(texts), bool)


def _fits(text: str, *, refused: bool) -> bool:
    return _TEXT.fullmatch(text) is not None and not (refused and is_card_number(text))


def _times(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Milliseconds since 1970-01-01T00:00Z; -1 for a time that is not written plainly."""
    widths = np.array([len(text) for text in texts])
    found = np.full(len(texts), -1, np.int64)
    for width in _DIGITS:
        places = np.flatnonzero(widths == width)
        if len(places):
            found[places] = _times_of([texts[place] for place in places.tolist()], width)
    return found


def _times_of(texts: Sequence[str], width: int) -> npt.NDArray[np.int64]:
    """Milliseconds of times of so many characters."""
    joined = "".join(texts)
    if not joined.isascii():
        joined = "".join(text if text.isascii() else " " * width for text in texts)
    chars = np.frombuffer(joined.encode(), np.uint8).reshape(-1, width)
    digits = chars[:, _DIGITS[width]] - np.uint8(48)
    at, between = _BETWEEN[width]
    fine = (digits <= 9).all(1) & (chars[:, at] == between).all(1)
    parts = digits.astype(np.float64) @ _PARTS[: digits.shape[1]]
    year, month, day, hour, minute, second, rest = parts.astype(np.int64).T
    leap = (year % 4 == 0) & (year != 2100)
    fine &= (year >= 2000) & (year < 2100) & (month >= 1) & (month <= 12)
    month = np.where(fine, month, 1)
    last = _MONTHS[month - 1] + (leap & (month == 2))
    fine &= (day >= 1) & (day <= last) & (hour <= 23) & (minute <= 59) & (second <= 59)
    days = 365 * (year - 1970) + (year - 1969) // 4 + _BEFORE[month - 1] + (leap & (month > 2))
    clock = ((hour * 60 + minute) * 60 + second) * 1_000 + rest
    return np.where(fine, (days + day - 1) * _DAY + clock, -1)
