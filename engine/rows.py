"""Rows of calls: counted, checked, joined."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plinth.engine.errors import InputError
from plinth.engine.flow import Tensors


def row_count(rows: Tensors) -> int:
    """Number of rows (size of dimension 0) of a call's input."""
    first = rows if isinstance(rows, Tensor) else next(iter(rows.values()))
    return int(first.shape[0])


def as_mapping(rows: Tensors, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The rows by input name, as plain tensors; a lone tensor belongs to the first name.

    Raises:
        InputError: they are no tensors, or none that hold their values as rows do.
    """
    found = {names[0]: rows} if not isinstance(rows, Mapping) else dict(rows)
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"the rows of {name} are of type {type(tensor).__name__}, expected a tensor "
                "(torch.as_tensor makes one of an array)",
                field=str(name),
            )
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
            found[name] = _plain(tensor, str(name))
    return found


def _plain(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself, of whatever class; values that are not there would be answered as such."""
    kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        kind = type(tensor).__name__
    elif not tensor.is_meta and tensor.layout is torch.strided and not tensor.is_nested:
        return tensor.as_subclass(Tensor)
    raise InputError(
        f"the rows of {name} are a tensor of kind {'nested' if tensor.is_nested else kind}, "
        "expected a dense one that holds its values",
        field=name,
    )


def cat_rows(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join rows of several calls along dimension 0; one part is passed on without a copy."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
