"""The operators of a graph on large volumes: slab by slab, and over memory that nobody reads.

A library brings whole volumes into an order of its own, with channels filled up to its vectors, so
that one convolution to two channels can take as much as eight or sixteen do. Of a slab that is
little. What normalises or activates a tensor that nobody else reads writes over it. Every number is
computed from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from plinth.engine.mapped import trim

Sizes = int | Sequence[int]
LARGE = 32 << 20
"""Bytes of a result from which it is made in slabs."""
SLAB = 16 << 20
"""Bytes of planes that are made at once, channels filled up."""
ALIGNED = 16
"""Channels that a library fills up to, at most."""
_ATEN = torch.ops.aten
_IN_PLACE: dict[Any, Any] = {
    _ATEN.relu.default: _ATEN.relu_.default,
    _ATEN.leaky_relu.default: _ATEN.leaky_relu_.default,
    _ATEN.elu.default: _ATEN.elu_.default,
    _ATEN.silu.default: _ATEN.silu_.default,
    _ATEN.sigmoid.default: _ATEN.sigmoid_.default,
}


def sparing(module: nn.Module) -> None:
    """Let the graphs inside a module hold less at their peak, in place.

    Those without convolutions of volumes stay as they are.
    """
    for part in module.modules():
        if isinstance(part, fx.GraphModule) and _convolves(part.graph):
            _rewrite(part.graph)
            part.recompile()


def may_spare(module: nn.Module) -> bool:
    """Whether :func:`sparing` changes anything."""
    return any(isinstance(m, fx.GraphModule) and _convolves(m.graph) for m in module.modules())


def _convolves(graph: fx.Graph) -> bool:
    if any(graph.find_nodes(op="call_function", target=each) for each in _OF_VOLUMES):
        return True
    found = graph.find_nodes(op="call_function", target=_ATEN.convolution.default)
    return any(len(node.args[3]) == 3 for node in found)


def _rewrite(graph: fx.Graph) -> None:
    always = {**_OF_VOLUMES, _ATEN.convolution.default: convolution}
    last = {**_IN_PLACE, _ATEN.instance_norm.default: instance_norm, _ATEN.softmax.int: softmax}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in always:
            node.target = always[node.target]
        elif node.target in last and _is_last(node.args[0]):
            node.target = last[node.target]


def _is_last(value: Any) -> bool:
    """Whether the one node that reads a value may write over it: its memory is nobody else's."""
    while isinstance(value, fx.Node) and len(value.users) == 1:
        if value.target in _MAKES:
            return True
        if value.target not in _OVERWRITES:
            return False
        value = value.args[0]
    return False


def _is_plain(x: Tensor) -> bool:
    """Whether operators may be computed in parts: nothing is traced, nobody asks for gradients."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    plain &= torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return plain and not (traced or torch.is_grad_enabled())


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """``aten.convolution``; a large one of volumes (n, c, z, y, x) some planes at a time.

    Args:
        x: what it takes.
        weight: of the convolution.
        bias: of each channel of the output.
        how: stride, padding, dilation, whether it is transposed, padding of the output, groups.
    """
    stride, padding, dilation, transposed, output_padding, groups = how

    def whole() -> Tensor:
        found: Tensor = _ATEN.convolution.default(x, weight, bias, *how)
        return found

    def made(part: Tensor) -> Tensor:
        inside, outside = [0, *padding[1:]], [0, *output_padding[1:]]
        if transposed:
            found: Tensor = _ATEN.convolution.default(
                *(part, weight, bias, stride, inside, dilation, True, outside, groups)
            )
            return found
        # aten.convolution leaves small inputs to a kernel that is ten times slower
        return torch.mkldnn_convolution(part, weight, bias, inside, stride, dilation, groups)

    if x.ndim != 5 or not _is_plain(x):
        return whole()
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    beyond = output_padding if transposed else None
    size = _sizes(x, weight.shape[2:], (stride, padding, dilation), beyond)
    if 4 * channels * len(x) * math.prod(size) < LARGE:
        return whole()
    trim()  # what smaller results left in pieces is not held beside this one
    filled = -(-max(channels, x.shape[1]) // ALIGNED) * ALIGNED
    at_once = max(1, SLAB // (4 * filled * len(x) * size[1] * size[2]))
    reach, step, before = dilation[0] * (weight.shape[2] - 1), stride[0], padding[0]
    found = x.new_empty((len(x), channels, *size))
    for first in range(0, size[0], at_once):
        last = min(first + at_once, size[0])
        target = found[:, :, first:last]
        if transposed:
            low = max(0, -(-(first + before - reach) // step))
            high = min(x.shape[2], (last - 1 + before) // step + 1)
            part = made(x[:, :, low:high]) if low < high else x.new_empty(0)
            _lay(part, low * step - before - first, target, bias)
            continue
        low, high = first * step - before, (last - 1) * step - before + reach + 1
        part = x[:, :, max(low, 0) : max(high, 0)]
        zeros = (0, 0, 0, 0, *(min(max(n, 0), high - low) for n in (-low, high - x.shape[2])))
        target.copy_(made(functional.pad(part, zeros) if any(zeros) else part))
    return found


def _lay(part: Tensor, at: int, target: Tensor, bias: Tensor | None) -> None:
    """Copy planes to where they lie in a target, from plane ``at`` on; no input reaches others."""
    count = part.shape[2] if part.numel() else 0
    first, last = max(at, 0), min(at + count, target.shape[2])
    if first > 0 or last < target.shape[2]:
        rest = target.new_zeros(1) if bias is None else bias.view(1, -1, 1, 1, 1)
        target.copy_(rest.expand_as(target))
    if first < last:
        target[:, :, first:last] = part[:, :, first - at : last - at]


def _sizes(
    x: Tensor,
    kernel: tuple[int, ...],
    how: tuple[list[int], list[int], list[int]],
    output_padding: list[int] | None,
) -> list[int]:
    """(z, y, x) of what a convolution gives; one with a padding of its output is transposed."""
    found = []
    for axis, (size, k) in enumerate(zip(x.shape[2:], kernel, strict=True)):
        stride, padding, dilation = (each[axis] for each in how)
        reach = dilation * (k - 1)
        if output_padding is None:
            found.append((size + 2 * padding - reach - 1) // stride + 1)
        else:
            found.append((size - 1) * stride - 2 * padding + reach + output_padding[axis] + 1)
    return found


def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, own: bool, *how: Any
) -> Tensor:
    """``aten.instance_norm`` over what nobody else reads: a large one channel by channel."""
    if mean is not None or not own or not _is_plain(x) or x.nbytes < LARGE:
        whole: Tensor = _ATEN.instance_norm.default(x, weight, bias, mean, var, own, *how)
        return whole
    for row in torch.split(x, 1):
        for n, channel in enumerate(torch.split(row, 1, 1)):
            scale, shift = (None if w is None else w[n : n + 1] for w in (weight, bias))
            made = _ATEN.instance_norm.default(channel, scale, shift, None, None, own, *how)
            channel.copy_(made)
    return x


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """``aten.softmax`` of what nobody else reads: over the channels of large volumes, by planes."""
    same = dtype in (None, x.dtype) and x.is_floating_point()
    if not same or dim != 1 or x.ndim != 5 or not _is_plain(x) or x.nbytes < LARGE:
        whole: Tensor = _ATEN.softmax.int(x, dim, dtype)
        return whole
    for part in torch.split(x, max(1, SLAB * x.shape[2] // (4 * x.nbytes)), 2):
        part.copy_(_ATEN.softmax.int(part, 1))
    return x


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """``aten.conv3d``, as :func:`convolution`."""
    sizes = [_three(each) for each in (stride, padding, dilation)]
    return _of_one_or_more(x, weight, bias, *sizes, False, [0, 0, 0], groups)


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """``aten.conv_transpose3d``, as :func:`convolution`."""
    sizes = [_three(each) for each in (stride, padding, dilation)]
    return _of_one_or_more(x, weight, bias, *sizes, True, _three(output_padding), groups)


def _of_one_or_more(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """:func:`convolution` of volumes, or of one by itself (c, z, y, x)."""
    if x.ndim == 4:
        return convolution(x[None], weight, bias, *how)[0]
    return convolution(x, weight, bias, *how)


def _three(sizes: Sizes) -> list[int]:
    found = [sizes] if isinstance(sizes, int) else list(sizes)
    return found * 3 if len(found) == 1 else found


_OF_VOLUMES = {
    _ATEN.conv3d.default: conv3d,
    _ATEN.conv_transpose3d.input: conv_transpose3d,
}
_OVERWRITES = {
    *(instance_norm, softmax, *_IN_PLACE.values(), _ATEN.add_.Tensor, _ATEN.mul_.Tensor),
}
"""What gives the memory of its first input; :func:`instance_norm` may give its own."""
_MAKES = {
    *(convolution, *_OF_VOLUMES.values(), _ATEN.instance_norm.default, _ATEN.softmax.int),
    *(_ATEN.add.Tensor, _ATEN.mul.Tensor, *_IN_PLACE),
}
"""What gives memory of its own."""
