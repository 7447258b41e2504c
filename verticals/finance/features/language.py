"""Features as people declare them in TOML: read and checked, before anything is computed.

Every window is exact and reads (t - over, t] at the event's own time t, the event included. Each
kind of feature has a class here, which says what it takes and means; amounts in base currency.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from plinth.engine.tables import Table
from plinth.verticals.finance.features.timeline import DAY, HOUR, MINUTE

Key = Literal["card", "terminal", "customer", "device"]
KEYS: tuple[Key, ...] = ("card", "terminal", "customer", "device")
Use = Literal["model", "rules", "parts"]
MAX_FEATURES = 200
MAX_REASONS = 10
"""Groups that high scores are put down to: exact reasons take 2 to this power rows of an alert."""
MAX_SPAN = 90 * DAY
_UNITS = {"m": MINUTE, "h": HOUR, "d": DAY}
_SPAN = re.compile(r"([1-9]\d{0,4})([mhd])")


def _span(text: Any) -> int:
    """Milliseconds of ``5m``, ``24h`` or ``30d``."""
    found = _SPAN.fullmatch(text) if isinstance(text, str) else None
    length = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < length <= MAX_SPAN:
        raise ValueError("expected a time from 1m to 90d, such as 5m, 24h or 30d")
    return length


Span = Annotated[int, BeforeValidator(_span)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
_GROUP = Field(default=None, pattern=r"^[A-Z][A-Z0-9_]{0,15}$")


class _Feature(Table):
    """What all kinds have.

    Args:
        name: of the column, as rules and audits say it.
        use: ``model`` and rules see it, ``rules`` alone do, or it is but a part of ratios.
        reason: code of the group of reasons that it belongs to, for what the model sees.
    """

    name: Name
    use: Use = "model"
    reason: Annotated[str | None, _GROUP] = None


class Value(_Feature):
    """Something of the payment itself.

    Args:
        of: its ``amount``; 1 on a ``weekend``; 1 at ``night``, before 7 o'clock (UTC).
    """

    kind: Literal["value"]
    of: Literal["amount", "weekend", "night"]


class Count(_Feature):
    """Payments with the same card, terminal, customer or device."""

    kind: Literal["count"]
    by: Key
    over: Span


class Aggregate(_Feature):
    """Sum, mean, largest or smallest amount of payments with something in common."""

    kind: Literal["sum", "mean", "max", "min"]
    of: Literal["amount"]
    by: Key
    over: Span


class Distinct(_Feature):
    """How many different ids of one kind met another in the window."""

    kind: Literal["distinct"]
    of: Key
    by: Key
    over: Span

    @model_validator(mode="after")
    def _two_kinds(self) -> Distinct:
        if self.of == self.by:
            raise ValueError(f"of and by are both {self.of}: there is always one")
        return self


class Recency(_Feature):
    """Seconds since the payment before; those of ``over`` where none is that near."""

    kind: Literal["recency"]
    by: Key
    over: Span


class Speed(_Feature):
    """Kilometres per hour from where the payment before was made, 0 where a place is not known.

    The great circle over a sphere of 6,371 km; payments within a second count as one second apart.
    ``over`` says how far back a payment with a place is looked for.
    """

    kind: Literal["speed"]
    by: Key
    over: Span


class Risk(_Feature):
    """Share of frauds, as known at the event's time, in a window that ends ``after`` before it."""

    kind: Literal["risk"]
    by: Literal["terminal"]
    over: Span
    after: Span = 7 * DAY


class Ratio(_Feature):
    """One feature over another.

    Args:
        of, to: names of features declared before.
        otherwise: where ``to`` is 0.
    """

    kind: Literal["ratio"]
    of: Name
    to: Name
    otherwise: Annotated[float, Field(ge=0, le=1e9)] = 0.0


Feature = Annotated[
    Value | Count | Aggregate | Distinct | Recency | Speed | Risk | Ratio,
    Field(discriminator="kind"),
]


class Declaration(Table):
    """The table ``[verticals.finance.features]``, or the file that stands for it.

    Args:
        feature: the features, in the order of the columns; those of the model come first.
        reasons: text by the code that features give as their ``reason``.
    """

    feature: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=MAX_FEATURES)]
    reasons: dict[
        Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,15}$")],
        Annotated[str, Field(min_length=1, max_length=120)],
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Declaration:
        known: dict[str, Any] = {}
        for place, one in enumerate(self.feature, 1):
            where = f"feature {place} ({one.name})"
            if one.name in known:
                raise ValueError(f"{where}: the name is there twice")
            if one.name in RESERVED:
                raise ValueError(f"{where}: the name means something else in rules, take another")
            if one.name == "amount" and not (isinstance(one, Value) and one.of == "amount"):
                raise ValueError(f"{where}: rules mean the payment's amount by it, take another")
            for part in (one.of, one.to) if isinstance(one, Ratio) else ():
                if part not in known:
                    raise ValueError(f"{where}: {part} is not declared before it")
                if isinstance(known[part], Ratio):
                    raise ValueError(f"{where}: {part} is a ratio itself, expected another kind")
            if one.use == "model" and one.reason is None:
                raise ValueError(f"{where}, reason: the model sees it, so say which reason it is")
            if one.reason is not None and one.reason not in self.reasons:
                raise ValueError(f"{where}, reason: there is no text for {one.reason} in reasons")
            known[one.name] = one
        if not any(one.use == "model" for one in self.feature):
            raise ValueError("no feature has use = 'model'")
        groups = {one.reason for one in self.feature if one.use == "model"}
        if len(groups) > MAX_REASONS:
            raise ValueError(
                f"the model's features name {len(groups)} reasons, expected at most {MAX_REASONS}: "
                "let some share one"
            )
        return self

    def digest(self) -> str:
        """Equal for equal declarations; 12 hexadecimal digits."""
        whole = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def columns(self) -> tuple[Any, ...]:
        """The features that are columns: those of the model, then those of rules alone."""
        uses: tuple[Use, ...] = ("model", "rules")
        return tuple(one for use in uses for one in self.feature if one.use == use)


RESERVED: frozenset[str] = frozenset(
    {"score", "currency", "card", "customer_id", "terminal_id", "device_id"}
    | {"conflict", "late", "partial", "has_device"}
)
"""Names that rules have for something else."""


def reach(one: Any, known: Mapping[str, Any]) -> int:
    """Milliseconds of history that a feature looks back on."""
    if isinstance(one, Ratio):
        return max(reach(known[part], known) for part in (one.of, one.to))
    if isinstance(one, Risk):
        return one.over + one.after
    return 0 if isinstance(one, Value) else int(one.over)


def standard() -> Declaration:
    """The declaration that comes with Plinth."""
    path = Path(__file__).with_name("standard.toml")
    return Declaration.model_validate(tomllib.loads(path.read_text("utf-8")))
