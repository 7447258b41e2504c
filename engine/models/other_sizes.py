"""Rows of other sizes than the example's, where a contract leaves sizes free.

What was compiled from one example may hold for its sizes alone: an exporter folds a length into a
constant, or takes one side of a branch for granted. So it is tried at others, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from plinth.engine.models.spec import ModelSpec

Rows = Mapping[str, Tensor]
Place = tuple[str, int]
"""A dimension of an input, by its name; 0 counts rows."""

_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: size // 2,
    lambda size: size * 2,
    lambda size: size + 1,
    lambda size: 1,
)
"""Half and twice for what halves sizes in steps, one more for what does not; and the least."""


def free_places(spec: ModelSpec) -> list[Place]:
    """The dimensions of the inputs whose sizes the contract leaves free, but for the rows."""
    return [
        (each.name, dim)
        for each in spec.inputs
        for dim, size in enumerate(each.shape, 1)
        if size is None
    ]


def resized(rows: Rows, sizes: Mapping[Place, int]) -> dict[str, Tensor]:
    """Rows with other sizes in some dimensions: cut off, or repeated from the start."""
    found = dict(rows)
    for (name, dim), size in sizes.items():
        index = torch.arange(size, device=found[name].device) % found[name].shape[dim]
        found[name] = found[name].index_select(dim, index)
    return found


def other_sizes(spec: ModelSpec, rows: Rows, most: float) -> Iterator[dict[str, Tensor]]:
    """The same rows at other sizes, all free dimensions changed alike; none where none is free.

    Args:
        spec: the contract.
        rows: (n, ...) by input name.
        most: times as many elements as the rows have, which none may exceed.
    """
    places, seen = free_places(spec), {_shape(rows)}
    for change in _CHANGES if places else ():
        sizes = {(name, dim): change(rows[name].shape[dim]) for name, dim in places}
        growth = max(
            prod(sizes[place] / rows[name].shape[place[1]] for place in places if place[0] == name)
            for name, _ in places
        )
        if min(sizes.values()) < 1 or growth > most:
            continue
        made = resized(rows, sizes)
        if _shape(made) not in seen:
            seen.add(_shape(made))
            yield made


def sizes_of(rows: Rows) -> str:
    """The sizes of one row of each input, as an error tells them."""
    return ", ".join(f"{name} {tuple(tensor.shape[1:])}" for name, tensor in rows.items())


def _shape(rows: Rows) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in rows.values())
