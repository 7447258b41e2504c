"""How an ONNX graph is made to compute in the precisions of a policy, and what then ran.

int8 products here scale each row of activations by its own largest magnitude: a row's answer
does not depend on the rows it happens to share a batch with, as it would with one scale for the
batch. ``y = r * (round(x / r * 127) @ W8) * s``, with r the magnitude of the row, s the scale of
the output channel. Where the CPU adds pairs of products in 16 bits, as AVX2 does (vpmaddubsw),
weights have 7 bits, so that 255 * 63 * 2 still fits; :func:`saturates` finds out.
"""

from __future__ import annotations

import ast
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, from_numpy

from plinth.engine.errors import ConfigError, ModelError, nearest
from plinth.engine.models.onnx import session
from plinth.engine.precision.policy import CLASSES, PrecisionPolicy
from plinth.engine.precision.registry import handler, register

GROUP = 32
_TINY = 1e-30
_OWN = "com.microsoft"
_OP_CLASSES = {
    **dict.fromkeys(("MatMul", "Gemm"), "matmul"),
    **dict.fromkeys(("Conv", "ConvTranspose"), "conv"),
    "Gather": "embedding",
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent"),
}
_WEIGHT_PLACE = {"Gather": 0}


@dataclass(frozen=True, slots=True)
class OnnxLayer:
    """A node with weights: the layer it belongs to, its own name, class, and what it takes."""

    name: str
    node: str
    op_class: str
    parameters: int


@dataclass(slots=True)
class _Edit:
    """A graph while it is changed."""

    proto: Any
    weights: dict[str, Any]
    made: dict[str, str] = field(default_factory=dict)
    """Names of tensors that were made once for several readers."""

    def array(self, name: str) -> Any:
        import onnx

        return onnx.numpy_helper.to_array(self.weights[name])

    def constant(self, name: str, value: Any) -> str:
        import onnx

        if name not in self.made:
            self.made[name] = name
            self.proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name


def onnx_layers(path: Path) -> list[OnnxLayer]:
    """The nodes with weights of an ONNX file, in the order in which they run."""
    import onnx

    return _layers(onnx.load_model(str(path)))


def _layers(proto: Any) -> list[OnnxLayer]:
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in proto.graph.initializer}
    kinds = {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}
    floats = {t.name for t in proto.graph.initializer if t.data_type == 1}  # TensorProto.FLOAT
    found: list[OnnxLayer] = []
    seen: Counter[str] = Counter()
    for number, node in enumerate(proto.graph.node):
        op_class = _OP_CLASSES.get(node.op_type)
        weight = node.input[_WEIGHT_PLACE.get(node.op_type, 1)] if len(node.input) > 1 else ""
        if op_class is None or weight not in floats or kinds[weight] < 2:
            continue
        node.name = node.name or f"{node.op_type}_{number}"
        name = _scope(node) or node.name
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}:{seen[name]}"
        found.append(OnnxLayer(name, node.name, op_class, sizes[weight]))
    return found


def _scope(node: Any) -> str:
    """The path of the layer that a node was exported from; empty where the file does not say."""
    said = next((m.value for m in node.metadata_props if m.key.endswith("name_scopes")), "[]")
    try:
        scopes = [str(part) for part in ast.literal_eval(said)]
    except (ValueError, SyntaxError):
        return ""
    return scopes[-2].removeprefix("module").lstrip(".") if len(scopes) > 1 else ""


def _last(proto: Any, layers: list[OnnxLayer]) -> set[str]:
    """Nodes with weights whose output leaves the graph as it is, and the last one that runs."""
    given = {value.name for value in proto.graph.output}
    products = [layer for layer in layers if layer.op_class != "embedding"] or layers
    named = {layer.node for layer in layers}
    passing = ("Add", "Reshape", "Squeeze", "Identity")
    for node in reversed(proto.graph.node):
        if node.op_type in passing and given & set(node.output):
            given |= set(node.input)
    leaving = {n.name for n in proto.graph.node if n.name in named and given & set(n.output)}
    return leaving | {products[-1].node} if products else leaving


def realise(
    source: Path,
    target: Path,
    policy: PrecisionPolicy,
    calibration: Mapping[str, Tensor] | None = None,
    ranges: Path | None = None,
) -> dict[str, str]:
    """Write an ONNX file that computes as the policy says. Returns precision by layer.

    Args:
        source: the float32 file.
        target: the new one.
        policy: what to compute in what.
        calibration: rows (n, ...) by input name for ``int8_static``: their activations give
            the scales.
        ranges: where the ranges of activations are kept; those of a call before, with the same
            source and calibration, are taken as they are.

    Raises:
        ConfigError: a layer that is not there, or a class in a precision that ONNX Runtime has
            no kernel for.
        ModelError: ``int8_static`` without calibration rows.
    """
    import onnx

    proto = onnx.load_model(str(source))
    layers = _layers(proto)
    plan = _plan(proto, layers, policy)
    for layer in layers:
        handler("onnx", layer.op_class, plan[layer.name])
    static = [layer.node for layer in layers if plan[layer.name] == "int8_static"]
    if static:
        proto = _static(proto, static, calibration, ranges)
    edit = _Edit(proto, {tensor.name: tensor for tensor in proto.graph.initializer})
    nodes = {layer.node: layer for layer in layers}
    new: list[Any] = []
    for node in proto.graph.node:
        found = nodes.get(node.name)
        precision = plan[found.name] if found and node.name not in static else "fp32"
        if found is None or precision == "fp32":
            new.append(node)
        else:
            new.extend(handler("onnx", found.op_class, precision)(edit, node))
    del proto.graph.node[:]
    proto.graph.node.extend(new)
    _drop_unused(proto)
    _need_contrib(proto)
    onnx.save_model(proto, str(target))
    return plan


class Switched:
    """An ONNX file in which the layers of a policy compute either way, as each run says.

    It takes one input more: for each of these layers, whether it computes as the policy says or
    in float32. Every layer has both sets of weights.

    Args:
        source: the float32 file.
        target: where the file is made.
        policy: what to compute in what, where it is switched on; not ``int8_static``.
        threads: of a run.

    Attributes:
        layers: names of those that can be switched.
    """

    INPUT = "plinth/low"

    def __init__(
        self, source: Path, target: Path, policy: PrecisionPolicy, threads: int | None
    ) -> None:
        import onnx

        proto = onnx.load_model(str(source))
        layers = _layers(proto)
        plan = _plan(proto, layers, policy)
        nodes = {layer.node: layer for layer in layers if plan[layer.name] != "fp32"}
        self.layers = [layer.name for layer in nodes.values()]
        edit = _Edit(proto, {tensor.name: tensor for tensor in proto.graph.initializer})
        new: list[Any] = []
        for node in proto.graph.node:
            if node.name not in nodes:
                new.append(node)
                continue
            layer = nodes[node.name]
            realised = handler("onnx", layer.op_class, plan[layer.name])
            new.extend(_either(edit, node, realised, self.layers.index(layer.name)))
        del proto.graph.node[:]
        proto.graph.node.extend(new)
        given = onnx.helper.make_tensor_value_info(
            self.INPUT, onnx.TensorProto.BOOL, [len(self.layers)]
        )
        proto.graph.input.append(given)
        _need_contrib(proto)
        onnx.save_model(proto, str(target))
        self._outputs = [value.name for value in proto.graph.output]
        self._session = session(target, threads)

    def taking(self, low: Iterable[str]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """What runs rows with these layers as the policy says, and the others in float32."""
        chosen = set(low)
        switches = np.array([name in chosen for name in self.layers], bool)

        def run(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            feeds = {name: tensor.numpy(force=True) for name, tensor in rows.items()}
            found = self._session.run(self._outputs, feeds | {self.INPUT: switches})
            return {
                name: from_numpy(array) for name, array in zip(self._outputs, found, strict=True)
            }

        return run


def _either(
    edit: _Edit, node: Any, realised: Callable[[_Edit, Any], Iterable[Any]], place: int
) -> list[Any]:
    """A node both ways, and the switch at a place of the input that says which one runs."""
    import onnx

    branches = []
    for way in ("low", "high"):
        own = onnx.NodeProto()
        own.CopyFrom(node)
        own.output[0] = f"{node.output[0]}/{way}"
        # What one branch makes of its inputs no other one sees; constants are everybody's.
        edit.made = {t.name: t.name for t in edit.proto.graph.initializer}
        nodes = list(realised(edit, own)) if way == "low" else [own]
        floats = onnx.helper.make_tensor_value_info(own.output[0], onnx.TensorProto.FLOAT, None)
        branches.append(onnx.helper.make_graph(nodes, own.output[0], [], [floats]))
    index = edit.constant(f"{Switched.INPUT}/{place}", np.array(place, np.int64))
    chosen = f"{node.output[0]}/chosen"
    return [
        _node("Gather", [Switched.INPUT, index], [chosen]),
        _node(
            "If",
            [chosen],
            [node.output[0]],
            then_branch=branches[0],
            else_branch=branches[1],
        ),
    ]


def plan_of(path: Path, policy: PrecisionPolicy) -> tuple[dict[str, str], dict[str, str]]:
    """Precision by layer under a policy, and the node of each layer, of an ONNX file.

    Raises:
        ConfigError: the policy names a layer that is not there.
    """
    import onnx

    proto = onnx.load_model(str(path))
    layers = _layers(proto)
    return _plan(proto, layers, policy), {layer.name: layer.node for layer in layers}


def _plan(proto: Any, layers: list[OnnxLayer], policy: PrecisionPolicy) -> dict[str, str]:
    names = [layer.name for layer in layers]
    for name in policy.layers:
        if name not in names:
            raise ConfigError(
                f"precision.layers.{name} is not a layer with weights", hint=nearest(name, names)
            )
    last = _last(proto, layers)
    return {
        layer.name: policy.of(layer.name, layer.op_class, last=layer.node in last)
        for layer in layers
    }


@register("onnx", [name for name in CLASSES if name != "last"], ["fp32"])
def _unchanged(_: _Edit, node: Any) -> list[Any]:
    return [node]


@register("onnx", ["matmul", "conv"], ["int8_static"])
def _by_library(_: _Edit, node: Any) -> list[Any]:
    """Done by ONNX Runtime's own quantiser, for all nodes at once; see ``_static``."""
    return [node]


@register("onnx", ["matmul"], ["int8"])
def _int8_product(edit: _Edit, node: Any) -> Iterator[Any]:
    weight, bias, finish = _product(edit, node)
    limit = 63 if saturates() else 127
    scale = np.maximum(np.abs(weight).max(axis=0), _TINY) / limit
    quantised = np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8)
    rows, magnitudes, more = _by_row(edit, node.input[0])
    yield from more
    name = node.name
    inputs = [
        rows,
        edit.constant(f"{name}/w", quantised),
        edit.constant("plinth/step", np.array(1 / 127, np.float32)),
        edit.constant(f"{name}/s", scale.astype(np.float32)),
        edit.constant("plinth/middle", np.array(128, np.uint8)),
        edit.constant(f"{name}/z", np.zeros(len(scale), np.int8)),
    ]
    yield _node("MatMulIntegerToFloat", inputs, [f"{name}/y"], name, domain=_OWN)
    yield _node("Mul", [f"{name}/y", magnitudes], [finish], f"{name}/scale")
    if bias:
        yield _node("Add", [finish, bias], [node.output[0]], f"{name}/bias")


@cache
def saturates() -> bool:
    """Whether int8 products overflow on this CPU: 16 times 255 * 127 is not what it should be."""
    import onnx

    values: dict[str, Any] = {
        "w": np.full((16, 1), 127, np.int8),
        "one": np.array(1, np.float32),
        "s": np.ones(1, np.float32),
        "za": np.array(0, np.uint8),
        "zw": np.zeros(1, np.int8),
    }
    node = _node("MatMulIntegerToFloat", ["x", "w", "one", "s", "za", "zw"], ["y"], domain=_OWN)
    make = onnx.helper
    graph = make.make_graph(
        [node],
        "probe",
        [make.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1, 16])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [make.make_opsetid("", 17), make.make_opsetid(_OWN, 1)]
    proto = make.make_model(graph, opset_imports=opsets, ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save_model(proto, str(path))
        found = session(path, 1).run(None, {"x": np.full((1, 16), 255, np.uint8)})[0]
    return float(found[0, 0]) != 16.0 * 255 * 127


def _by_row(edit: _Edit, tensor: str) -> tuple[str, str, list[Any]]:
    """Rows of activations as uint8 around 128, their magnitudes, and the nodes that make both."""
    quantised, magnitude = f"{tensor}/q", f"{tensor}/r"
    if quantised in edit.made:
        return quantised, magnitude, []
    edit.made[quantised] = quantised
    axes = edit.constant("plinth/last_axis", np.array([-1], np.int64))
    tiny = edit.constant("plinth/tiny", np.array(_TINY, np.float32))
    step = edit.constant("plinth/step", np.array(1 / 127, np.float32))
    middle = edit.constant("plinth/middle", np.array(128, np.uint8))
    high, low = f"{tensor}/high", f"{tensor}/low"
    return (
        quantised,
        magnitude,
        [
            _extreme(edit, "ReduceMax", tensor, high, axes),
            _extreme(edit, "ReduceMin", tensor, low, axes),
            _node("Neg", [low], [f"{low}/n"]),
            _node("Max", [high, f"{low}/n", tiny], [magnitude]),
            _node("Div", [tensor, magnitude], [f"{tensor}/unit"]),
            _node("QuantizeLinear", [f"{tensor}/unit", step, middle], [quantised]),
        ],
    )


def _extreme(edit: _Edit, kind: str, tensor: str, output: str, axes: str) -> Any:
    opset = next(o.version for o in edit.proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset >= 18:
        return _node(kind, [tensor, axes], [output], keepdims=1)
    return _node(kind, [tensor], [output], keepdims=1, axes=[-1])


@register("onnx", ["matmul"], ["int4"])
def _int4_product(edit: _Edit, node: Any) -> Iterator[Any]:
    """4-bit weights, -8 to 7 times the scale of their group, and int8 arithmetic."""
    weight, bias, finish = _product(edit, node)
    depth, width = weight.shape
    groups = -(-depth // GROUP)
    padded = np.zeros((width, groups * GROUP), np.float32)
    padded[:, :depth] = weight.T
    parts = padded.reshape(width, groups, GROUP)
    peak = np.take_along_axis(parts, np.abs(parts).argmax(2)[..., None], 2)
    scale = np.where(peak == 0, 1, peak / -8)
    codes = np.clip(np.rint(parts / scale) + 8, 0, 15).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    name = node.name
    inputs = [
        node.input[0],
        edit.constant(f"{name}/w", packed),
        edit.constant(f"{name}/s", scale[..., 0].astype(np.float32)),
    ]
    facts = {"K": depth, "N": width, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
    yield _node("MatMulNBits", inputs, [finish], name, domain=_OWN, **facts)
    if bias:
        yield _node("Add", [finish, bias], [node.output[0]], f"{name}/bias")


@register("onnx", ["embedding"], ["int8"])
def _int8_table(edit: _Edit, node: Any) -> Iterator[Any]:
    """An int8 table with a scale for each of its rows."""
    table = edit.array(node.input[0])
    axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
    if axis != 0 or table.ndim != 2:
        yield node
        return
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), _TINY) / 127
    quantised = np.rint(table / scale).astype(np.int8)
    name = node.name
    stored = edit.constant(f"{name}/w", quantised)
    scales = edit.constant(f"{name}/s", scale.astype(np.float32))
    yield _node("Gather", [stored, node.input[1]], [f"{name}/q"], name)
    yield _node("Gather", [scales, node.input[1]], [f"{name}/row"], f"{name}/scales")
    yield _node("Cast", [f"{name}/q"], [f"{name}/f"], f"{name}/cast", to=1)
    yield _node("Mul", [f"{name}/f", f"{name}/row"], [node.output[0]], f"{name}/scale")


def _product(edit: _Edit, node: Any) -> tuple[Any, str, str]:
    """The weight (in, out) of a MatMul or Gemm, its bias, and the name of what has no bias yet."""
    weight = edit.array(node.input[1])
    facts = {a.name: a for a in node.attribute}
    if node.op_type == "MatMul":
        return weight, "", node.output[0]
    if "transB" in facts and facts["transB"].i:
        weight = weight.T
    if "alpha" in facts:
        weight = weight * facts["alpha"].f
    if "transA" in facts and facts["transA"].i:
        raise ModelError(f"node {node.name} multiplies columns, which has no int8 here")
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias and "beta" in facts and facts["beta"].f != 1:
        raise ModelError(f"node {node.name} scales its bias, which has no int8 here")
    return weight, bias, f"{node.name}/product" if bias else node.output[0]


def _node(kind: str, inputs: list[str], outputs: list[str], name: str = "", **facts: Any) -> Any:
    import onnx

    return onnx.helper.make_node(
        kind, inputs, outputs, name=name or f"{outputs[0]}/{kind}", **facts
    )


def _static(
    proto: Any, nodes: list[str], rows: Mapping[str, Tensor] | None, ranges: Path | None
) -> Any:
    """Quantised by ONNX Runtime's own tool: QDQ, weights per channel, ranges from the rows."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    if rows is None:
        raise ModelError(
            "int8_static needs calibration rows, which give the scales of activations",
            hint="give the model example rows: Engine.add(..., example=...), or use int8",
        )
    count = len(next(iter(rows.values())))
    arrays = {name: tensor.numpy(force=True) for name, tensor in rows.items()}
    feeds = iter([{n: a[i : i + 1] for n, a in arrays.items()} for i in range(count)])

    class Rows:
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    kinds = {*_OP_CLASSES} & {node.op_type for node in proto.graph.node}
    kinds -= {"Gather", "LSTM", "GRU", "RNN"}  # the same for any nodes, as kept ranges must be
    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save_model(proto, str(before))
        quantize_static(
            str(before),
            str(after),
            Rows(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted(kinds),
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=saturates(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibration_cache_path=None if ranges is None else str(ranges),
        )
        return onnx.load_model(str(after))


class _quiet:
    """The library warns about steps of its own that do not matter here."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)


def _drop_unused(proto: Any) -> None:
    used = {name for node in proto.graph.node for name in node.input}
    used |= {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _need_contrib(proto: Any) -> None:
    import onnx

    if all(opset.domain != _OWN for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(_OWN, 1))


@dataclass(frozen=True, slots=True)
class Profile:
    """What ran, by ONNX Runtime's own profile.

    Args:
        kernels: how often each kernel ran, such as ``MatMulIntegerToFloat``.
        flops: share of the multiplications and additions of products and convolutions, by what
            their kernel computes in.
        seconds: by name of the node, of one run.
    """

    kernels: dict[str, int]
    flops: dict[str, float]
    seconds: dict[str, float]


def profile(path: Path, rows: Mapping[str, Tensor], threads: int | None = 1) -> Profile:
    """Run rows once with the profiler on, after a run without it.

    Args:
        path: the ONNX file.
        rows: rows (n, ...) by input name.
        threads: of the run.
    """
    feeds = {name: tensor.numpy(force=True) for name, tensor in rows.items()}
    with tempfile.TemporaryDirectory() as folder:
        ran = session(path, threads, Path(folder) / "profile")
        ran.run(None, feeds)
        ran.run(None, feeds)
        events = json.loads(Path(ran.end_profiling()).read_text())
    kernels: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for event in events:
        facts = event.get("args") or {}
        kind = facts.get("op_name")
        if event.get("cat") != "Node" or kind is None or "output_type_shape" not in facts:
            continue
        kernels[kind] += 1
        seconds[event["name"].removesuffix("_kernel_time")] += event["dur"] / 1e6
        if kind in _WORK:
            flops[_computes_in(kind, facts)] += _WORK[kind](facts)
    total = sum(flops.values())
    shares = {name: value / total for name, value in flops.items()} if total else {}
    halves = {name: count // 2 for name, count in kernels.items()}
    return Profile(halves, shares, {name: value / 2 for name, value in seconds.items()})


def _shapes(facts: Mapping[str, Any], side: str) -> list[list[int]]:
    return [next(iter(each.values())) for each in facts[f"{side}_type_shape"]]


def _of_product(facts: Mapping[str, Any]) -> int:
    return 2 * int(np.prod(_shapes(facts, "output")[0])) * int(_shapes(facts, "input")[0][-1])


def _of_conv(place: int) -> Callable[[Mapping[str, Any]], int]:
    def count(facts: Mapping[str, Any]) -> int:
        weight = _shapes(facts, "input")[place]
        return 2 * int(np.prod(_shapes(facts, "output")[0])) * int(np.prod(weight[1:]))

    return count


def _of_transposed(facts: Mapping[str, Any]) -> int:
    given = _shapes(facts, "input")
    return 2 * int(np.prod(given[0])) * int(np.prod(given[1][1:]))


def _of_recurrent(gates: int) -> Callable[[Mapping[str, Any]], int]:
    """From the rows and what comes out: weights that were packed before have no shape there."""

    def count(facts: Mapping[str, Any]) -> int:
        steps, rows, features = _shapes(facts, "input")[0]
        *_, directions, _, hidden = _shapes(facts, "output")[0]
        return 2 * steps * rows * directions * gates * hidden * (features + hidden)

    return count


_WORK: dict[str, Callable[[Mapping[str, Any]], int]] = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger"), _of_product),
    **dict.fromkeys(
        ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"), _of_product
    ),
    **dict.fromkeys(("QGemm", "MatMulNBits"), _of_product),
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv"), _of_conv(1)),
    "QLinearConv": _of_conv(3),
    "ConvTranspose": _of_transposed,
    "LSTM": _of_recurrent(4),
    "GRU": _of_recurrent(3),
    "RNN": _of_recurrent(1),
}


def _computes_in(kind: str, facts: Mapping[str, Any]) -> str:
    if kind == "MatMulNBits":
        return "int4"
    if "Integer" in kind or kind.startswith(("Q", "Dynamic")):
        return "int8"
    first = next(iter(facts["input_type_shape"][0]))
    return {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(first, str(first))
