"""Declared features as one function over the timelines of a payment's entities.

The function is written out as Python for the declaration at hand and compiled once, so that each
payment costs no more than features coded by hand: windows of one entity are found from the widest
to the narrowest, each within the one before. Nothing of a record is ever part of the text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

from plinth.verticals.finance.features.language import (
    KEYS,
    Aggregate,
    Count,
    Declaration,
    Distinct,
    Key,
    Ratio,
    Recency,
    Risk,
    Speed,
    Value,
    reach,
    standard,
)
from plinth.verticals.finance.features.timeline import DAY, HOUR, UNITS, Sums

NATIVE: Mapping[str, Mapping[str, str]] = {
    "card": {"sums": "sums", "terminal": "terminals"},
    "terminal": {"card": "cards"},
    "customer": {},
    "device": {"card": "cards"},
}
"""What timelines hold for the engine's own use, by key: column to attribute."""
_VALUES = {
    "amount": "units",
    "weekend": f"((time // {DAY} + 3) % 7 >= 5)",
    "night": f"(time % {DAY} < {7 * HOUR})",
}
_HEAD = """\
from __future__ import annotations

from bisect import bisect_right
from operator import sub
from struct import Struct

from plinth.verticals.finance.features.places import speed
from plinth.verticals.finance.features.timeline import Card, Device, Terminal, Timeline

_pack = Struct("{columns}f").pack


def row(
    time: int, units: int, card: Card, card_end: int, terminal: Terminal, terminal_end: int,
    customer: Timeline, customer_end: int, device: Device | None, device_end: int,
) -> bytes:
"""


class Again(NamedTuple):
    """Columns that another amount of the same payment changes, by number.

    Args:
        amount: of the payment.
        sums: each ends with the payment, so it changes by the difference.
        ratios: of amount to mean: the ratio, the count and sum of its window, and what it is where
            the sum is 0.
    """

    amount: tuple[int, ...]
    sums: tuple[int, ...]
    ratios: tuple[tuple[int, int, int, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Features ready to be computed.

    Args:
        declaration: what they were made from.
        names: of the columns, those of the model first.
        model: how many columns the model sees.
        yes_or_no: columns that are 0 or 1 and stand for a condition in rules.
        reaches: milliseconds that each column looks back on.
        reasons: code, text and columns of each group of model features that stands for a reason.
        columns: what timelines keep beside :data:`NATIVE`, by key.
        row: of a payment: bytes of its float32 columns.
        again: what another amount changes.
        text: of the function, for people.
    """

    declaration: Declaration
    names: tuple[str, ...]
    model: int
    yes_or_no: frozenset[str]
    reaches: Mapping[str, int]
    reasons: tuple[tuple[str, str, tuple[str, ...]], ...]
    columns: Mapping[str, tuple[str, ...]]
    row: Callable[..., bytes]
    again: Again
    text: str

    @property
    def model_names(self) -> tuple[str, ...]:
        """Columns that the model sees."""
        return self.names[: self.model]

    def window(self, key: Key) -> int:
        """Milliseconds of the longest window by a key that needs no labels."""
        plain = (Count, Aggregate, Distinct, Recency, Speed)
        own = (one for one in self.declaration.feature if isinstance(one, plain))
        return max((one.over for one in own if one.by == key), default=0)

    @property
    def risk(self) -> int:
        """Milliseconds that shares of frauds look back on."""
        risks = (one for one in self.declaration.feature if isinstance(one, Risk))
        return max((one.over + one.after for one in risks), default=0)

    @property
    def reach(self) -> int:
        """Milliseconds that the columns look back on at most."""
        return max(self.reaches.values())

    def timeline_columns(self, key: Key) -> tuple[Any, ...]:
        """New empty columns of a timeline, as ``columns`` names them."""
        return tuple(Sums() if name == "sums" else [] for name in self.columns[key])


def compiled(declaration: Declaration) -> Program:
    """Write the function out and compile it."""
    known = {one.name: one for one in declaration.feature}
    chosen = declaration.columns()
    names = tuple(one.name for one in chosen)
    model = sum(one.use == "model" for one in chosen)
    grouped: defaultdict[str, list[str]] = defaultdict(list)
    for one in chosen[:model]:
        grouped[one.reason].append(one.name)
    columns = _columns(declaration)
    text = _Writer(declaration, columns).text()
    return Program(
        declaration,
        names,
        model,
        frozenset(o.name for o in chosen if isinstance(o, Value) and o.of != "amount"),
        {name: reach(known[name], known) for name in names},
        tuple((c, t, tuple(grouped[c])) for c, t in declaration.reasons.items() if c in grouped),
        columns,
        _function(text),
        _again(known, names),
        text,
    )


def _function(text: str) -> Callable[..., bytes]:
    """The function of a text, compiled ahead of time if it was."""
    name = f"{__package__}.{_module(text)}"
    if find_spec(name) is not None:
        made: Callable[..., bytes] = import_module(name).row
        return made
    space: dict[str, Any] = {"__name__": name}
    exec(compile(text, "<declared features>", "exec"), space)  # noqa: S102 - of checked words and numbers
    return cast("Callable[..., bytes]", space["row"])


def _module(text: str) -> str:
    return f"row_{sha256(text.encode()).hexdigest()[:16]}"


def generated() -> dict[str, str]:
    """Modules of the features that come with Plinth, for :mod:`plinth.compiled`: name and text."""
    return {_module(STANDARD.text): STANDARD.text}


def _columns(declaration: Declaration) -> dict[str, tuple[str, ...]]:
    """What timelines must keep for the features beside what they have, by key."""
    wanted: dict[str, dict[str, None]] = {key: {} for key in KEYS}
    for one in declaration.feature:
        if isinstance(one, Aggregate):
            wanted[one.by]["sums"] = None
        elif isinstance(one, Distinct):
            wanted[one.by][one.of] = None
        elif isinstance(one, Speed):
            wanted[one.by]["place"] = None
    return {key: tuple(n for n in found if n not in NATIVE[key]) for key, found in wanted.items()}


def _again(known: Mapping[str, Any], names: Sequence[str]) -> Again:
    at = {name: place for place, name in enumerate(names)}
    kinds = {
        (one.kind, one.by, one.over): at[name]
        for name, one in known.items()
        if isinstance(one, Count | Aggregate) and name in at
    }
    ratios = []
    for name in names:
        one = known[name]
        if not isinstance(one, Ratio) or getattr(known[one.of], "of", None) != "amount":
            continue
        to = known[one.to]
        if isinstance(known[one.of], Value) and to.kind == "mean":
            parts = [kinds.get((kind, to.by, to.over)) for kind in ("count", "sum")]
            if parts[0] is not None and parts[1] is not None:
                ratios.append((at[name], parts[0], parts[1], one.otherwise))
    return Again(
        tuple(at[n] for n in names if isinstance(known[n], Value) and known[n].of == "amount"),
        tuple(at[n] for n in names if known[n].kind == "sum"),
        tuple(ratios),
    )


class _Writer:
    """Writes the function ``row`` of a declaration.

    Args:
        declaration: was checked.
        columns: what timelines keep beside what they always have, by key.
    """

    def __init__(self, declaration: Declaration, columns: Mapping[str, tuple[str, ...]]) -> None:
        self._declared, self._columns = declaration, columns
        self._numbers = {one.name: place for place, one in enumerate(declaration.feature)}

    def text(self) -> str:
        """The function as Python."""
        values = [self._value(one) for one in self._declared.columns()]
        lines: list[str] = []
        for key in KEYS:
            body = self._of(key)
            if body and key == "device":
                none = [f"{self._var(o)} = 0" for o in self._by(key)]
                lines += ["    if device is None:", *(f"        {line}" for line in none)]
                lines += ["    else:", *(f"        {line}" for line in body)]
            else:
                lines += [f"    {line}" for line in body]
        told = "".join(f"        {value},\n" for value in values)
        whole = "\n".join(lines)
        return f"{_HEAD.format(columns=len(values))}{whole}\n    return _pack(\n{told}    )\n"

    def _by(self, key: Key) -> list[Any]:
        return [one for one in self._declared.feature if getattr(one, "by", None) == key]

    def _var(self, one: Any) -> str:
        return f"f{self._numbers[one.name]}"

    def _of(self, key: Key) -> list[str]:
        """Statements that give each feature by a key its variable."""
        mine = self._by(key)
        plain = [one for one in mine if not isinstance(one, Risk | Recency)]
        timed = any(not isinstance(one, Risk) for one in mine)
        lines = [f"times_{key} = {key}.times"] if timed else []
        sums = [one for one in mine if one.kind in ("sum", "mean")]
        if sums:
            lines.append(f"sums_{key} = {self._column(key, 'sums')}")
            lines.append(f"total_{key} = sums_{key}[{key}_end]")
        before, last = "0", f"{key}_end - 1"
        for span in sorted({one.over for one in plain}, reverse=True):
            name = f"{key}_{span}"
            found = f"bisect_right(times_{key}, time - {span}, {before}, {last})"
            lines.append(f"{name} = {before} if {before} == {last} else {found}")
            before = name
        for one in mine:
            if not isinstance(one, Risk):
                lines += self._statement(one)
        return lines + (self._shares() if key == "terminal" else [])

    def _column(self, key: Key, name: str) -> str:
        """Where a timeline has a column."""
        if name in NATIVE[key]:
            return f"{key}.{NATIVE[key][name]}"
        return f"{key}.columns[{self._columns[key].index(name)}]"

    def _statement(self, one: Any) -> list[str]:
        key, var, end = one.by, self._var(one), f"{one.by}_end"
        start = f"{key}_{one.over}"
        if isinstance(one, Count):
            return [f"{var} = {end} - {start}"]
        if isinstance(one, Aggregate):
            sums = self._column(key, "sums")
            if one.kind in ("sum", "mean"):
                return [f"{var} = total_{key} - sums_{key}[{start}]"]
            window = f"{sums}[{start} + 1:{end} + 1], {sums}[{start}:{end}]"
            return [f"{var} = {one.kind}(map(sub, {window}))"]
        if isinstance(one, Distinct):
            ids = f"{self._column(key, one.of)}[{start}:{end}]"
            ids = f"set({ids})" if one.of != "device" else f"set({ids}) - {{None}}"
            only = f"1 if {end} - {start} == 1 else " if one.of != "device" else ""
            return [f"{var} = {only}len({ids})"]
        if isinstance(one, Recency):
            cap = repr(one.over / 1000)
            return [
                f"{var} = (time - times_{key}[{end} - 2]) / 1000 if {end} > 1 else {cap}",
                f"if {var} > {cap}:",
                f"    {var} = {cap}",
            ]
        places = self._column(key, "place")
        return [f"{var} = speed({places}, times_{key}, {start}, {end})"]

    def _risks(self) -> list[Risk]:
        return [one for one in self._declared.feature if isinstance(one, Risk)]

    def _shares(self) -> list[str]:
        """Shares of frauds; a terminal without labels has none."""
        together: defaultdict[int, list[Risk]] = defaultdict(list)
        for one in self._risks():
            together[one.after].append(one)
        lines = []
        for after, risks in together.items():
            risks.sort(key=lambda one: one.over)
            names = ", ".join(map(self._var, risks)) + ","
            spans = ", ".join(str(one.over) for one in risks) + ","
            zeros = " = ".join(map(self._var, risks)) + " = 0.0"
            shares = f"terminal.shares(time, {after}, ({spans}))"
            lines += ["if terminal.marks:", f"    {names} = {shares}", "else:", f"    {zeros}"]
        return lines

    def _parts(self, one: Any) -> tuple[str, int, str]:
        """A value as numerator, and its denominator as a number and a count."""
        if isinstance(one, Value):
            return _VALUES[one.of], UNITS if one.of == "amount" else 1, ""
        if isinstance(one, Aggregate):
            count = f"({one.by}_end - {one.by}_{one.over})" if one.kind == "mean" else ""
            return self._var(one), UNITS, count
        return self._var(one), 1, ""

    def _value(self, one: Any) -> str:
        """The expression of a column: one division of whole numbers, so it is rounded once."""
        if isinstance(one, Ratio):
            known = {other.name: other for other in self._declared.feature}
            up, up_units, up_count = self._parts(known[one.of])
            down, down_units, down_count = self._parts(known[one.to])
            if up_units == down_units:
                up_units = down_units = 1
            above = _times(up, down_units, down_count)
            below = _times(down, up_units, up_count)
            asked = self._guards(known[one.of], known[one.to])
            return f"({above}) / ({below}) if {asked}{down} else {one.otherwise!r}"
        value, units, count = self._parts(one)
        if units == 1:
            return value
        guard = f" if {self._guards(one)}True else 0.0" if one.kind == "mean" else ""
        return f"{value} / {_times(str(units), 1, count)}{guard}"

    def _guards(self, *parts: Any) -> str:
        """What must hold so that windows of a device are there."""
        on_device = any(getattr(one, "by", None) == "device" for one in parts)
        return "device is not None and " if on_device else ""


def _times(value: str, number: int, count: str) -> str:
    words = [value, *([str(number)] if number != 1 else []), *([count] if count else [])]
    return f"({' * '.join(words)})" if len(words) > 1 else value


STANDARD = compiled(standard())
"""The features of the models that come with Plinth."""
