"""Operations of an exported program as layers, so that it can be lowered as other modules are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

Facts = dict[str, Any]
Maker = Callable[[Facts, fx.Node], nn.Module | None]
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONVS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def with_layers(module: nn.Module) -> nn.Module:
    """Let operations with weights of their own be layers, named as those they were exported from.

    Fully connected layers, convolutions, look-up tables and batch norms are found; other
    operations stay functions. Tensors are shared, not copied.

    Args:
        module: a copy that is nobody else's, with exported programs in it; it is changed.
    """
    for program in [part for part in module.modules() if isinstance(part, fx.GraphModule)]:
        _find_layers(program)
    return module


def _find_layers(program: fx.GraphModule) -> None:
    made: dict[str, str] = {}
    for node in list(program.graph.nodes):
        maker = _MAKERS.get(_name(node))
        facts = _facts(program, node) if maker else None
        layer = maker(facts, node) if maker and facts else None
        if facts is None or layer is None:
            continue
        key = repr((type(layer), *facts["key"]))
        if key not in made:
            layer.training = False
            made[key] = _place(program, facts["path"], layer)
        with program.graph.inserting_before(node):
            call = program.graph.call_module(made[key], (facts["rows"],))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        program.graph.erase_node(node)
        _drop_unused(program)
    program.recompile()


def _name(node: fx.Node) -> str:
    """Of an operator of aten, without its overload; "" of anything else."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def _facts(program: fx.GraphModule, node: fx.Node) -> Facts | None:
    """Arguments by name, its tensors looked up; ``None`` where its weight is no tensor it holds."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    facts: Facts = {each.name: each.default_value for each in schema if each.has_default_value()}
    facts |= dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs
    facts["rows"] = facts.get("indices", facts.get("input"))
    held: dict[str, str] = {}
    for name in _TENSORS:
        value = facts.get(name)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        held[name] = str(value.target)
        facts[name] = _tensor(program, held[name])
    if "weight" not in held:
        return None
    facts["path"] = _path(held["weight"])
    rest = {k: v for k, v in facts.items() if k not in (*_TENSORS, "rows", "input", "indices")}
    facts["key"] = (sorted(held.items()), sorted(rest.items()))
    return facts


def _path(weight: str) -> str:
    """``encoder.0.weight`` to ``encoder.0``, ``attention.in_proj_weight`` to its ``in_proj``."""
    parent, _, leaf = weight.rpartition(".")
    stem = leaf.removesuffix("weight").rstrip("_")
    return ".".join(part for part in (parent, stem) if part) or "layer"


def _tensor(program: fx.GraphModule, path: str) -> Tensor:
    parent, _, leaf = path.rpartition(".")
    found: Tensor = getattr(program.get_submodule(parent), leaf)
    return found


def _place(program: fx.GraphModule, path: str, layer: nn.Module) -> str:
    """Put a layer where its weights lie, which may be those of another one too; its path."""
    parent, _, leaf = path.rpartition(".")
    owner = program.get_submodule(parent)
    while type(getattr(owner, leaf, None)) is not nn.Module and hasattr(owner, leaf):
        leaf += f"_{type(layer).__name__.lower()}"
    if (old := getattr(owner, leaf, None)) is not None:
        _keep_the_rest(old, layer)
    owner.add_module(leaf, layer)
    return f"{parent}.{leaf}" if parent else leaf


def _keep_the_rest(old: nn.Module, layer: nn.Module) -> None:
    """What else lay there still lies there, for others that take it from there."""
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(old, kind).items():
            if not hasattr(layer, name):
                getattr(layer, kind)[name] = value


def _drop_unused(program: fx.GraphModule) -> None:
    for node in [each for each in program.graph.nodes if each.op == "get_attr" and not each.users]:
        program.graph.erase_node(node)


def _holding(layer: nn.Module, facts: Facts) -> nn.Module:
    """The layer, made on the meta device, with the tensors of the program."""
    for name in _TENSORS:
        value = facts.get(name)
        if name in layer._buffers:
            layer._buffers[name] = value
        elif name in layer._parameters:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            layer._parameters[name] = value
    return layer


def _linear(facts: Facts, _: fx.Node) -> nn.Module:
    out, given = facts["weight"].shape
    return _holding(nn.Linear(given, out, facts["bias"] is not None, device="meta"), facts)


def _embedding(facts: Facts, _: fx.Node) -> nn.Module:
    rows, width = facts["weight"].shape
    return _holding(nn.Embedding(rows, width, device="meta"), facts)


def _conv(facts: Facts, _: fx.Node) -> nn.Module:
    transposed = bool(facts.get("transposed", "output_padding" in facts))
    first, second, *size = facts["weight"].shape
    groups = facts["groups"]
    given, out = (first, second * groups) if transposed else (second * groups, first)
    names = ("stride", "padding", "dilation", *(["output_padding"] if transposed else []))
    options: Facts = {name: _wide(facts[name], len(size)) for name in names}
    options |= {"groups": groups, "bias": facts["bias"] is not None, "device": "meta"}
    kind: Any = _CONVS[len(size)][transposed]
    return _holding(kind(given, out, tuple(size), **options), facts)


def _wide(value: Any, sizes: int) -> Any:
    """One number for each size, where aten takes one for all."""
    if isinstance(value, str):
        return value
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    return found * sizes if len(found) == 1 else found


def _batch_norm(facts: Facts, node: fx.Node) -> nn.Module | None:
    sizes = getattr(node.meta.get("val"), "ndim", None)
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if sizes not in kind or facts["training"] or facts.get("running_mean") is None:
        return None
    made = kind[sizes](len(facts["running_mean"]), eps=facts["eps"], device="meta")
    made._buffers.pop("num_batches_tracked")
    return _holding(made, facts)


_MAKERS: dict[str, Maker] = {
    "linear": _linear,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "convolution": _conv,
    **{f"conv{sizes}d": _conv for sizes in _CONVS},
    **{f"conv_transpose{sizes}d": _conv for sizes in _CONVS},
}
