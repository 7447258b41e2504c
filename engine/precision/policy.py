"""Which operations compute in which precision, and how a torch module is made to do so.

A policy names a precision per operation class. :func:`apply` realises it in a module: layers
of a bf16 class hold bf16 weights and take bf16 inputs; every other layer takes float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from plinth.engine.errors import ConfigError, nearest

Precision = Literal["fp32", "bf16"]

PRECISIONS = ("fp32", "bf16")
RESERVED = ("fp16", "int8")

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
class PrecisionPolicy:
    """A precision per operation class.

    Args:
        matmul: fully connected layers.
        conv: convolutions, transposed ones included.
        embedding: look-up tables.
        norm: batch, layer, group and RMS normalisation.
        softmax: softmax and the sigmoids.
        attention: multi-head attention, its softmax included.
        recurrent: RNN, LSTM, GRU.
        activation: pointwise functions, pooling, dropout.
        last: the last layer that has weights; it decides the rounding of the outputs.
        auto: bf16 only if the device has it natively and a timed probe shows a gain.
        name: what it is called in reports.
    """

    matmul: Precision = "fp32"
    conv: Precision = "fp32"
    embedding: Precision = "fp32"
    norm: Precision = "fp32"
    softmax: Precision = "fp32"
    attention: Precision = "fp32"
    recurrent: Precision = "fp32"
    activation: Precision = "fp32"
    last: Precision = "fp32"
    auto: bool = False
    name: str = "custom"

    def __post_init__(self) -> None:
        for name in CLASSES:
            _check_precision(name, getattr(self, name))

    @property
    def plain(self) -> bool:
        """Whether everything is fp32."""
        return all(getattr(self, name) == "fp32" for name in CLASSES)

    def table(self) -> dict[str, str]:
        """The precision by operation class."""
        return {name: value for name, value in asdict(self).items() if name in CLASSES}

    @classmethod
    def from_table(cls, table: Mapping[str, str]) -> PrecisionPolicy:
        """A policy from a TOML table; classes that it does not name are fp32.

        Args:
            table: operation class -> ``"fp32"`` or ``"bf16"``; the key ``preset`` names the
                policy to start from.

        Raises:
            ConfigError: an unknown class or precision, with the nearest known one.
        """
        rest = dict(table)
        base = _preset(rest.pop("preset", "fp32"))
        for key, value in rest.items():
            if key not in CLASSES:
                raise ConfigError(
                    f"precision.{key} is not an operation class", hint=nearest(key, CLASSES)
                )
            _check_precision(key, value)
        if not rest:
            return base
        return replace(base, **cast("dict[str, Any]", rest), name="custom")


CLASSES = tuple(
    field.name for field in fields(PrecisionPolicy) if field.name not in ("auto", "name")
)


def resolve(policy: PrecisionPolicy | str | Mapping[str, str]) -> PrecisionPolicy:
    """A policy from its preset's name or its table.

    Raises:
        ConfigError: unknown preset, class or precision.
    """
    if isinstance(policy, PrecisionPolicy):
        return policy
    return _preset(policy) if isinstance(policy, str) else PrecisionPolicy.from_table(policy)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer: its path in the module, its type, its operation class and its precision."""

    name: str
    kind: str
    op_class: str
    precision: str


def report(module: nn.Module, policy: PrecisionPolicy) -> list[LayerReport]:
    """What each layer of a module computes in under a policy, in order of registration."""
    plan = _plan(module, policy)
    return [
        LayerReport(name, type(layer).__name__, op_class, precision)
        for name, layer, op_class, precision in plan
    ]


def apply(module: nn.Module, policy: PrecisionPolicy) -> nn.Module:
    """A copy of a module that computes as the policy says and gives float32.

    Args:
        module: in float32; stays as it is.
        policy: what to compute in what.

    Returns:
        The module itself if the policy is all fp32, else a copy.
    """
    plan = _plan(module, policy)
    if all(precision == "fp32" for _, _, _, precision in plan):
        return module
    changed = copy.deepcopy(module)
    layers = dict(changed.named_modules())
    low = {id(layers[name]) for name, _, _, precision in plan if precision == "bf16"}
    keep = _stays_low(changed, low)
    for name, _, _, precision in plan:
        layer = layers[name]
        if precision == "bf16":
            layer.to(torch.bfloat16)
            layer.register_forward_pre_hook(_lower_inputs, with_kwargs=True)
        else:
            layer.register_forward_pre_hook(_raise_inputs, with_kwargs=True)
        if precision == "bf16" and id(layer) not in keep:
            layer.register_forward_hook(_raise_output)
    changed.register_forward_hook(_raise_output)
    return changed


def _plan(
    module: nn.Module, policy: PrecisionPolicy
) -> list[tuple[str, nn.Module, str, Precision]]:
    found: list[tuple[str, nn.Module, str]] = []
    _collect(module, "", found, set())
    weighted = [name for name, layer, _ in found if next(layer.parameters(), None) is not None]
    last = weighted[-1] if weighted else None
    return [(n, m, c, _precision(policy, c, last=n == last)) for n, m, c in found]


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


def _preset(name: str) -> PrecisionPolicy:
    if name in PRESETS:
        return PRESETS[name]
    if name in RESERVED:
        raise ConfigError(f"precision {name!r} is not there yet", hint="use fp32, bf16 or auto")
    raise ConfigError(f"precision {name!r} is not a preset", hint=nearest(name, PRESETS))


def _check_precision(key: str, value: object) -> None:
    if value in PRECISIONS:
        return
    if value in RESERVED:
        raise ConfigError(
            f"precision.{key} is {value!r}, which is not there yet", hint="use fp32 or bf16"
        )
    raise ConfigError(
        f"precision.{key} is {value!r}, which is not a precision",
        hint=nearest(str(value), PRECISIONS),
    )


_BF16 = PrecisionPolicy(
    matmul="bf16",
    conv="bf16",
    embedding="bf16",
    attention="bf16",
    recurrent="bf16",
    activation="bf16",
    name="bf16",
)
PRESETS = {
    "fp32": PrecisionPolicy(name="fp32"),
    "bf16": _BF16,
    "auto": replace(_BF16, auto=True, name="auto"),
}
