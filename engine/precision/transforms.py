"""How a torch module is made to compute in the precisions of a policy, and what then ran.

Layers of a bf16 class hold bf16 weights and take bf16 inputs; every other layer takes float32.
Tensors that stay float32 are shared with the original, not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from plinth.engine.precision.policy import Precision, PrecisionPolicy

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "opaque": (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    "attention": (nn.MultiheadAttention,),
    "matmul": (nn.Linear, nn.Bilinear),
    "conv": (nn.modules.conv._ConvNd,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "norm": (
        nn.modules.batchnorm._NormBase,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.LocalResponseNorm,
    ),
    "softmax": (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.Sigmoid, nn.LogSigmoid),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "activation": (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
        *(nn.Mish, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd),
        *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
        *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
    ),
}


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer: its path in the module, its type, its operation class and its precision."""

    name: str
    kind: str
    op_class: str
    precision: str


def report(
    module: nn.Module, policy: PrecisionPolicy, last: frozenset[str] | None = None
) -> list[LayerReport]:
    """What each layer of a module computes in under a policy, in order of registration.

    Args:
        module: the module.
        policy: what to compute in what.
        last: names of the layers that count as the last, see :func:`last_layers`; ``None``:
            the one that was registered last.
    """
    plan = _plan(module, policy, last)
    return [
        LayerReport(name, type(layer).__name__, op_class, precision)
        for name, layer, op_class, precision in plan
    ]


def last_layers(module: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """The layer with weights that runs last, and those whose output the model gives as it is.

    Args:
        module: the module.
        run: calls it on example rows and returns what it gave.
    """
    ran: list[tuple[str, Any]] = []
    weighted = [(name, layer) for name, layer, _ in _layers(module) if _has_weights(layer)]
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: ran.append((name, output)))
        for name, layer in weighted
    ]
    try:
        given = {id(tensor) for tensor in _flat(run())}
    finally:
        for hook in hooks:
            hook.remove()
    found = {name for name, output in ran if any(id(part) in given for part in _flat(output))}
    return frozenset(found | {name for name, _ in ran[-1:]})


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | tuple | list):
        return []
    return [tensor for part in parts for tensor in _flat(part)]


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that shares all its parameters and buffers with the original.

    Raises:
        TypeError: a part of it cannot be copied.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def apply(
    module: nn.Module, policy: PrecisionPolicy, last: frozenset[str] | None = None
) -> nn.Module:
    """A copy of a module that computes as the policy says and gives float32.

    Args:
        module: in float32; stays as it is, and shares its float32 tensors with the copy.
        policy: what to compute in what.
        last: see :func:`report`.

    Returns:
        The module itself if no layer leaves fp32, else a copy.
    """
    plan = _plan(module, policy, last)
    if all(precision == "fp32" for _, _, _, precision in plan):
        return module
    changed = sharing_copy(module)
    layers = dict(changed.named_modules())
    low = {id(layers[name]) for name, _, _, precision in plan if precision == "bf16"}
    keep = _stays_low(changed, low)
    lowered: dict[int, Tensor] = {}
    for name, _, _, precision in plan:
        layer = layers[name]
        if precision == "bf16":
            _lower_weights(layer, lowered)
            layer.register_forward_pre_hook(_lower_inputs, with_kwargs=True)
        else:
            layer.register_forward_pre_hook(_raise_inputs, with_kwargs=True)
        if precision == "bf16" and id(layer) not in keep:
            layer.register_forward_hook(_raise_output)
    changed.register_forward_hook(_raise_output)
    return changed


def _lower_weights(layer: nn.Module, lowered: dict[int, Tensor]) -> None:
    """Give a layer bf16 tensors of its own; those tied within bf16 layers stay one tensor."""
    for part in layer.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is None or tensor.dtype != torch.float32:
                    continue
                if id(tensor) not in lowered:
                    low = tensor.detach().to(torch.bfloat16)
                    is_weight = kind is part._parameters
                    lowered[id(tensor)] = (
                        nn.Parameter(low, requires_grad=False) if is_weight else low
                    )
                kind[name] = lowered[id(tensor)]  # type: ignore[assignment]
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()


def flops_by_precision(run: Callable[[], Any]) -> dict[str, float]:
    """Share of the floating-point operations that ran in each precision, as torch ran them.

    Matrix products, convolutions and attention are counted, in layers or not; ``{}`` if there
    were none.

    Args:
        run: calls the module on example rows.
    """
    census = _Census()
    with torch.no_grad(), census:
        run()
    total = sum(census.flops.values())
    return {name: flops / total for name, flops in census.flops.items()} if total else {}


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by the dtype of an operation's first tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            with self:
                found = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if found is NotImplemented else found
        output = func(*args, **kwargs)
        tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if tensor is not None:
            name = _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            flops = int(count(*args, **kwargs, out_val=output))
            self.flops[name] = self.flops.get(name, 0) + flops
        return output


def _plan(
    module: nn.Module, policy: PrecisionPolicy, last: frozenset[str] | None
) -> list[tuple[str, nn.Module, str, Precision]]:
    found = _layers(module)
    if last is None:
        last = frozenset([name for name, layer, _ in found if _has_weights(layer)][-1:])
    return [(n, m, c, _precision(policy, c, last=n in last)) for n, m, c in found]


def _layers(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    found: list[tuple[str, nn.Module, str]] = []
    _collect(module, "", found, set())
    return found


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


def _precision(policy: PrecisionPolicy, op_class: str, *, last: bool) -> Precision:
    if op_class == "opaque":
        return "fp32"
    own = cast("Precision", getattr(policy, op_class))
    return "bf16" if own == "bf16" and (not last or policy.last == "bf16") else "fp32"


def _collect(
    module: nn.Module, name: str, found: list[tuple[str, nn.Module, str]], seen: set[int]
) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for op_class, kinds in _CLASSES.items():
        if isinstance(module, kinds):
            found.append((name, module, op_class))
            return
    for child_name, child in module.named_children():
        _collect(child, f"{name}.{child_name}" if name else child_name, found, seen)


def _stays_low(module: nn.Module, low: set[int]) -> set[int]:
    """Layers whose output the next layer of the same Sequential takes in bf16 anyway."""
    uses: dict[int, int] = {}
    follows: set[int] = set()
    for part in module.modules():
        for child in part._modules.values():
            uses[id(child)] = uses.get(id(child), 0) + 1
        if isinstance(part, nn.Sequential):
            follows |= {id(a) for a, b in pairwise(part) if id(a) in low and id(b) in low}
    return {layer for layer in follows if uses[layer] == 1}


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, source, target) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, source, target) for key, part in value.items()}
    return value


def _lower_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return (
        _cast(args, torch.float32, torch.bfloat16),
        _cast(kwargs, torch.float32, torch.bfloat16),
    )


def _raise_inputs(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return (
        _cast(args, torch.bfloat16, torch.float32),
        _cast(kwargs, torch.bfloat16, torch.float32),
    )


def _raise_output(_: nn.Module, __: Any, output: Any) -> Any:
    return _cast(output, torch.bfloat16, torch.float32)
