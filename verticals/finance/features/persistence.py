"""The feature state as bytes and back: a safetensors file of flat arrays, without code inside."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from plinth.engine.errors import InputError
from plinth.verticals.finance.features.online import FeatureState, Limits
from plinth.verticals.finance.features.program import STANDARD, Program
from plinth.verticals.finance.features.timeline import (
    Card,
    CardTimeline,
    Entities,
    Terminal,
    Timeline,
)

MAX_BYTES = 16 << 30
"""A snapshot above this is refused."""
HEADER: dict[str, Any] = {"format": "plinth-fraud-features", "version": 2}

Array = npt.NDArray[Any]
E = TypeVar("E", bound=Timeline)


def pack(state: FeatureState) -> bytes:
    """The whole state as bytes; the caller holds the state still."""
    header = np.frombuffer(json.dumps(_header(state.features)).encode(), dtype=np.uint8)
    arrays: dict[str, Array] = {"header": header}
    for kind, entities in _kinds(state).items():
        arrays |= _pack_times(kind, entities)
    cards = list(state.cards.items.values())
    arrays["cards.units"] = _flat((np.diff(_view(card.sums)) for card in cards), np.int64)
    arrays["cards.rows"] = _flat((np.frombuffer(card.rows, np.float32) for card in cards), "f4")
    arrays["cards.flags"] = np.frombuffer(b"".join(card.flags for card in cards), np.uint8)
    arrays |= _pack_text("cards.ids", chain.from_iterable(card.ids for card in cards))
    arrays |= _pack_refs("cards.terminals", chain.from_iterable(c.terminals for c in cards))
    terminals = list(state.terminals.items.values())
    marks = [mark for terminal in terminals for mark in terminal.marks.values()]
    arrays["marks.sizes"] = np.array([len(terminal.marks) for terminal in terminals], np.int64)
    arrays["terminals.blind"] = np.array([terminal.blind for terminal in terminals], np.int64)
    arrays["marks.times"] = np.array(marks, np.int64).reshape(-1, 3)
    arrays |= _pack_text("marks.ids", chain.from_iterable(t.marks for t in terminals))
    for kind, lines in _with_cards(state).items():
        arrays |= _pack_refs(f"{kind}.cards", chain.from_iterable(line.cards for line in lines))
    arrays |= _pack_columns(state)
    return save({name: np.ascontiguousarray(value) for name, value in arrays.items()})


def _header(features: Program) -> dict[str, Any]:
    """What a snapshot must say to be read; that of the standard features names them alone."""
    found = {**HEADER, "features": list(features.names)}
    return found if features is STANDARD else {**found, "declared": features.declaration.digest()}


def unpack(data: bytes, limits: Limits, features: Program = STANDARD) -> FeatureState:
    """A state from :func:`pack`, held to ``limits``.

    Raises:
        InputError: the bytes are no snapshot of this version, are of other features, or contradict
            themselves.
    """
    if len(data) > MAX_BYTES:
        raise _bad(f"it has {len(data)} bytes, the bound is {MAX_BYTES}")
    try:
        arrays = load(data)
        header = json.loads(arrays["header"].tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise _bad("it is not one") from error
    if header != _header(features):
        raise _bad("it was written by another version, or with other features declared")
    try:
        return _build(arrays, FeatureState(limits, features))
    except (KeyError, ValueError, IndexError, TypeError, OverflowError) as error:
        raise _bad("its arrays contradict each other") from error


def _build(arrays: Mapping[str, Array], state: FeatureState) -> FeatureState:
    width = len(state.features.names)
    for kind, entities in _kinds(state).items():
        _unpack_times(kind, entities, arrays)
    _fill_cards(state.cards, arrays, width)
    _fill_marks(state.terminals, arrays)
    for kind, lines in _with_cards(state).items():
        names = _refs(f"{kind}.cards", arrays)
        for line, part in _slices(lines, len(names)):
            line.cards = names[part]
    _fill_columns(state, arrays)
    for entities in _kinds(state).values():
        entities.entries = sum(line.entries() for line in entities.items.values())
        entities.hold()
    return state


def _pack_columns(state: FeatureState) -> dict[str, Array]:
    """What declared features keep beside the rest."""
    arrays: dict[str, Array] = {}
    for (kind, entities), names in zip(
        _kinds(state).items(), state.features.columns.values(), strict=True
    ):
        lines = list(entities.items.values())
        for place, name in enumerate(names):
            of = f"{kind}.{name}"
            columns = [line.columns[place] for line in lines]
            if name == "sums":
                arrays[of] = _flat((np.diff(_view(one.values)) for one in columns), np.int64)
            elif name == "place":
                flat = [one or (np.nan, np.nan) for column in columns for one in column]
                arrays[of] = np.array(flat, np.float64).reshape(-1, 2)
            else:
                arrays |= _pack_refs(of, (one or "" for column in columns for one in column))
    return arrays


def _fill_columns(state: FeatureState, arrays: Mapping[str, Array]) -> None:
    for (kind, entities), names in zip(
        _kinds(state).items(), state.features.columns.values(), strict=True
    ):
        lines = list(entities.items.values())
        for place, name in enumerate(names):
            values = _column(f"{kind}.{name}", name, arrays)
            for line, part in _slices(lines, len(values)):
                if name == "sums":
                    sums = np.concatenate(([0], np.cumsum(values[part])))
                    line.columns[place].values = _array("q", sums.astype(np.int64))
                else:
                    line.columns[place].extend(values[part])


def _column(of: str, name: str, arrays: Mapping[str, Array]) -> Any:
    """One value for each entry of all entities, in their order."""
    if name == "sums":
        units = arrays[of].astype(np.int64)
        _require(bool(np.all(units >= 0)))
        return units
    if name == "place":
        _require(arrays[of].ndim == 2 and arrays[of].shape[1] == 2)
        return [None if lat != lat else (lat, lon) for lat, lon in arrays[of].tolist()]
    return [one or None for one in _refs(of, arrays)]


def _fill_cards(cards: Entities[Card], arrays: Mapping[str, Array], width: int) -> None:
    units = arrays["cards.units"].astype(np.int64)
    rows = arrays["cards.rows"].astype(np.float32)
    flags = arrays["cards.flags"].astype(np.uint8)
    ids, terminals = _text("cards.ids", arrays), _refs("cards.terminals", arrays)
    _require(len(units) == len(ids) == len(terminals) == len(flags))
    _require(len(rows) == len(ids) * width and bool(np.all(units >= 0)))
    for card, part in _slices(list(cards.items.values()), len(ids)):
        card.sums = _array("q", np.concatenate(([0], np.cumsum(units[part]))))
        card.rows = _array("f", rows[part.start * width : part.stop * width])
        card.flags = bytearray(flags[part].tobytes())
        card.ids, card.terminals = ids[part], terminals[part]
        card.known = set(card.ids)
        _require(len(card.known) == len(card.ids))


def _fill_marks(terminals: Entities[Terminal], arrays: Mapping[str, Array]) -> None:
    sizes, times = arrays["marks.sizes"], arrays["marks.times"]
    ids, blind = _text("marks.ids", arrays), arrays["terminals.blind"].tolist()
    _require(len(sizes) == len(blind) == len(terminals.items) and bool(np.all(sizes >= 0)))
    _require(int(sizes.sum()) == len(ids) and times.shape == (len(ids), 3))
    values = [(int(time), int(since), int(until)) for time, since, until in times.tolist()]
    start = 0
    for terminal, size, time in zip(terminals.items.values(), sizes.tolist(), blind, strict=True):
        terminal.blind = int(time)
        part = slice(start, start + size)
        terminal.marks = dict(zip(ids[part], values[part], strict=True))
        start += size


def _kinds(state: FeatureState) -> dict[str, Entities[Any]]:
    return {
        "cards": state.cards,
        "terminals": state.terminals,
        "customers": state.customers,
        "devices": state.devices,
    }


def _with_cards(state: FeatureState) -> dict[str, list[CardTimeline]]:
    return {
        "terminals": list(state.terminals.items.values()),
        "devices": list(state.devices.items.values()),
    }


def _pack_times(kind: str, entities: Entities[Any]) -> dict[str, Array]:
    lines = list(entities.items.values())
    return {
        f"{kind}.times": _flat((_view(line.times) for line in lines), np.int64),
        f"{kind}.sizes": np.array([len(line.times) for line in lines], np.int64),
        f"{kind}.floors": np.array([*(line.floor for line in lines), entities.floor], np.int64),
        **_pack_text(f"{kind}.keys", entities.items),
    }


def _unpack_times(kind: str, entities: Entities[E], arrays: Mapping[str, Array]) -> None:
    keys = _text(f"{kind}.keys", arrays)
    sizes, floors = arrays[f"{kind}.sizes"].tolist(), arrays[f"{kind}.floors"].tolist()
    times = arrays[f"{kind}.times"].astype(np.int64)
    _require(len(keys) == len(sizes) == len(floors) - 1 == len(set(keys)))
    _require(sum(sizes) == len(times) and min(sizes, default=0) >= 0)
    entities.floor = int(floors[-1])
    start = 0
    for key, size, floor in zip(keys, sizes, floors[:-1], strict=True):
        part = times[start : start + size]
        _require(bool(np.all(part[1:] >= part[:-1])))
        made = entities.make(int(floor))
        made.times = _array("q", part)
        entities.items[key] = made
        start += size


def _slices(lines: list[E], total: int) -> Iterator[tuple[E, slice]]:
    _require(sum(len(line.times) for line in lines) == total)
    start = 0
    for line in lines:
        yield line, slice(start, start + len(line.times))
        start += len(line.times)


def _pack_text(name: str, texts: Iterable[str]) -> dict[str, Array]:
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *(len(text) for text in encoded)], dtype=np.int64)
    return {f"{name}.text": np.frombuffer(b"".join(encoded), np.uint8), f"{name}.ends": ends}


def _text(name: str, arrays: Mapping[str, Array]) -> list[str]:
    blob, ends = arrays[f"{name}.text"].tobytes(), arrays[f"{name}.ends"].tolist()
    _require(bool(ends) and ends[0] == 0 and ends[-1] == len(blob) and ends == sorted(ends))
    return [blob[start:end].decode() for start, end in pairwise(ends)]


def _pack_refs(name: str, texts: Iterable[str]) -> dict[str, Array]:
    places: dict[str, int] = {}
    refs = [places.setdefault(text, len(places)) for text in texts]
    return {f"{name}.refs": np.array(refs, np.int64), **_pack_text(name, places)}


def _refs(name: str, arrays: Mapping[str, Array]) -> list[str]:
    texts, refs = _text(name, arrays), arrays[f"{name}.refs"].tolist()
    _require(min(refs, default=0) >= 0)
    return [texts[ref] for ref in refs]


def _flat(parts: Iterable[Array], dtype: npt.DTypeLike) -> Array:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


def _view(values: array[int]) -> Array:
    return np.frombuffer(values, dtype=np.int64)


def _array(code: Any, values: Array) -> array[Any]:
    made: array[Any] = array(code)
    made.frombytes(np.ascontiguousarray(values).tobytes())
    return made


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError("inconsistent arrays")


def _bad(what: str) -> InputError:
    return InputError(
        f"the snapshot of the fraud features cannot be read: {what}",
        field="state",
        reason="bad_snapshot",
        hint="restore an older snapshot, or start empty and replay the last 37 days",
    )
