"""One field of a record: where it is in a message, and what becomes of the value there."""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from plinth.engine import InputError
from plinth.engine.tables import Table
from plinth.pipelines.keys import hash_key
from plinth.verticals.card_numbers import by_digits

MAX_DEPTH = 16
"""Steps of a path."""
FINEST = Decimal("1e-18")
"""Of units; far below what any currency or token counts in."""
_PART = re.compile(r"""[^.\s"']+|"[^"]+"|'[^']+'""")
_NUMBER = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PER_SECOND = {
    "seconds": 1,
    "milliseconds": 1_000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
}
_NO_CENTS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_MILLS = "BHD IQD JOD KWD LYD OMR TND"
_EXPONENTS = dict.fromkeys(_NO_CENTS.split(), 0) | dict.fromkeys(_MILLS.split(), 3)
_EXPONENTS |= {"CLF": 4, "UYW": 4}
"""Digits behind the point by currency where they are not two (ISO 4217)."""

_SAMPLE = datetime(2024, 11, 23, 17, 34, 56, 789_123, tzinfo=UTC)
_CUT_OFF = (
    _SAMPLE,
    _SAMPLE.replace(microsecond=0),
    _SAMPLE.replace(second=0, microsecond=0),
    _SAMPLE.replace(minute=0, second=0, microsecond=0),
    _SAMPLE.replace(hour=0, minute=0, second=0, microsecond=0),
)
"""What a format may read of the sample: all of it, or what is left when the end is cut off."""

Path = tuple[str | int, ...]
Scalar = str | int | float | bool
Reader = Callable[[Any, Mapping[str, Any]], Any]
"""Of a message and the fields that were read before: a value, or None where there is none."""


def _split(value: object) -> object:
    """``"a.b.0"`` as steps; a key with a dot stands in quotation marks."""
    if not isinstance(value, str):
        return value
    steps: list[str | int] = []
    at = 0
    while at < len(value) and (match := _PART.match(value, at)):
        part = match[0]
        number = part.isascii() and part.isdigit()
        steps.append(int(part) if number else part.strip("\"'"))
        at = match.end()
        if at < len(value) and value[at] == ".":
            at += 1
            continue
        break
    if at < len(value) or not steps or value.endswith("."):
        raise ValueError(f"{value!r} is not a path such as payment.card.token or items.0.id")
    return tuple(steps)


def _short(path: Path) -> Path:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"a path has at most {MAX_DEPTH} steps")
    return path


PathText = Annotated[Path, BeforeValidator(_split), AfterValidator(_short)]


def shown(path: Path) -> str:
    """A path as it is written."""
    return ".".join(f'"{s}"' if isinstance(s, str) and "." in s else str(s) for s in path)


def found_at(source: Any, path: Path) -> Any:
    """What lies at a path of a message; None where there is nothing."""
    for step in path:
        if isinstance(source, dict):
            source = source.get(step if isinstance(step, str) else str(step))
        elif isinstance(source, list) and isinstance(step, int) and step < len(source):
            source = source[step]
        else:
            return None
    return source


def is_blocked(source: Any, path: Path) -> bool:
    """Whether something else than an object, or a list for a number, stands on a path's way."""
    for step in path:
        if source is None or source == "":
            return False
        if isinstance(source, dict):
            source = source.get(step if isinstance(step, str) else str(step))
        elif isinstance(source, list) and isinstance(step, int):
            source = source[step] if step < len(source) else None
        else:
            return True
    return False


def finder(path: Path) -> Callable[[Any], Any]:
    """:func:`found_at` for one path, on messages that are objects."""
    if any(isinstance(step, int) for step in path) or len(path) not in (1, 2):
        return lambda source: found_at(source, path)
    first, *more = path
    if not more:
        return lambda source: source.get(first)
    second = more[0]

    def below(source: Any) -> Any:
        inner = source.get(first)
        return inner.get(second) if isinstance(inner, dict) else None

    return below


class FieldMapping(Table):
    """How one field is made. A bare text in the file is ``{path = "..."}``.

    Args:
        path: where it is in the message, steps with dots between; numbers count in lists.
        join: several such places whose texts are one, such as merchant and terminal.
        separator: between these texts.
        constant: the value itself, whatever the message says.
        kind: ``as`` in the file: ``number`` also takes decimals as text, ``text`` also whole
            numbers, ``boolean`` also the texts and numbers true, false, 1, 0.
        unit: what one of the numbers is worth, such as ``"0.01"``; ``minor``: cents, or whatever
            the field ``currency`` has behind its point (ISO 4217).
        time: ``iso``, ``seconds``, ``milliseconds``, ``microseconds``, ``nanoseconds`` since
            1970, or a format of strptime.
        zone: of times without an offset, such as ``Europe/Berlin``.
        ambiguous: of the hour that comes twice when clocks are put back.
        values: translation by the text of the value found; others are refused.
        default: where nothing is found.
        optional: nothing found, or an empty text, is no error; the field is left out.
        keyed_hash_env: environment variable with a key; the value becomes ``tok_`` and half of
            its HMAC-SHA-256; of a card number the digits count alone, however it is spelled, of any
            other text neither spaces around it nor how its accents are composed (NFC).
    """

    model_config = ConfigDict(populate_by_name=True)

    path: PathText | None = None
    join: Annotated[tuple[PathText, ...], Field(min_length=2, max_length=8)] | None = None
    separator: str = ":"
    constant: Scalar | None = None
    kind: Literal["number", "text", "boolean"] | None = Field(default=None, alias="as")
    unit: Annotated[Decimal, Field(allow_inf_nan=False)] | Literal["minor"] | None = None
    time: str | None = None
    zone: str | None = None
    ambiguous: Literal["refuse", "earlier", "later"] = "refuse"
    values: dict[str, Scalar] | None = None
    default: Scalar | None = None
    optional: bool = False
    keyed_hash_env: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> FieldMapping:
        if sum(one is not None for one in (self.path, self.join, self.constant)) != 1:
            raise ValueError("give one of path, join and constant")
        ways = {"as": self.kind, "unit": self.unit, "time": self.time, "values": self.values}
        said = [name for name, value in ways.items() if value is not None]
        if len(said) > 1 and set(said) != {"as", "unit"}:
            raise ValueError(f"{' and '.join(said)} do not go together")
        if self.kind not in (None, "number") and self.unit is not None:
            raise ValueError(f"unit is of numbers, not of as = {self.kind!r}")
        if isinstance(self.unit, Decimal) and not FINEST <= abs(self.unit) <= 1 / FINEST:
            raise ValueError(
                f"expected a unit from {FINEST} to {1 / FINEST}, or below 0 for debits"
            )
        if self.constant is not None and (said or self.keyed_hash_env or self.default is not None):
            raise ValueError("a constant is taken as it stands")
        if self.zone is not None:
            if self.time is None or self.time in _PER_SECOND:
                raise ValueError("zone is of time = 'iso' or a format")
            try:
                ZoneInfo(self.zone)
            except (ZoneInfoNotFoundError, ValueError):
                raise ValueError(f"zone {self.zone!r} is not known; Europe/Berlin is one") from None
        if self.time is not None and self.time not in ("iso", *_PER_SECOND):
            self._check_format(self.time)
        return self

    def _check_format(self, pattern: str) -> None:
        if "%" not in pattern:
            known = ", ".join(("iso", *_PER_SECOND))
            raise ValueError(f"time {pattern!r} is none of {known}, and no format such as %Y-%m-%d")
        if "%Z" in pattern:
            raise ValueError(f"time {pattern!r}: a zone's name says no offset: take %z, or a zone")
        try:
            read = datetime.strptime(_SAMPLE.strftime(pattern), pattern).replace(tzinfo=UTC)
        except ValueError as error:
            raise ValueError(f"time {pattern!r}: {error}") from None
        if read not in _CUT_OFF:
            raise ValueError(
                f"time {pattern!r} would read {_SAMPLE} as {read}: expected year, month, day and "
                "of the time of day every part down to the finest (%M: minutes, %I needs %p)"
            )
        if self.zone is None and "%z" not in pattern:
            raise ValueError(f"time {pattern!r} says no offset (%z): give a zone")

    @property
    def places(self) -> tuple[Path, ...]:
        """Every path that it reads."""
        return self.join or ((self.path,) if self.path is not None else ())

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        if self.constant is not None:
            return f"constant {self.constant!r}"
        return self.separator.join(map(shown, self.places))

    def reader(self, name: str, root: Path) -> Reader:
        """What reads the field from a message.

        Args:
            name: of the field, for errors.
            root: where the paths begin.

        Raises:
            ConfigError: the environment has no key.
        """
        if self.constant is not None:
            constant = self.constant
            return lambda source, made: constant
        find, convert = self._finder(root), self._converter()
        default, optional, where = self.default, self.optional, self.source
        places = [root + path for path in self.places]

        def read(source: Any, made: Mapping[str, Any]) -> Any:
            try:
                value = find(source)
                if value is not None and not (optional and value == ""):
                    return convert(value, made)
                if any(is_blocked(source, place) for place in places):
                    raise _Wrong("type", "a list or one value is where an object was expected")
                if default is not None or optional:
                    return default
                raise _Wrong("missing", "nothing is there")
            except _Wrong as wrong:
                raise InputError(
                    f"{name}: {wrong.why} (at {where} of the message)",
                    field=name,
                    reason=wrong.reason,
                    hint=wrong.hint or "see [message.fields] of the mapping",
                ) from None

        return read

    def _finder(self, root: Path) -> Callable[[Any], Any]:
        if self.join is None:
            return finder(root + (self.path or ()))
        find, separator = [finder(root + path) for path in self.join], self.separator

        def joined(source: Any) -> Any:
            parts = [one(source) for one in find]
            if None in parts:
                return None
            texts = [_text(part) for part in parts]
            if "" in texts:
                return None
            if separator and any(separator in text for text in texts):
                raise _Wrong(
                    "separator",
                    f"a text to be joined holds the separator {separator!r}, so that others might "
                    "give the same",
                    "choose a separator that the texts do not have",
                )
            return separator.join(texts)

        return joined

    def _converter(self) -> Callable[[Any, Mapping[str, Any]], Any]:
        steps: Callable[[Any, Mapping[str, Any]], Any]
        if self.unit == "minor":
            steps = _minor
        elif self.unit is not None:
            unit = self.unit
            steps = lambda value, made: float(_decimal(value) * unit)  # noqa: E731
        elif self.time is not None:
            steps = self._time()
        elif self.values is not None:
            steps = _translated(self.values)
        else:
            one = {"number": _number, "text": _text, "boolean": _boolean, None: _plain}[self.kind]
            steps = lambda value, made: one(value)  # noqa: E731
        if self.keyed_hash_env is None:
            return steps
        key = _key(self.keyed_hash_env)

        def hashed(value: Any, made: Mapping[str, Any]) -> str:
            text = _text(steps(value, made))
            if not text.strip():
                raise _Wrong("missing", "the text is empty, and would be one token for all")
            return _hashed(text, key)

        return hashed

    def _time(self) -> Callable[[Any, Mapping[str, Any]], Any]:
        per_second = _PER_SECOND.get(self.time or "")
        zone = ZoneInfo(self.zone) if self.zone else None
        pattern, ambiguous = self.time or "", self.ambiguous

        def read(value: Any, made: Mapping[str, Any]) -> str:
            if isinstance(value, datetime):  # a logical type of Avro
                time = value
            elif per_second is not None:
                whole = type(value) is int
                return _since_1970(value if whole else _decimal(value), per_second)
            elif not isinstance(value, str):
                hint = "numbers are seconds, milliseconds, microseconds or nanoseconds"
                raise _Wrong("time", f"expected a time as text ({pattern})", hint)
            else:
                time = _read_time(value, pattern)
            if time.tzinfo is None:
                time = _in_zone(time, zone, ambiguous)
            return _iso(time)

        return read


class _Wrong(Exception):
    """A value that cannot become the field; never holds the value."""

    def __init__(self, reason: str, why: str, hint: str | None = None) -> None:
        super().__init__(why)
        self.reason, self.why, self.hint = reason, why, hint


def _key(variable: str) -> bytes:
    return hash_key(
        variable,
        "keyed_hash_env names the variable that does; the same key gives the same tokens",
    )


def _hashed(text: str, key: bytes) -> str:
    told = by_digits(unicodedata.normalize("NFC", text.strip())).encode()
    return "tok_" + hmac.new(key, told, hashlib.sha256).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | datetime):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, UUID):  # a logical type of Avro
        return str(value)
    raise _Wrong("type", "expected one value, not a list, an object or bytes")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | UUID) and not isinstance(value, bool):
        return str(value)
    raise _Wrong("text", "expected a text or a whole number")


def _boolean(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    word = value.lower() if isinstance(value, str) else str(value).lower()
    if isinstance(value, bool | int | str) and word in known:
        return known[word]
    raise _Wrong("boolean", "expected true, false, 1 or 0")


def _number(value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return float(_decimal(value))


def _decimal(value: Any) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Decimal(repr(value))
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return Decimal(value)
    raise _Wrong("number", "expected a number, or one as text such as 12.34")


def _minor(value: Any, made: Mapping[str, Any]) -> float:
    count = _decimal(value)
    if isinstance(value, float) or count.as_tuple().exponent != 0:
        raise _Wrong(
            "not_whole",
            "expected a whole number of the currency's smallest unit, written as one",
            "are these no cents any more? unit = '1' is of euros, '0.01' of cents with a fraction",
        )
    return float(count.scaleb(-_EXPONENTS.get(str(made.get("currency")), 2)))


def _translated(values: Mapping[str, Scalar]) -> Callable[[Any, Mapping[str, Any]], Any]:
    def translate(value: Any, made: Mapping[str, Any]) -> Any:
        found = values.get(str(value).lower() if isinstance(value, bool) else str(value))
        if found is None:
            raise _Wrong(
                "unknown_value",
                f"expected one of {len(values)} known values",
                "add it to values of this field",
            )
        return found

    return translate


def _read_time(text: str, pattern: str) -> datetime:
    try:
        if pattern != "iso":
            return datetime.strptime(text, pattern)
        if len(text) < 16:
            raise ValueError
        return datetime.fromisoformat(text)
    except ValueError:
        raise _Wrong("time", f"expected a time as {pattern}") from None


def _in_zone(time: datetime, zone: ZoneInfo | None, ambiguous: str) -> datetime:
    if zone is None:
        raise _Wrong("time_zone", "the time says no offset", "give a zone, such as Europe/Berlin")
    early, late = time.replace(tzinfo=zone, fold=0), time.replace(tzinfo=zone, fold=1)
    if early.utcoffset() == late.utcoffset():
        return early
    if early.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != time:
        raise _Wrong("time", "no clock showed this time: it was put forward")
    if ambiguous == "refuse":
        raise _Wrong(
            "ambiguous_time",
            "clocks showed this time twice",
            "send an offset, or say ambiguous = 'earlier' or 'later'",
        )
    return early if ambiguous == "earlier" else late


def _since_1970(count: int | Decimal, per_second: int) -> str:
    try:
        micros = int(count * 1_000_000 // per_second)
        return _iso(_EPOCH + timedelta(microseconds=micros))
    except (OverflowError, ArithmeticError):
        raise _Wrong(
            "time", "no such time", f"is it counted in {_likely(count)} since 1970?"
        ) from None


def _likely(count: int | Decimal) -> str:
    """The unit in which a number of today's size counts."""
    for name, per_second in _PER_SECOND.items():
        if count < Decimal(10) ** 10 * per_second:
            return name
    return "something else"


def _iso(time: datetime) -> str:
    try:
        return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError):
        raise _Wrong("time", "no such time") from None
