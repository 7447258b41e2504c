"""How a torch module is made to compute in the precisions of a policy, and what then ran.

A layer of bf16 or fp16 holds weights in it and takes its inputs in it; its output stays low
until something needs float32: a layer or function of an fp32 class, or the end of the model.
Consecutive low layers so pass tensors on without casts. Normalisation that follows a
convolution of a low precision is folded into its weights.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from plinth.engine.errors import ConfigError, nearest
from plinth.engine.precision.policy import Precision, PrecisionPolicy
from plinth.engine.precision.registry import handler, register

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
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

_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "softmax": ("softmax", "log_softmax", "sigmoid", "logsigmoid", "softmin", "gumbel_softmax"),
    "attention": (
        *("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "einsum", "mv", "dot"),
        *("scaled_dot_product_attention", "addmm", "tensordot"),
    ),
    "norm": (
        *("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm", "normalize"),
        *("local_response_norm",),
    ),
    "activation": (
        *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh", "prelu"),
        *("hardtanh", "hardswish", "hardsigmoid", "add", "__add__", "__radd__", "__iadd__"),
        *("add_", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__", "__imul__", "mul_"),
        *("div", "__truediv__", "neg", "__neg__", "abs", "maximum", "minimum", "clamp", "clip"),
        *("where", "masked_fill", "masked_fill_", "cat", "concat", "stack", "pad", "interpolate"),
        *("dropout", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"),
        *("avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample"),
        *("boolean_dispatch",),
    ),
    "shape": (
        *("view", "reshape", "permute", "transpose", "swapaxes", "t", "flatten", "unflatten"),
        *(
            "slice",
            "alias",
            "sym_size",
            "sym_numel",
            "squeeze",
            "unsqueeze",
            "expand",
            "expand_as",
            "repeat",
            "repeat_interleave",
            "chunk",
        ),
        *("split", "unbind", "narrow", "select", "__getitem__", "index_select", "gather", "flip"),
        *("contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "type", "type_as"),
        *("size", "dim", "numel", "stride", "__get__", "__len__", "is_floating_point", "roll"),
        *("movedim", "view_as", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like"),
        *("ones_like", "full_like", "empty_like", "is_contiguous", "is_complex", "__set__"),
        *("__setitem__", "pixel_shuffle", "pixel_unshuffle", "unfold", "fold", "element_size"),
    ),
}
_CLASS_OF = {name: op_class for op_class, names in _FUNCTIONS.items() for name in names}
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LOW = frozenset(_DTYPES.values())


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

    Raises:
        ConfigError: the policy names a layer that is not there or has no weights.
    """
    plan = _plan(module, policy, last)
    folded = {norm for _, norm in _foldable(module, plan)}
    return [
        LayerReport(name, type(layer).__name__, op_class, "folded" if name in folded else precision)
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
    return whole_copy(module, shared)


def whole_copy(module: nn.Module, shared: dict[int, Tensor] | None = None) -> nn.Module:
    """A deep copy of a module, but for tensors to share by their ``id``.

    Raises:
        TypeError: a part of it cannot be copied.
    """
    with warnings.catch_warnings():  # torch's own, of how it copies an exported program
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)
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

    Raises:
        ConfigError: torch has no way to compute a class in its precision.
    """
    plan = _plan(module, policy, last)
    if all(precision == "fp32" for _, _, _, precision in plan):
        return module
    changed = sharing_copy(module)
    pairs = _foldable(module, plan)
    for conv, norm in pairs:
        _fold(changed, conv, norm)
    folded = {norm for _, norm in pairs}
    layers = dict(changed.named_modules())
    lowered: dict[tuple[int, torch.dtype], Tensor] = {}
    for name, _, op_class, precision in plan:
        if name in folded:
            continue
        handler("torch", op_class, precision)(layers[name], precision, lowered)
    return _with_glue(changed, policy)


@register("torch", tuple(_CLASSES), ("bf16", "fp16"))
def _lower(
    layer: nn.Module, precision: str, lowered: dict[tuple[int, torch.dtype], Tensor]
) -> None:
    """Give a layer low tensors of its own; those tied within low layers stay one tensor."""
    dtype = _DTYPES[precision]
    for part in layer.modules():
        for kind in (part._parameters, part._buffers):
            for name, tensor in kind.items():
                if tensor is None or tensor.dtype != torch.float32:
                    continue
                key = (id(tensor), dtype)
                if key not in lowered:
                    low = tensor.detach().to(dtype)
                    is_weight = kind is part._parameters
                    lowered[key] = nn.Parameter(low, requires_grad=False) if is_weight else low
                kind[name] = lowered[key]  # type: ignore[assignment]
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
    if next(layer.parameters(), None) is not None or not getattr(layer, "inplace", False):
        layer.register_forward_pre_hook(functools.partial(_take, dtype), with_kwargs=True)


class _Int8Embedding(nn.Embedding):
    """A look-up table of 8-bit rows, each with a scale of its own; gives float32."""

    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, self.weight) * nn.functional.embedding(
            input, self.scale
        )


@register("torch", ("embedding",), ("int8",))
def _int8_table(layer: nn.Module, _: str, __: dict[tuple[int, torch.dtype], Tensor]) -> None:
    if type(layer) is not nn.Embedding or layer.max_norm is not None:
        raise ConfigError(
            f"torch has no {type(layer).__name__} in int8, nor one with max_norm",
            hint="leave that layer in fp32: precision.layers",
        )
    weight = layer.weight.detach()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    del layer.weight
    layer.register_buffer("weight", (weight / scale).round().to(torch.int8))
    layer.register_buffer("scale", scale)
    layer.__class__ = _Int8Embedding


@register("torch", tuple(_CLASSES), ("fp32",))
def _keep(layer: nn.Module, _: str, __: dict[tuple[int, torch.dtype], Tensor]) -> None:
    if not getattr(layer, "inplace", False):  # a cast would be what it writes to
        layer.register_forward_pre_hook(functools.partial(_take, torch.float32), with_kwargs=True)


def _take(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(args, dtype), _cast(kwargs, dtype)


def _with_glue(module: nn.Module, policy: PrecisionPolicy) -> nn.Module:
    """Let functions between the layers compute as the policy says; the outputs are float32."""
    kind = type(module)
    own = kind.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Glue(policy):
            return _cast(own(self, *args, **kwargs), torch.float32)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # nested tensors leave the layers' own precisions
    return module


class _Glue(TorchFunctionMode):
    """Raises low tensors to float32 for functions that the policy does not let run low.

    A function that is given low weights belongs to a layer, which was decided before.
    Functions that no class names, sums and powers say, are given float32.
    """

    def __init__(self, policy: PrecisionPolicy) -> None:
        super().__init__()
        low = {name for name in _FUNCTIONS if getattr(policy, name, "fp32") in _DTYPES}
        self._low = frozenset(name for name, c in _CLASS_OF.items() if c in low | {"shape"})
        self._shape = frozenset(_FUNCTIONS["shape"])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]  # aten's have overloads: add.Tensor
        if name in self._shape or _writes(func, name, args, kwargs):
            return func(*args, **kwargs)
        found = [t for t in _flat([*args, *kwargs.values()]) if t.is_floating_point()]
        if not any(t.dtype in _LOW for t in found) or _is_of_a_layer(found):
            return func(*args, **kwargs)
        if name in self._low and len({t.dtype for t in found}) == 1:
            return func(*args, **kwargs)
        return func(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))


def _writes(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function writes to a tensor that it is given, which must not be a copy then."""
    if isinstance(func, OpOverload):
        return bool(func._schema.is_mutable)
    inplace = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    asked = kwargs.get("inplace") or kwargs.get("out") is not None
    return inplace or bool(asked) or any(arg is True for arg in args)


def _is_of_a_layer(tensors: list[Tensor]) -> bool:
    return any(isinstance(t, nn.Parameter) and t.dtype in _LOW for t in tensors)


def _foldable(
    module: nn.Module, plan: list[tuple[str, nn.Module, str, Precision]]
) -> list[tuple[str, str]]:
    """Convolutions of a low precision, and the batch norm that alone reads the output of each."""
    low = {name for name, _, c, precision in plan if c == "conv" and precision in _DTYPES}
    if not low:
        return []
    layers = dict(module.named_modules())
    pairs = _traced_pairs(module) or list(_neighbours(module))
    return [
        (conv, norm)
        for conv, norm in pairs
        if conv in low and _can_fold(layers.get(conv), layers.get(norm))
    ]


def _can_fold(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    return (
        isinstance(conv, nn.modules.conv._ConvNd)
        and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        and norm.running_mean is not None
        and not norm.training
    )


def _traced_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """(convolution, what reads its output) where only one layer does, and both run once.

    Read from the graphs of exported programs, else from a symbolic trace, which fails on control
    flow that depends on values.
    """
    parts = module.named_modules()
    graphs = [(f"{path}.", part.graph) for path, part in parts if isinstance(part, fx.GraphModule)]
    try:
        graphs = graphs or [("", fx.Tracer().trace(module))]
    except Exception:  # noqa: BLE001 - whatever code that cannot be traced raises
        return []
    calls = [(at, node) for at, graph in graphs for node in graph.nodes if node.op == "call_module"]
    count: dict[str, int] = {}
    for at, node in calls:
        count[f"{at}{node.target}"] = count.get(f"{at}{node.target}", 0) + 1
    return [
        (f"{at}{before.target}", f"{at}{node.target}")
        for at, node in calls
        for before in node.args[:1]
        if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
        if count[f"{at}{before.target}"] == 1 == count[f"{at}{node.target}"]
    ]


def _neighbours(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Neighbours in a Sequential that nothing else holds."""
    uses: dict[int, int] = {}
    for part in module.modules():
        for child in part._modules.values():
            uses[id(child)] = uses.get(id(child), 0) + 1
    for path, part in module.named_modules():
        if isinstance(part, nn.Sequential):
            names = [f"{path}.{name}" if path else name for name, _ in part.named_children()]
            for (a, first), (b, second) in pairwise(zip(names, part, strict=True)):
                if uses[id(first)] == 1 == uses[id(second)]:
                    yield a, b


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    layers = dict(module.named_modules())
    old: Any = layers[conv]
    transposed = bool(old.transposed)
    _replace(module, conv, fuse_conv_bn_eval(old, layers[norm], transposed))
    _replace(module, norm, nn.Identity())


def _replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


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


_RESIZES = ("aten.upsample_", "aten._upsample_")
"""Operations without a product to count, which torch takes apart by a library of symbols."""
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations by the dtype of an operation's first tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch imports its compiler, 80 MB, to keep it away from modes that do not say no."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None and str(func).startswith(_RESIZES):
            return func(*args, **kwargs)
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
    weighted = [name for name, layer, _ in found if _has_weights(layer)]
    for name in policy.layers:
        if name not in weighted:
            raise ConfigError(
                f"precision.layers.{name} is not a layer with weights", hint=nearest(name, weighted)
            )
    chosen = frozenset(weighted[-1:]) if last is None else last
    return [(n, m, c, policy.of(n, c, last=n in chosen)) for n, m, c in found]


def _layers(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    found: list[tuple[str, nn.Module, str]] = []
    _collect(module, "", found, set())
    return found


def _has_weights(layer: nn.Module) -> bool:
    return next(layer.parameters(), None) is not None


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


def _cast(value: Any, target: torch.dtype) -> Any:
    """Tensors of float32 and of the low precisions to one of them; others stay as they are."""
    if isinstance(value, Tensor):
        castable = value.dtype != target and (value.dtype in _LOW or value.dtype == torch.float32)
        return value.to(target) if castable else value
    if isinstance(value, tuple | list):
        parts = [_cast(part, target) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return type(value)((key, _cast(part, target)) for key, part in value.items())
    return value
