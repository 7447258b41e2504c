"""A vertical made of any model's contract, so that a model is served without writing one.

A record has the model's inputs by name, as JSON numbers nested like one row; where the features
of a row have names, it has those. An answer has the outputs by name. Where the model takes missing
values, ``null`` stands for one; it is NaN in the row.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import orjson
import torch
from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor

from plinth.engine import Call, ConfigError, Flow, InputError, Model, Sla, TensorSpec
from plinth.verticals import Vertical

ACTION = "predict"
_FREE = 32  # the size of free dimensions in the example


class ServedModel(Vertical[BaseModel, BaseModel]):
    """One model as a vertical; :func:`served` makes a subclass with the model's types."""

    action = ACTION
    model: ClassVar[Model]
    features: ClassVar[tuple[str, ...]]
    missing: ClassVar[frozenset[int]]

    def models(self) -> Sequence[Model]:
        return [self.model]

    def example(self) -> BaseModel:
        """A record of the model's own example row, else of made-up numbers."""
        spec, given = self.model.spec, self.model.example
        rows = spec.example(1, free=_FREE) if given is None else given
        values = [rows[tensor.name][0].tolist() for tensor in spec.inputs]
        names = [tensor.name for tensor in spec.inputs]
        if self.features:
            names, values = list(self.features), values[0]
        assert self.request is not None
        return self.request.model_validate(dict(zip(names, values, strict=True)))

    def infer(self, requests: Sequence[BaseModel]) -> Flow[list[BaseModel | InputError]]:
        """Rows of one shape run together; a row that is no rectangle is refused alone."""
        results: list[Any] = [None] * len(requests)
        groups: dict[tuple[Any, ...], list[tuple[int, list[np.ndarray[Any, Any]]]]] = {}
        for place, request in enumerate(requests):
            try:
                row = self._row(request)
            except InputError as error:
                results[place] = error
                continue
            groups.setdefault(tuple(array.shape for array in row), []).append((place, row))
        for group in groups.values():
            outputs = yield Call(self.model.spec.name, self._rows([row for _, row in group]))
            for (place, _), answer in zip(group, self._answers(outputs, len(group)), strict=True):
                results[place] = answer
        return results

    def encode(self, result: BaseModel) -> bytes:
        return orjson.dumps(dict(zip(self._outputs(), result.__dict__.values(), strict=True)))

    def _outputs(self) -> list[str]:
        return [tensor.name for tensor in self.model.spec.outputs]

    def _row(self, request: BaseModel) -> list[np.ndarray[Any, Any]]:
        """The row of a record, one array for each input.

        Raises:
            InputError: the lists of an input of free sizes differ in length.
        """
        inputs = self.model.spec.inputs
        if self.features:
            return [np.array(list(request.__dict__.values()), _numpy(inputs[0].dtype))]
        if self.missing:
            self._check_missing(request)
        arrays = []
        for tensor, value in zip(inputs, request.__dict__.values(), strict=True):
            try:
                array = np.array(value, _numpy(tensor.dtype))
            except ValueError:
                raise InputError(
                    f"{tensor.name}: its lists differ in length",
                    field=tensor.name,
                    hint="send a rectangle: lists of one length at each depth",
                    reason="ragged",
                ) from None
            arrays.append(array)
        return arrays

    def _check_missing(self, request: BaseModel) -> None:
        """Raises InputError where a number is missing that the model needs."""
        (values,) = request.__dict__.values()
        for place, value in enumerate(values):
            if value is None and place not in self.missing:
                name = f"{self.model.spec.inputs[0].name}.{place}"
                raise InputError(
                    f"{name}: the model takes no missing value here",
                    field=name,
                    hint="send a number",
                )

    def _rows(self, rows: list[list[np.ndarray[Any, Any]]]) -> dict[str, Tensor]:
        return {
            tensor.name: torch.from_numpy(np.stack([row[number] for row in rows])).to(
                getattr(torch, tensor.dtype)
            )
            for number, tensor in enumerate(self.model.spec.inputs)
        }

    def _answers(
        self, outputs: Tensor | Mapping[str, Tensor], count: int
    ) -> list[BaseModel | InputError]:
        """One answer for each row; numbers that JSON does not have are not sent as others."""
        names = self._outputs()
        given = {names[0]: outputs} if isinstance(outputs, Tensor) else outputs
        answers: list[BaseModel | InputError] = []
        kept = {name: (given[name], _finite(given[name])) for name in names}
        for row in range(count):
            odd = [name for name, (_, finite) in kept.items() if not finite[row]]
            if odd:
                answers.append(
                    InputError(
                        f"the model's output {odd[0]} is infinite or not a number for this record",
                        hint="are the values in the range that the model was trained on?",
                        reason="not_finite",
                    )
                )
                continue
            values: dict[str, Any] = {
                f"o{number}": kept[name][0][row].tolist() for number, name in enumerate(names)
            }
            answers.append(self.response.model_construct(**values))
        return answers


def served(
    model: Model,
    *,
    name: str | None = None,
    sla: Sla | None = None,
    features: Sequence[str] = (),
    missing: Collection[int] = (),
) -> ServedModel:
    """A vertical that serves one model.

    Args:
        model: any model whose inputs are numbers.
        name: of the vertical, and so of its route; by default made from the model's.
        sla: the promise; by default none.
        features: names of the numbers of a row, where the only input is a list of them.
        missing: places in such a row that may be ``null``.

    Raises:
        ConfigError: the features do not fit the input, or a name stands twice.
    """
    called = vertical_name(name or model.spec.name)
    _check_features(model, features)
    kind = type(
        "Served",
        (ServedModel,),
        {
            "__doc__": f"{model.spec.name} {model.spec.version}",
            "__module__": __name__,
            "name": called,
            "summary": _summary(model),
            "request": _request(model, features, missing),
            "response": _response(model),
            "sla": sla or Sla(),
            "heavy": model.spec.free,
            "model": model,
            "features": tuple(features),
            "missing": frozenset(missing),
        },
    )
    return kind()  # type: ignore[no-any-return]


def vertical_name(name: str) -> str:
    """A name that a route and a table can have: ``risk-lr.2`` becomes ``risk_lr_2``."""
    found = re.sub(r"[^a-z0-9_]", "_", name.lower())
    return found if re.match(r"[a-z]", found) else f"m{found}"


def _summary(model: Model) -> str:
    spec = model.spec
    words = " ".join(spec.description.split())
    return words or f"Model {spec.name}, version {spec.version}."


def _check_features(model: Model, features: Sequence[str]) -> None:
    if not features:
        return
    spec = model.spec
    twice = sorted({name for name in features if list(features).count(name) > 1})
    if twice:
        raise ConfigError(f"the feature {twice[0]!r} stands twice", hint="give each another name")
    shapes = [tensor.shape for tensor in spec.inputs]
    if shapes != [(len(features),)]:
        takes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in spec.inputs)
        raise ConfigError(
            f"{len(features)} features are named, but model {spec.name} takes {takes}",
            hint="name as many features as its only input has numbers, in their order",
        )


def _request(model: Model, features: Sequence[str], missing: Collection[int]) -> type[BaseModel]:
    inputs = model.spec.inputs
    if features:
        number = _number(inputs[0])
        fields = [
            (feature, number | None if place in missing else number)
            for place, feature in enumerate(features)
        ]
    elif missing:
        fields = [(inputs[0].name, _nested(inputs[0], _number(inputs[0]) | None))]
    else:
        fields = [(tensor.name, _nested(tensor, _number(tensor))) for tensor in inputs]
    return _typed("Record", "f", fields, f"One row for {model.spec.name}.")


def _response(model: Model) -> type[BaseModel]:
    fields = [(t.name, _nested(t, _plain(t.dtype))) for t in model.spec.outputs]
    return _typed("Prediction", "o", fields, f"What {model.spec.name} says of one row.")


def _typed(name: str, prefix: str, fields: Sequence[tuple[str, Any]], doc: str) -> type[BaseModel]:
    """A pydantic type whose fields may be called anything: JSON has their names as aliases."""
    made: dict[str, Any] = {
        f"{prefix}{number}": (kind, Field(alias=alias))
        for number, (alias, kind) in enumerate(fields)
    }
    kind: type[BaseModel] = create_model(
        name, __config__=ConfigDict(extra="forbid", serialize_by_alias=True), __doc__=doc, **made
    )
    return kind


def _nested(tensor: TensorSpec, inner: Any) -> Any:
    """Lists of numbers like one row of a tensor."""
    for size in reversed(tensor.shape):
        low, high = (1, None) if size is None else (size, size)
        inner = Annotated[list[inner], Field(min_length=low, max_length=high)]
    return inner


def _number(tensor: TensorSpec) -> Any:
    """A number that the tensor's dtype holds; text and booleans are none."""
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    if dtype is torch.bool:
        return Annotated[bool, Field(strict=True)]
    if dtype.is_floating_point:
        most = min(torch.finfo(dtype).max, sys.float_info.max)
        return Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-most, le=most)]
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if tensor.bounds is not None:
        low, high = max(low, int(tensor.bounds[0])), min(high, int(tensor.bounds[1]))
    return Annotated[int, Field(strict=True, ge=low, le=high)]


def _plain(dtype: str) -> Any:
    kind: torch.dtype = getattr(torch, dtype)
    return bool if kind is torch.bool else float if kind.is_floating_point else int


def _numpy(dtype: str) -> str:
    """What NumPy calls a dtype; it has no bfloat16, which is rounded from float32."""
    return "float32" if dtype == "bfloat16" else dtype


def _finite(tensor: Tensor) -> list[bool]:
    if not tensor.is_floating_point():
        return [True] * len(tensor)
    return (
        tensor.isfinite().flatten(1).all(1).tolist()
        if tensor.ndim > 1
        else (tensor.isfinite().tolist())
    )
