"""What a forward holds at its peak, told from the traced program before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import fx

VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "squeeze"),
        *("unsqueeze", "slice", "select", "alias", "detach", "lift_fresh_copy", "narrow"),
    }
)
"""Operators that give the memory of their first input under another shape."""

IN_PLACE = frozenset(
    {
        *("relu", "leaky_relu", "prelu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardswish"),
        *("add", "sub", "mul", "div", "clamp", "clone", "_to_copy", "dropout", "batch_norm"),
        *("_native_batch_norm_legit_no_training", "relu_", "leaky_relu_", "add_", "mul_"),
    }
)
"""Operators that a graph computes in the memory of an input that nothing else reads."""


def live_bytes(program: torch.export.ExportedProgram, rows: int, aligned: int = 1) -> int:
    """Bytes of the tensors that lie beside one another when most do, weights apart, for one row.

    Each is counted from the operator that makes it to the last that reads it. A library that runs
    the graph whole takes no less, apart from what it computes in pieces or joins into one operator.

    Args:
        program: traced.
        rows: that it was traced with.
        aligned: channels of images and volumes are held in multiples of so many.
    """
    nodes = list(program.graph.nodes)
    weights = set(program.graph_signature.inputs_to_parameters)
    weights |= set(program.graph_signature.inputs_to_buffers)
    weights |= set(program.graph_signature.inputs_to_lifted_tensor_constants)
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        first = next(iter(node.all_input_nodes), None)
        alias = _name(node) in VIEWS | {"getitem"} and first is not None
        owner[node] = owner[first] if alias and first is not None else node
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        for read in (node, *node.all_input_nodes):
            last[owner[read]] = place
    size = {
        node: 0 if node.name in weights else _bytes(node.meta.get("val"), aligned)
        for node in nodes
        if owner[node] is node and node.op != "output"
    }
    ends: dict[int, list[fx.Node]] = {}
    for node in size:
        ends.setdefault(last[node], []).append(node)
    held = peak = 0
    for place, node in enumerate(nodes):
        if node in size:
            freed = [each for each in ends.get(place, ()) if each is not node]
            reused = max((size[each] for each in freed), default=0)
            over = _name(node) in IN_PLACE and reused >= size[node]
            peak = max(peak, held + (0 if over else size[node]))
            held += size[node]
        held -= sum(size[each] for each in ends.get(place, ()))
    return math.ceil(peak / rows)


def _name(node: fx.Node) -> str:
    """Of the operator, without namespace and overload; empty for what is no operator."""
    if node.op != "call_function":
        return ""
    target = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return str(target).partition(".")[0]


def _bytes(value: object, aligned: int) -> int:
    return sum(_size(tensor, aligned) for tensor in _tensors(value))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for each in value:
            yield from _tensors(each)


def _size(tensor: torch.Tensor, aligned: int) -> int:
    sizes = [_number(size) for size in tensor.shape]
    if len(sizes) >= 4 and sizes[1] > 1:
        sizes[1] = -(-sizes[1] // aligned) * aligned
    return math.prod(sizes) * tensor.element_size()


def _number(size: int | torch.SymInt) -> int:
    """A size; where it is free, that of the rows it was traced with."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 1 if hint is None else int(hint)
