"""Which operations compute in which precision: a precision per operation class, or per layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast

from plinth.engine.errors import ConfigError, nearest

Precision = Literal["fp32", "bf16", "fp16", "int8", "int8_static", "int4"]

PRECISIONS: dict[str, str] = {
    "fp32": "float32",
    "bf16": "bfloat16 weights and arithmetic",
    "fp16": "float16 weights and arithmetic",
    "int8": "int8 weights with a scale per channel, int8 activations with a scale per row",
    "int8_static": "the same, but activations with one scale, from calibration rows",
    "int4": "4-bit weights with a scale per group of 32; float32 arithmetic unless a backend says",
}
"""Every precision, and what it means."""

Names = Sequence[str]


@dataclass(frozen=True, slots=True)
class PrecisionPolicy:
    """A precision per operation class, and per layer where one differs from its class.

    Written by class, ``PrecisionPolicy(matmul="bf16", conv="bf16")``, or as lists,
    ``PrecisionPolicy(bf16=["matmul", "conv"], int8=["embedding"])``; classes that neither
    names are fp32.

    Args:
        matmul: fully connected layers.
        conv: convolutions, transposed ones included.
        embedding: look-up tables.
        norm: batch, layer, group and RMS normalisation.
        softmax: softmax and the sigmoids.
        attention: products of activations with activations, as multi-head attention has them.
        recurrent: RNN, LSTM, GRU.
        activation: pointwise functions, pooling, dropout.
        last: the last layer with weights that runs, and every one that gives an output of the
            model as it is: they decide the rounding of the outputs.
        layers: precision by name of a layer; goes before its class and before ``last``.
        auto: a lower precision only if the device has it natively and a probe shows a gain.
        exact: the reference numerics, torch eager in fp32 (ONNX Runtime for ONNX files), and
            nothing chosen by what machine it is.
        name: what it is called in reports; by default made from what it says.
        fp32: classes in fp32; ``bf16``, ``fp16``, ``int8``, ``int8_static``, ``int4``: alike.

    Raises:
        ConfigError: an unknown class or precision, or a class that is named twice.
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
    layers: Mapping[str, Precision] = field(default_factory=dict, hash=False)
    auto: bool = False
    exact: bool = False
    name: str = ""
    fp32: InitVar[Names] = ()
    bf16: InitVar[Names] = ()
    fp16: InitVar[Names] = ()
    int8: InitVar[Names] = ()
    int8_static: InitVar[Names] = ()
    int4: InitVar[Names] = ()

    def __post_init__(self, *lists: Names) -> None:
        for op_class, precision in _listed(dict(zip(PRECISIONS, lists, strict=True))):
            own = getattr(self, op_class)
            if own not in ("fp32", precision):
                raise ConfigError(f"precision.{op_class} is {own} and in the list {precision}")
            object.__setattr__(self, op_class, precision)
        for name in CLASSES:
            _check_precision(name, getattr(self, name))
        for name, value in self.layers.items():
            _check_precision(f"layers.{name}", value)
        if not self.name:
            object.__setattr__(self, "name", self._made_name())

    def _made_name(self) -> str:
        if self.plain:
            return "fp32"
        used = [name for name in PRECISIONS if name in self.used]
        said = json.dumps([self.table(), sorted(self.layers.items())])
        return f"{'+'.join(used)}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"

    @property
    def used(self) -> frozenset[str]:
        """Every precision other than fp32 that some class or layer has."""
        of_classes = {getattr(self, name) for name in CLASSES}
        return frozenset(of_classes | set(self.layers.values())) - {"fp32"}

    @property
    def plain(self) -> bool:
        """Whether everything is fp32."""
        return not self.used

    def of(self, layer: str, op_class: str, *, last: bool = False) -> Precision:
        """The precision of a layer: its own, else that of the last layer, else of its class."""
        if layer in self.layers:
            return self.layers[layer]
        own = cast("Precision", getattr(self, op_class))
        return self.last if last and own != "fp32" else own

    def table(self) -> dict[str, str]:
        """The precision by operation class."""
        return {name: value for name, value in asdict(self).items() if name in CLASSES}

    def as_dict(self) -> dict[str, Any]:
        """The table that :meth:`from_table` reads, complete."""
        return {**self.table(), **({"layers": dict(self.layers)} if self.layers else {})}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> PrecisionPolicy:
        """A policy from a TOML table; classes that it does not name are fp32.

        Args:
            table: operation class -> precision, or precision -> list of classes; ``preset``
                names the policy to start from, ``layers`` is a table of layer -> precision.

        Raises:
            ConfigError: an unknown class or precision, with the nearest known one.
        """
        rest = dict(table)
        base = _preset(rest.pop("preset", "fp32"))
        layers = rest.pop("layers", {})
        if not isinstance(layers, Mapping):
            raise ConfigError(f"precision.layers is {layers!r}, expected a table of layers")
        lists = {key: rest.pop(key) for key in list(rest) if key in PRECISIONS}
        for op_class, precision in _listed(lists):
            if rest.setdefault(op_class, precision) != precision:
                raise ConfigError(
                    f"precision.{op_class} is {rest[op_class]} and in the list {precision}"
                )
        for key, value in rest.items():
            _check_class(f"precision.{key}", key)
            _check_precision(key, value)
        if not rest and not layers:
            return base
        return replace(base, **rest, layers={**base.layers, **layers}, auto=False, name="")


CLASSES = tuple(
    each.name
    for each in fields(PrecisionPolicy)
    if each.name not in ("layers", "auto", "exact", "name")
)


def resolve(policy: PrecisionPolicy | str | Mapping[str, Any]) -> PrecisionPolicy:
    """A policy from its preset's name or its table.

    Raises:
        ConfigError: unknown preset, class or precision.
    """
    if isinstance(policy, PrecisionPolicy):
        return policy
    return _preset(policy) if isinstance(policy, str) else PrecisionPolicy.from_table(policy)


def _listed(lists: Mapping[str, Names]) -> Iterator[tuple[str, str]]:
    seen: dict[str, str] = {}
    for precision, classes in lists.items():
        if isinstance(classes, str) or not isinstance(classes, Sequence):
            raise ConfigError(
                f"precision.{precision} is {classes!r}, expected a list of operation classes",
                hint=f'{precision} = ["matmul"]',
            )
        for op_class in classes:
            _check_class(f"{op_class!r} in precision.{precision}", op_class)
            if seen.setdefault(op_class, precision) != precision:
                raise ConfigError(
                    f"precision of {op_class} is in two lists, {seen[op_class]} and {precision}"
                )
            yield op_class, precision


def _preset(name: str) -> PrecisionPolicy:
    if name in PRESETS:
        return PRESETS[name]
    raise ConfigError(f"precision {name!r} is not a preset", hint=nearest(name, PRESETS))


def _check_class(where: str, name: str) -> None:
    if name not in CLASSES:
        raise ConfigError(f"{where} is not an operation class", hint=nearest(name, CLASSES))


def _check_precision(key: str, value: object) -> None:
    if not isinstance(value, str) or value not in PRECISIONS:
        raise ConfigError(
            f"precision.{key} is {value!r}, which is not a precision",
            hint=nearest(str(value), PRECISIONS),
        )


_COMPUTE = ("matmul", "conv", "embedding", "attention", "recurrent", "activation")
PRESETS = {
    "fp32": PrecisionPolicy(name="fp32"),
    "exact": PrecisionPolicy(name="exact", exact=True),
    "bf16": PrecisionPolicy(bf16=_COMPUTE, name="bf16"),
    "fp16": PrecisionPolicy(fp16=_COMPUTE, name="fp16"),
    "int8": PrecisionPolicy(int8=["matmul", "embedding"], name="int8"),
    "int8_static": PrecisionPolicy(int8_static=["matmul", "conv"], name="int8_static"),
    "int4": PrecisionPolicy(int4=["matmul"], name="int4"),
    "auto": PrecisionPolicy(bf16=_COMPUTE, auto=True, name="auto"),
}
"""Policies by name; a table may start from any of them."""
