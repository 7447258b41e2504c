"""Which layers read which, as far as a symbolic trace can tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Hardswish),
    *(nn.Sigmoid, nn.Softplus, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_FUNCTIONS = {"relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "dropout"}


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers of which each alone reads the one before, element by element in between.

    Args:
        producer: a linear layer or convolution, which makes channels.
        norm: the batch norm behind it, or ``None``.
        consumer: what reads the channels; ``None`` where that is not one layer.
    """

    producer: str
    norm: str | None
    consumer: str | None


def chains(module: nn.Module) -> list[Chain]:
    """All of a module; none if it cannot be traced.

    A trace fails on control flow that depends on values, and says nothing of what an exported
    program holds.
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001 - whatever code that cannot be traced raises
        return []
    layers = dict(module.named_modules())
    runs = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and runs[node.target] == 1:
            layer = layers[str(node.target)]
            if _is_plain(layer):
                found.append(_follow(node, layers, runs))
    return found


def _is_plain(layer: nn.Module) -> bool:
    """A linear layer or convolution of one group whose weight is stored, not computed."""
    stored = "weight" in layer._parameters
    return isinstance(layer, LINEAR) and stored and getattr(layer, "groups", 1) == 1


def _follow(node: fx.Node, layers: dict[str, nn.Module], runs: Counter[object]) -> Chain:
    producer, norm, at = str(node.target), None, node
    while len(at.users) == 1:
        at = next(iter(at.users))
        name = str(at.target)
        if at.op == "call_module" and runs[at.target] == 1:
            layer = layers[name]
            if _is_plain(layer):
                same = isinstance(layer, nn.Linear) == isinstance(layers[producer], nn.Linear)
                return Chain(producer, norm, name if same else None)
            if isinstance(layer, NORMS) and norm is None and at.args[0] is node:
                norm, node = name, at
                continue
            if isinstance(layer, _ELEMENTWISE):
                continue
        elif at.op in ("call_function", "call_method"):
            word = name if at.op == "call_method" else getattr(at.target, "__name__", "")
            if word in _FUNCTIONS:
                continue
        break
    return Chain(producer, norm, None)
