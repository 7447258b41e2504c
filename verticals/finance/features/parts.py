"""Cards, terminals, customers and devices as bytes, one by one, for a store of parts.

A part is a checksum and sections, each behind its length; numbers are as the machine has them,
which the store notes, and names are JSON.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise
from struct import Struct, error, pack, unpack_from
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
        meta = orjson.loads(_opened(raw, "its header")[0])
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


def begin(state: FeatureState, store: StateStore) -> None:
    """The state as it is now belongs to the checkpoint that begins."""
    floors = {name: table.floor for name, table in state.tables.items()}
    store.put(META, _sealed([orjson.dumps(_about(state.features) | {"floors": floors})]))
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
        self._table = table
        self._width = len(features.names)
        self._columns = features.columns[table.removesuffix("s")]
        self._pack, self._fill = _KINDS[table]

    def pack(self, entity: Any) -> bytes:
        """An entity as bytes."""
        columns = [
            one.values.tobytes() if name == "sums" else orjson.dumps(one)
            for name, one in zip(self._columns, entity.columns, strict=True)
        ]
        return _sealed([entity.times.tobytes(), *columns, *self._pack(entity)])

    def unpack(self, raw: bytes) -> Any:
        """And back.

        Raises:
            StateError: it is damaged.
        """
        times, *rest = _opened(raw, f"one of the {self._table}")
        count = len(times) // 8
        many = len(self._columns)
        try:
            made = self._make(0)
            made.times = _array("q", times)
            for column, name, section in zip(made.columns, self._columns, rest, strict=False):
                _fill_column(column, name, section, count)
            self._fill(made, rest[many:], count, self._width)
        except (ValueError, TypeError) as why:
            raise _damaged(f"one of the {self._table}") from why
        return made


def _fill_column(column: Any, name: str, section: memoryview, count: int) -> None:
    if name == "sums":
        assert isinstance(column, Sums)
        column.values = _array("q", section)
        _require(len(column.values) == count + 1)
        return
    values = orjson.loads(section)
    if name in _INTERNED:
        values = [one and intern(one) for one in values]
    elif name == "place":
        values = [one and tuple(one) for one in values]
    column.extend(values)
    _require(len(column) == count)


def _pack_timeline(line: Any) -> list[bytes]:
    return [pack("<q", line.floor)]


def _fill_timeline(made: Any, rest: list[memoryview], count: int, width: int) -> None:
    (floor,) = rest
    made.floor = _number(floor)


def _pack_device(device: Any) -> list[bytes]:
    return [pack("<q", device.floor), orjson.dumps(device.cards)]


def _fill_device(made: Any, rest: list[memoryview], count: int, width: int) -> None:
    floor, cards = rest
    made.floor, made.cards = _number(floor), _names(cards, count)


def _pack_card(card: Any) -> list[bytes]:
    texts = orjson.dumps(card.ids), orjson.dumps(card.terminals)
    numbers = pack("<q", card.floor), card.sums.tobytes(), card.rows.tobytes(), bytes(card.flags)
    return [*numbers, *texts]


def _fill_card(made: Any, rest: list[memoryview], count: int, width: int) -> None:
    floor, sums, rows, flags, ids, terminals = rest
    made.floor = _number(floor)
    made.sums, made.rows = _array("q", sums), _array("f", rows)
    made.flags, made.ids = bytearray(flags), orjson.loads(ids)
    made.terminals, made.known = _names(terminals, count), set(made.ids)
    sizes = len(made.sums) - 1, len(made.flags), len(made.ids), len(made.known)
    _require(set(sizes) == {count} and len(made.rows) == count * width)


def _pack_terminal(terminal: Any) -> list[bytes]:
    times = array("q", [time for mark in terminal.marks.values() for time in mark])
    floors = pack("<qq", terminal.floor, terminal.blind)
    names = orjson.dumps(list(terminal.marks))
    return [floors, orjson.dumps(terminal.cards), times.tobytes(), names]


def _fill_terminal(made: Any, rest: list[memoryview], count: int, width: int) -> None:
    floors, cards, times, names = rest
    _require(len(floors) == 16)
    made.floor, made.blind = unpack_from("<qq", floors)
    made.cards = _names(cards, count)
    marks = iter(_array("q", times))
    made.marks = dict(zip(orjson.loads(names), zip(marks, marks, marks, strict=True), strict=True))


_KINDS: dict[str, tuple[Callable[[Any], list[bytes]], Callable[..., None]]] = {
    "cards": (_pack_card, _fill_card),
    "terminals": (_pack_terminal, _fill_terminal),
    "customers": (_pack_timeline, _fill_timeline),
    "devices": (_pack_device, _fill_device),
}


def _names(section: memoryview, count: int) -> list[str]:
    found = [intern(name) for name in orjson.loads(section)]
    _require(len(found) == count)
    return found


def _number(section: memoryview) -> int:
    _require(len(section) == 8)
    (found,) = unpack_from("<q", section)
    return int(found)


def _array(code: str, section: memoryview) -> array[Any]:
    made: array[Any] = array(code)
    made.frombytes(section)
    return made


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("contradicts itself")


def _sealed(sections: Iterable[bytes]) -> bytes:
    parts = list(sections)
    body = pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts)
    return _HEAD.pack(crc32(body, len(parts)), len(parts)) + body


def _opened(raw: bytes, what: str) -> list[memoryview]:
    try:
        told, count = _HEAD.unpack_from(raw)
        body = memoryview(raw)[_HEAD.size :]
        sizes = unpack_from(f"<{count}I", body)
    except error:
        raise _damaged(what) from None
    ends = [4 * count]
    for size in sizes:
        ends.append(ends[-1] + size)
    if told != crc32(body, count) or ends[-1] != len(body):
        raise _damaged(what)
    return [body[begin:end] for begin, end in pairwise(ends)]


def _damaged(what: str) -> StateError:
    return StateError(
        f"the state on disk is damaged: the checksum of {what} does not match",
        hint="remove the state's folder: it is then built again from the retained input, or begins "
        "anew",
    )
