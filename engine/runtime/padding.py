"""Rows of different lengths in one batch: padded to the longest, where a mask hides the padding.

A model whose inputs have a free size would otherwise run every length as a batch of its own. A
mask input says which values are there (1) and which are not (0). Whether the model really keeps to
it is tried before it serves: a row beside a longer one must answer as it does alone.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from plinth.engine.backends.base import Executable
from plinth.engine.backends.choice import MIXING, TOLERANCE, difference
from plinth.engine.backends.planner import Planned
from plinth.engine.models.spec import ModelSpec, TensorSpec
from plinth.engine.models.store import Model
from plinth.engine.rows import cat_rows

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Upper ends of the ranges of lengths that share batches, so that padding is a third at most of
what is longer than 24."""
SECONDS = 4.0  # of trying lengths, from short to long
_SHORTEST = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Padding:
    """How rows of different lengths are put into one batch.

    Args:
        inputs: the dimension of the length, by name of each input that has one.
        outputs: alike, of each output that has it.
        fill: the value of padding by input; 0 in the mask.
        lengths: upper ends of the ranges whose rows may share a batch, ascending.
        reason: why there are none, or no longer ones.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    fill: Mapping[str, float]
    lengths: tuple[int, ...] = ()
    reason: str | None = None

    def bucket(self, rows: Mapping[str, Tensor]) -> int | None:
        """The upper end of the range that rows belong to; ``None``: they run with their like."""
        sizes = {rows[name].shape[dim] for name, dim in self.inputs.items()}
        length = max(sizes)
        if len(sizes) > 1 or length < _SHORTEST or not self.lengths or length > self.lengths[-1]:
            return None
        return self.lengths[bisect_left(self.lengths, length)]

    def joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of several calls along dimension 0, the shorter ones padded at their ends."""
        longest = max(map(self.length, parts))
        return cat_rows([self._padded(part, longest) for part in parts])

    def length(self, rows: Mapping[str, Tensor]) -> int:
        """How long rows are."""
        name, dim = next(iter(self.inputs.items()))
        return int(rows[name].shape[dim])

    def cut(self, outputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        """What belongs to rows of this length of the outputs of a padded batch."""
        return {
            name: tensor.narrow(self.outputs[name], 0, length) if name in self.outputs else tensor
            for name, tensor in outputs.items()
        }

    def _padded(self, rows: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
        missing = longest - self.length(rows)
        if not missing:
            return rows
        return rows | {
            name: _lengthened(rows[name], dim, missing, self.fill[name])
            for name, dim in self.inputs.items()
        }

    def status(self) -> dict[str, Any]:
        """The longest rows that share batches with others, and why not longer ones."""
        return {"up_to": self.lengths[-1] if self.lengths else 0, "reason": self.reason}


def _lengthened(tensor: Tensor, dim: int, missing: int, value: float) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)


def mask_of(spec: ModelSpec) -> TensorSpec | None:
    """The input that says where there are values: the one the spec names, else one by its name."""
    if spec.mask is not None:
        return next((t for t in spec.inputs if t.name == spec.mask), None)
    named = [t for t in spec.inputs if t.name == "mask" or t.name.endswith("_mask")]
    fit = [t for t in named if t.shape == (None,) and t.dtype not in ("float64", "bfloat16")]
    return fit[0] if len(named) == len(fit) == 1 else None


def found(model: Model, executable: Executable, seconds: float = SECONDS) -> Padding | None:
    """Up to what length rows of a model may share batches; ``None`` where it has no mask for it.

    For each range of lengths, its shortest row runs alone, and beside one of its longest: what it
    answers must be the same within the tolerance of the precision.

    Args:
        model: with a free size in its inputs.
        executable: what runs it; each member of a plan is tried.
        seconds: of trying; lengths that would take longer are left as they are.
    """
    padding = _described(model.spec)
    if padding is None:
        return None
    members = executable.members if isinstance(executable, Planned) else (executable,)
    allowed = min(MIXING, max(TOLERANCE.get(each.precision, MIXING) for each in members))
    until, taken = time.perf_counter() + seconds, 0.0
    lengths: list[int] = []
    reason: str | None = None
    for shorter, longer in pairwise((_SHORTEST - 1, *_tried(padding, model, executable))):
        if time.perf_counter() + 2 * taken > until:
            reason = f"lengths beyond {shorter} would take too long to try"
            break
        begun = time.perf_counter()
        try:
            tried = [_off(padding, model, each, (shorter + 1, longer)) for each in members]
        except Exception as error:  # noqa: BLE001 - longer than it can be, a model raises anything
            reason = f"{type(error).__name__} at length {longer}"
            break
        worst = max(off for off, _ in tried)
        if not worst <= allowed:
            reason = f"padding changes answers by {worst:.3g}, allowed is {allowed:g}"
            lengths.clear()
            break
        padding = replace(padding, outputs={**padding.outputs, **tried[0][1]})
        lengths.append(longer)
        taken = time.perf_counter() - begun
    if not lengths:
        _log.info("model %s: rows of different lengths share no batch: %s", model.spec.name, reason)
    return replace(padding, lengths=tuple(lengths), reason=reason)


def _tried(padding: Padding, model: Model, executable: Executable) -> tuple[int, ...]:
    """Ends of ranges to try. An accelerator does not survive an index beyond a table, so that
    only lengths of the example rows are tried there."""
    if executable.device.kind == "cpu":
        return LENGTHS
    own = padding.length(model.rows(1))
    if own < _SHORTEST:
        return ()
    return (*(length for length in LENGTHS if length < own), own)


def _off(
    padding: Padding, model: Model, executable: Executable, lengths: tuple[int, int]
) -> tuple[float, dict[str, int]]:
    """How far a row is off beside a longer one, and the dimension of the length by output."""
    short, long = (_of_length(padding, model, row, size) for row, size in enumerate(lengths))
    alone = executable.run(short)
    beside = executable.run(padding.joined([short, long]))
    dims: dict[str, int] = {}
    for name, want in alone.items():
        sizes = list(zip(want.shape[1:], beside[name].shape[1:], strict=True))
        changed = [dim for dim, (own, other) in enumerate(sizes, 1) if own != other]
        if changed and (len(changed) > 1 or sizes[changed[0] - 1] != lengths):
            return float("inf"), {}
        if changed:
            dims[name] = changed[0]
    own = replace(padding, outputs=dims).cut(beside, lengths[0])
    return max(difference(own[name][:1], want) for name, want in alone.items()), dims


def _of_length(padding: Padding, model: Model, number: int, length: int) -> dict[str, Tensor]:
    """An example row cut to a length, or repeated up to it, of values that are all there."""
    rows = model.rows(number + 1)
    row = {name: tensor[number : number + 1] for name, tensor in rows.items()}
    turn = torch.arange(length) % padding.length(row)
    row |= {name: row[name].index_select(dim, turn) for name, dim in padding.inputs.items()}
    mask = mask_of(model.spec)
    return row if mask is None else row | {mask.name: torch.ones_like(row[mask.name])}


def _described(spec: ModelSpec) -> Padding | None:
    """Where lengths lie, as far as the contract tells; ``None`` where it does not."""
    mask = mask_of(spec)
    open_sizes = {t.name: [i for i, s in enumerate(t.shape, 1) if s is None] for t in spec.inputs}
    inputs = {name: places[0] for name, places in open_sizes.items() if places}
    if mask is None or mask.name not in inputs or any(len(p) > 1 for p in open_sizes.values()):
        return None
    fill = {tensor.name: _fill(tensor) for tensor in spec.inputs}
    if fill[mask.name] != 0 or len(inputs) < 2:
        return None
    return Padding(inputs, {}, fill)


def _fill(tensor: TensorSpec) -> float:
    """A valid value: 0, or the smallest where 0 is none."""
    if tensor.bounds is None or tensor.bounds[0] <= 0 <= tensor.bounds[1]:
        return 0
    return tensor.bounds[0]
