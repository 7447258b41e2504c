"""Which operations compute in which precision: a precision per operation class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast

from plinth.engine.errors import ConfigError, nearest

Precision = Literal["fp32", "bf16"]

PRECISIONS = ("fp32", "bf16")
RESERVED = ("fp16", "int8")


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
        last: the last layer with weights that runs, and every one that gives an output of the
            model as it is: they decide the rounding of the outputs.
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
