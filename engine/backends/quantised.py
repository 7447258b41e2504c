"""A model's ONNX file in the precisions of a policy: made once, kept in a cache.

ONNX Runtime runs such a file as it is. For OpenVINO the graph is quantised by NNCF.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from plinth.distribution import version
from plinth.engine.backends.export import onnx_file
from plinth.engine.cache import cache_folder, keep_bound, used
from plinth.engine.errors import ModelError
from plinth.engine.models.digest import digest
from plinth.engine.models.store import Model
from plinth.engine.precision.onnx_graph import (
    Switched,
    onnx_layers,
    plan_of,
    profile,
    realise,
    saturates,
)
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy
from plinth.engine.precision.transforms import report

CALIBRATION_ROWS = 128
TORCH_BACKENDS = ("eager", "inductor", "aotinductor")
FORMAT = "1"  # of what is kept in the cache
_SCRATCH: ContextVar[Path | None] = ContextVar("plinth_quantised_scratch", default=None)


@contextmanager
def scratch(folder: Path) -> Iterator[None]:
    """Make files in this folder inside the block, and keep nothing of them in the cache."""
    token = _SCRATCH.set(folder)
    try:
        yield
    finally:
        _SCRATCH.reset(token)


def quantised_file(model: Model, policy: PrecisionPolicy) -> tuple[Path, dict[str, str]]:
    """The model's ONNX file in the precisions of a policy, and the precision of each layer.

    Calibration rows are the model's example rows, 128 of them at most.

    Raises:
        ConfigError: a layer that is not there, or a class in a precision without a kernel.
        ModelError: it cannot be exported, or ``int8_static`` without example rows.
    """
    source = onnx_file(model)
    rows = calibration_rows(model) if "int8_static" in policy.used else None
    path = _place() / f"{_key(source, policy, rows)}.onnx"
    facts = path.with_suffix(".json")
    if path.is_file() and facts.is_file():
        used(path)
        return path, dict(json.loads(facts.read_text()))
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
        new = Path(folder) / "model.onnx"
        plan = realise(source, new, policy, rows, _ranges(source, rows))
        (Path(folder) / "plan.json").write_text(json.dumps(plan))
        (Path(folder) / "plan.json").replace(facts)
        new.replace(path)
    keep_bound()
    return path, plan


def openvino_file(model: Model, policy: PrecisionPolicy, graph: Any) -> tuple[Path, dict[str, str]]:
    """A graph quantised by NNCF, as ``.xml`` with a ``.bin`` beside it, and what each layer is in.

    Args:
        model: the model, with example rows.
        policy: layers in ``int8_static``; all others stay as they are.
        graph: its ``openvino.Model``; changed.

    Raises:
        ConfigError: the policy names a layer that is not there.
        ModelError: the model has no example rows.
    """
    import openvino

    source, rows = onnx_file(model), calibration_rows(model)
    if rows is None:
        raise ModelError(
            "int8_static needs calibration rows, which give the scales of activations",
            hint="give the model example rows: Engine.add(..., example=...), or use int8",
        )
    plan, nodes = plan_of(source, policy)
    path = _place() / f"{_key(source, policy, rows)}.xml"
    if not path.is_file():
        kept = [nodes[layer] for layer, precision in plan.items() if precision != "int8_static"]
        with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
            new = Path(folder) / "model.xml"
            openvino.save_model(_by_nncf(graph, rows, kept), str(new), compress_to_fp16=False)
            new.with_suffix(".bin").replace(path.with_suffix(".bin"))
            new.replace(path)
        keep_bound()
    used(path)
    return path, plan


def _by_nncf(graph: Any, rows: Mapping[str, Tensor], kept: list[str]) -> Any:
    """Post-training quantisation, symmetric weights per channel; ``kept`` nodes stay float."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)

    count = len(next(iter(rows.values())))
    arrays = {name: tensor.numpy(force=True) for name, tensor in rows.items()}
    single = [{n: a[i : i + 1] for n, a in arrays.items()} for i in range(count)]
    patterns = [f"{re.escape(node)}(/.*)?" for node in kept]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return nncf.quantize(
            graph,
            nncf.Dataset(single),
            subset_size=count,
            ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
            model_type=nncf.ModelType.TRANSFORMER if _attends(graph) else None,
            # Where sums of two products overflow, weights get half their range everywhere.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.DISABLE,
                # Its own choice, means of ranges, cuts off the largest activations.
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            ),
        )


def _attends(graph: Any) -> bool:
    """Whether a graph has attention, whose masks and sums NNCF leaves in float if it is told so."""
    return any(
        op.get_type_name() in ("Softmax", "ScaledDotProductAttention") for op in graph.get_ops()
    )


def calibration_rows(model: Model) -> dict[str, Tensor] | None:
    """Rows that give the ranges of activations; ``None`` where there are no real ones."""
    if model.example is None:
        return None
    return {name: tensor[:CALIBRATION_ROWS] for name, tensor in model.example.items()}


def _place() -> Path:
    return _SCRATCH.get() or cache_folder("quantised")


def _ranges(source: Path, rows: Mapping[str, Tensor] | None) -> Path | None:
    """Where ranges of activations are kept while a search tries one set of layers after another."""
    folder = _SCRATCH.get()
    return None if folder is None else folder / f"{_key(source, PRESETS['fp32'], rows)}.ranges"


def _key(source: Path, policy: PrecisionPolicy, rows: Mapping[str, Tensor] | None) -> str:
    with source.open("rb") as file:
        key = hashlib.file_digest(file, "sha256")
    versions = [version(name) for name in ("onnx", "onnxruntime")]
    facts = (FORMAT, *versions, json.dumps(policy.as_dict(), sort_keys=True), str(saturates()))
    key.update("\n".join(facts).encode())
    if rows is not None:
        key.update(digest(dict(sorted(rows.items()))).encode())
    return key.hexdigest()


def switched(
    backend: str, model: Model, policy: PrecisionPolicy, threads: int | None
) -> Switched | None:
    """A graph that computes layers either way; ``None`` where a backend has none of a policy."""
    if backend != "onnxruntime" or "int8_static" in policy.used:
        return None
    with tempfile.TemporaryDirectory(prefix=".new-", dir=_place()) as folder:
        return Switched(onnx_file(model), Path(folder) / "switched.onnx", policy, threads)


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """A layer with weights, by the name that a policy knows it by, and what it takes in fp32."""

    name: str
    op_class: str
    seconds: float


def layers_of(backend: str, model: Model, threads: int | None = 1) -> list[NamedLayer]:
    """The layers with weights as a backend names them, with seconds of a run in float32.

    Seconds are ONNX Runtime's own profile; where there is no ONNX file, parameters stand in.
    """
    if backend in TORCH_BACKENDS:
        weights = dict(model.module.named_modules())
        return [
            NamedLayer(layer.name, layer.op_class, float(count))
            for layer in report(model.module, PRESETS["fp32"])
            if (count := sum(p.numel() for p in weights[layer.name].parameters()))
        ]
    path = onnx_file(model)
    seconds = profile(path, model.rows(8), threads).seconds
    found = onnx_layers(path)
    spent = {
        layer.node: sum(s for name, s in seconds.items() if _is_of(name, layer.node))
        for layer in found
    }
    known = sum(layer.parameters for layer in found if spent[layer.node]) or 1
    per_parameter = sum(spent.values()) / known
    return [
        NamedLayer(
            layer.name, layer.op_class, spent[layer.node] or layer.parameters * per_parameter
        )
        for layer in found
    ]


def _is_of(ran: str, node: str) -> bool:
    """Whether a kernel's name is that of a node, or of what it was fused into."""
    return ran == node or ran.startswith((f"{node}/", f"{node}_fused"))
