"""Running a module in less memory than its weights: layer by layer from a mapped file.

Each layer's pages are read before it runs, while the one before it computes, and given back when it
has run, so that two layers' weights lie in memory at a time. Where it makes activations small too,
a layer runs on part of them: the wide layers of a transformer on some tokens, a ``Sequential`` of
3-D convolutions on some planes with those that they reach into. Every number is computed from the
same numbers as before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plinth.engine.backends.base import Executable
from plinth.engine.backends.eager import TorchExecutable, held_tensors, stored_bytes
from plinth.engine.mapped import Pages
from plinth.engine.precision.transforms import sharing_copy

TOKENS_AT_ONCE = 512
"""Tokens, of all rows, that the wide layers of a transformer take at once where memory is short.
Fewer make a matrix product slower: a library brings all weights into its own order for each."""
PLANES_AT_ONCE = 4
"""Planes that a run of 3-D convolutions makes at once where memory is short."""
AHEAD_BYTES = 32 << 20
"""Bytes of a layer, at most, that is read while the one before it computes: both lie in memory."""
_POINTWISE = (nn.BatchNorm3d, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Identity, nn.Dropout)


def streamed(executable: Executable) -> TorchExecutable | None:
    """The same, with the weights of a layer and the next one in memory at a time.

    Args:
        executable: eager torch on the host.

    Returns:
        ``None`` where less than half of its weights lie in mapped files, or it cannot be copied.
    """
    if not isinstance(executable, TorchExecutable) or not executable.is_plain:
        return None
    whole = Pages(held_tensors(executable.module)).bytes
    if 2 * whole < executable.weights:
        return None
    try:
        module = sharing_copy(executable.module)
    except (TypeError, RuntimeError, AttributeError):
        return None
    reader = _Reader()
    for part in module.modules():
        pages = Pages(_own(part))
        if pages.bytes:
            part.register_forward_pre_hook(_Ahead(reader, pages))
            part.register_forward_hook(_Behind(pages), always_call=True)
        if hasattr(part, "tokens_at_once"):
            setattr(part, "tokens_at_once", TOKENS_AT_ONCE)  # noqa: B010 - whatever module it is
        if isinstance(part, nn.Sequential) and _is_local(part):
            part.forward = partial(by_planes, list(part))  # type: ignore[method-assign]
            inside = Pages(held_tensors(part))
            part.register_forward_hook(_Behind(inside), always_call=True)
    module.register_forward_hook(_Last(reader, Pages(held_tensors(module))), always_call=True)
    found = executable.over(module)
    found.weights = max(0, stored_bytes(module) - whole)
    found.report |= {"memory": f"layer by layer; {whole} bytes of weights stay in their file"}
    return found


class _Reader:
    """Brings the pages of one layer in while the one before it computes.

    Which layer comes next is known from the forward before. One that comes out of turn is read when
    it runs.
    """

    def __init__(self) -> None:
        self._next: dict[int, Pages] = {}
        self._begun: dict[int, Future[None]] = {}
        self._before: int | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _Reader:
        return _Reader()  # of another thread, which forgets what this one has begun

    def arrive(self, pages: Pages) -> None:
        """Have the pages of a layer in memory, and begin with those of the next."""
        begun = self._begun.pop(id(pages), None)
        if begun is None:
            pages.read_ahead()
        else:
            begun.result()
        if self._before is not None:
            self._next[self._before] = pages
        self._before = id(pages)
        following = self._next.get(id(pages))
        if following is None or following.bytes > AHEAD_BYTES or id(following) in self._begun:
            return
        if len(os.sched_getaffinity(0)) > 1:
            self._begun[id(following)] = _beside(os.getpid()).submit(following.read_ahead)

    def end(self) -> None:
        """A forward is over: what was begun ends before its pages are given back."""
        for begun in self._begun.values():
            begun.result()
        self._begun.clear()
        self._before = None


@cache
def _beside(process: int) -> ThreadPoolExecutor:
    """The thread that reads ahead; a forked process has one of its own."""
    del process
    return ThreadPoolExecutor(1, thread_name_prefix="plinth-ahead")


class _Ahead:
    """Has the pages of a layer in memory before it runs."""

    def __init__(self, reader: _Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def __call__(self, _: nn.Module, __: Any) -> None:
        self._reader.arrive(self._pages)


class _Behind:
    """Gives the pages of a layer back when it has run."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def __call__(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._pages.give_back()


class _Last:
    """Gives all pages back when a forward is over."""

    def __init__(self, reader: _Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    def __call__(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._reader.end()
        self._pages.give_back()


def _own(part: nn.Module) -> Iterator[Tensor]:
    """The tensors that a layer reads itself; attention of torch reads those of its parts too."""
    if isinstance(part, nn.MultiheadAttention):
        yield from part.parameters()
        return
    if isinstance(part, nn.Embedding | nn.EmbeddingBag):
        return  # some rows of a table, which the end of the forward gives back
    yield from (tensor for tensor in part._parameters.values() if tensor is not None)
    yield from (tensor for tensor in part._buffers.values() if tensor is not None)


# -- planes ------------------------------------------------------------------------------------
def _is_local(part: nn.Sequential) -> bool:
    """Whether it is two or more layers, each of which makes a plane from those near it.

    The first makes a tensor of its own, so that none writes to the input.
    """
    if len(part) < 2 or not (_reads(part[0]) or type(part[0]) is nn.BatchNorm3d):
        return False
    plain = all(type(layer) in _POINTWISE or _reads(layer) for layer in part)
    return plain and not any(each._forward_hooks or each._forward_pre_hooks for each in part)


def _reads(layer: Any) -> bool:
    if type(layer) is nn.Conv3d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    plain = type(layer) is nn.MaxPool3d and not layer.return_indices
    return plain and not layer.ceil_mode


def _along(layer: Any) -> tuple[int, int, int]:
    """Kernel with its holes, stride and padding of a layer along the planes."""
    if isinstance(layer, _POINTWISE):
        return 1, 1, 0
    size, stride, padding, dilation = (
        value if isinstance(value, int) else value[0]
        for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    return dilation * (size - 1) + 1, stride, padding


def by_planes(layers: Sequence[nn.Module], x: Tensor, at_once: int = PLANES_AT_ONCE) -> Tensor:
    """Layers one after the other on (n, c, planes, y, x), some planes of the output at once.

    Args:
        layers: 3-D convolutions, maxima over neighbours, and what takes each voxel by itself.
        x: what the first takes.
        at_once: planes of the output.
    """
    depths = [x.shape[2]]
    for layer in layers:
        size, stride, padding = _along(layer)
        depths.append((depths[-1] + 2 * padding - size) // stride + 1)
    found = None
    for first in range(0, depths[-1], at_once):
        last = min(first + at_once, depths[-1])
        spans = [(first, last)]
        for layer, depth in zip(reversed(layers), reversed(depths[:-1]), strict=True):
            size, stride, padding = _along(layer)
            low, high = spans[0][0] * stride - padding, (spans[0][1] - 1) * stride - padding + size
            spans.insert(0, (max(low, 0), min(high, depth)))
        y = x[:, :, slice(*spans[0])]
        for layer, given, made in zip(layers, spans, spans[1:], strict=False):
            y = _planes(layer, y, given, made)
        if found is None:
            found = y.new_empty((*y.shape[:2], depths[-1], *y.shape[3:]))
        found[:, :, first:last] = y
    assert found is not None, "a layer makes no planes"
    return found


def _planes(layer: Any, x: Tensor, given: tuple[int, int], made: tuple[int, int]) -> Tensor:
    """Planes ``made`` of a layer's output, from planes ``given`` of its input."""
    if isinstance(layer, _POINTWISE):
        out: Tensor = layer(x)
        return out
    size, stride, padding = _along(layer)
    low, high = made[0] * stride - padding, (made[1] - 1) * stride - padding + size
    beyond = (0, 0, 0, 0, given[0] - low, high - given[1])
    if isinstance(layer, nn.Conv3d):
        x = functional.pad(x, beyond) if any(beyond) else x
        inside = (0, *_three(layer.padding)[1:])
        return functional.conv3d(
            x, layer.weight, layer.bias, layer.stride, inside, layer.dilation, layer.groups
        )
    x = functional.pad(x, beyond, value=-torch.inf) if any(beyond) else x
    inside = (0, *_three(layer.padding)[1:])
    return functional.max_pool3d(x, layer.kernel_size, layer.stride, inside, layer.dilation)


def _three(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else value
