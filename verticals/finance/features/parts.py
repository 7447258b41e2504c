"""Cards, terminals, customers and devices as bytes, one by one, for a store of parts.

A part is a checksum and sections, each behind its length; numbers are as the machine has them,
which the store notes, and names are JSON.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from struct import Struct, error
from sys import intern
from time import monotonic
from typing import Any
from zlib import crc32

import orjson

from plinth.engine.errors import InputError
from plinth.verticals.contract import StateError, StateStore
from plinth.verticals.finance.features.online import FeatureState
from plinth.verticals.finance.features.program import Program
from plinth.verticals.finance.features.timeline import Shelf, Sums

META = b"meta"
_HEAD = Struct("<IB")
_NUMBER = Struct("<q")
_NUMBERS = Struct("<qq")
_INTERNED = ("card", "customer", "terminal", "device")


def keep_in(state: FeatureState, store: StateStore) -> None:
    """Have a state go on with what the last checkpoint in a store has, else with what it has.

    Raises:
        InputError: what is there is no state of this version and these features.
        StateError: it is damaged.
    """
    raw = store.get(META)
    if raw is not None:
        state.clear()
        meta = orjson.loads(_META.open(raw, "its header")[0])
        floors = meta.pop("floors")
        if meta != _about(state.features):
            raise InputError(
                "the state was written by another version or kind of machine, or with other "
                "features declared",
                field="state",
                reason="bad_snapshot",
                hint="the state begins anew, or is built again from the retained input",
            )
        for name, table in state.tables.items():
            table.floor = floors[name]
    for name, table in state.tables.items():
        form = _Form(name, state.features, table.make)
        table.shelf = Shelf(store, f"{name}:".encode(), form.pack, form.unpack)
        for key, entity in table.items.items():
            table.shelf.changing(key, entity)
    for entry in store.entries():
        state.enter(entry)
    if store.logs:
        state.journal = store.append


def foresee(
    state: FeatureState, store: StateStore, names: Mapping[str, Iterable[str | None]]
) -> None:
    """Read what a batch will ask for and memory does not have, all at once.

    Args:
        state: takes the batch next.
        store: that it is kept in.
        names: of the batch's entities, by table.
    """
    lacking = []
    for table, found in names.items():
        entities = state.tables[table]
        if entities.shelf is not None:
            keys = {one for one in found if one is not None and one not in entities.items}
            lacking.append((entities.shelf, keys))
    if not lacking:
        return
    parts = store.fetch(sorted(shelf.part(key) for shelf, keys in lacking for key in keys))
    for shelf, keys in lacking:
        shelf.foresee(keys, parts)


def begin(state: FeatureState, store: StateStore) -> None:
    """The state as it is now belongs to the checkpoint that begins."""
    floors = {name: table.floor for name, table in state.tables.items()}
    store.put(META, _META.close([orjson.dumps(_about(state.features) | {"floors": floors})]))
    for shelf in state.shelves:
        shelf.begin()


def write(state: FeatureState, seconds: float) -> bool:
    """Put entities for about so long; true when all that belong to the checkpoint are put."""
    until = monotonic() + seconds
    return all(
        table.shelf is None or table.shelf.write(table.items, until)
        for table in state.tables.values()
    )


def end(state: FeatureState, *, durable: bool) -> None:
    """The checkpoint is durable, or was given up."""
    for table in state.tables.values():
        if table.shelf is not None:
            table.shelf.end(durable=durable)
            table.hold()


def _about(features: Program) -> dict[str, Any]:
    """What the store must say to be read."""
    return {
        "format": "plinth-fraud-parts",
        "version": 1,
        "byteorder": sys.byteorder,
        "features": list(features.names),
        "declared": features.declaration.digest(),
    }


class _Form:
    """How the entities of one table become bytes, and back.

    Args:
        table: its name.
        features: which columns there are.
        make: makes an entity that knows nothing up to a time.
    """

    def __init__(self, table: str, features: Program, make: Callable[[int], Any]) -> None:
        self._make = make
        self._what = f"one of the {table}"
        self._width = len(features.names)
        self._columns = features.columns[table.removesuffix("s")]
        own, self._pack, self._fill = _KINDS[table]
        self._seal = _Seal(1 + len(self._columns) + own)

    def pack(self, entity: Any) -> bytes:
        """An entity as bytes."""
        sections = [entity.times.tobytes()]
        for name, one in zip(self._columns, entity.columns, strict=True):
            sections.append(one.values.tobytes() if name == "sums" else orjson.dumps(one))
        sections += self._pack(entity)
        return self._seal.close(sections)

    def unpack(self, raw: bytes) -> Any:
        """And back.

        Raises:
            StateError: it is damaged.
        """
        sections = self._seal.open(raw, self._what)
        many = len(self._columns)
        try:
            made = self._make(0)
            made.times = array("q", sections[0])
            count = len(made.times)
            if many:
                named = zip(made.columns, self._columns, sections[1 : 1 + many], strict=True)
                for column, name, section in named:
                    _fill_column(column, name, section, count)
            self._fill(made, sections[1 + many :], count, self._width)
        except (ValueError, TypeError, error) as why:
            raise _damaged(self._what) from why
        return made


def _fill_column(column: Any, name: str, section: bytes, count: int) -> None:
    if name == "sums":
        assert isinstance(column, Sums)
        column.values = array("q", section)
        _require(len(column.values) == count + 1)
        return
    values = orjson.loads(section)
    if name in _INTERNED:
        values = [one and intern(one) for one in values]
    elif name == "place":
        values = [one and tuple(one) for one in values]
    column.extend(values)
    _require(len(column) == count)


def _pack_timeline(line: Any) -> tuple[bytes, ...]:
    return (_NUMBER.pack(line.floor),)


def _fill_timeline(made: Any, rest: list[bytes], count: int, width: int) -> None:
    (made.floor,) = _NUMBER.unpack(rest[0])


def _pack_device(device: Any) -> tuple[bytes, ...]:
    return _NUMBER.pack(device.floor), orjson.dumps(device.cards)


def _fill_device(made: Any, rest: list[bytes], count: int, width: int) -> None:
    floor, cards = rest
    (made.floor,) = _NUMBER.unpack(floor)
    made.cards = _names(cards, count)


def _pack_card(card: Any) -> tuple[bytes, ...]:
    return (
        _NUMBER.pack(card.floor),
        card.sums.tobytes(),
        card.rows.tobytes(),
        bytes(card.flags),
        orjson.dumps(card.ids),
        orjson.dumps(card.terminals),
    )


def _fill_card(made: Any, rest: list[bytes], count: int, width: int) -> None:
    floor, sums, rows, flags, ids, terminals = rest
    (made.floor,) = _NUMBER.unpack(floor)
    made.sums, made.rows = array("q", sums), array("f", rows)
    made.flags, made.ids = bytearray(flags), orjson.loads(ids)
    made.terminals, made.known = _names(terminals, count), set(made.ids)
    _require(len(made.sums) - 1 == len(made.flags) == len(made.ids) == len(made.known) == count)
    _require(len(made.rows) == count * width)


def _pack_terminal(terminal: Any) -> tuple[bytes, ...]:
    marks = terminal.marks
    times = array("q", chain.from_iterable(marks.values())).tobytes() if marks else b""
    floors = _NUMBERS.pack(terminal.floor, terminal.blind)
    return floors, orjson.dumps(terminal.cards), times, orjson.dumps(list(marks))


def _fill_terminal(made: Any, rest: list[bytes], count: int, width: int) -> None:
    floors, cards, times, names = rest
    made.floor, made.blind = _NUMBERS.unpack(floors)
    made.cards = _names(cards, count)
    if times:
        marks = iter(array("q", times))
        triples = zip(marks, marks, marks, strict=True)
        made.marks = dict(zip(orjson.loads(names), triples, strict=True))


_KINDS: dict[str, tuple[int, Callable[[Any], tuple[bytes, ...]], Callable[..., None]]] = {
    "cards": (6, _pack_card, _fill_card),
    "terminals": (4, _pack_terminal, _fill_terminal),
    "customers": (1, _pack_timeline, _fill_timeline),
    "devices": (2, _pack_device, _fill_device),
}
"""Of each table: sections of its own, and how they are made and read."""


def _names(section: bytes, count: int) -> list[str]:
    found = list(map(intern, orjson.loads(section)))
    _require(len(found) == count)
    return found


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("contradicts itself")


class _Seal:
    """Sections as one piece of bytes with a checksum, and back.

    Args:
        count: of the sections.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._sizes = Struct(f"<{count}I")
        self._start = _HEAD.size + self._sizes.size

    def close(self, sections: Sequence[bytes]) -> bytes:
        """One piece."""
        body = self._sizes.pack(*map(len, sections)) + b"".join(sections)
        return _HEAD.pack(crc32(body, self._count), self._count) + body

    def open(self, raw: bytes, what: str) -> list[bytes]:
        """And back.

        Raises:
            StateError: it is damaged.
        """
        try:
            told, count = _HEAD.unpack_from(raw)
            sizes = self._sizes.unpack_from(raw, _HEAD.size)
        except error:
            raise _damaged(what) from None
        ends = list(accumulate(sizes, initial=self._start))
        whole = count == self._count and ends[-1] == len(raw)
        if not whole or told != crc32(memoryview(raw)[_HEAD.size :], count):
            raise _damaged(what)
        return [raw[begin:end] for begin, end in pairwise(ends)]


def _damaged(what: str) -> StateError:
    return StateError(
        f"the state on disk is damaged: the checksum of {what} does not match",
        hint="remove the state's folder: it is then built again from the retained input, or begins "
        "anew",
    )


_META = _Seal(1)
