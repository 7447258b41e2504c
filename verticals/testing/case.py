"""A vertical under test: its requests, its runs, its state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from plinth.engine import InputError
from plinth.verticals.contract import Vertical, WithArtefacts
from plinth.verticals.testing.flows import run_with_models

VARIANTS = 3
Place = tuple[str | int, ...]


class NotApplicable(Exception):
    """A clause says nothing about this vertical."""


class Case:
    """A vertical under test.

    Args:
        vertical: the vertical.
        given: valid requests of the author's beside the example.
        folder: a folder with items, or ``None``.
    """

    def __init__(
        self, vertical: Vertical[Any, Any], given: tuple[Any, ...], folder: Path | None
    ) -> None:
        self.vertical = vertical
        self.given = given
        self.folder = folder

    @property
    def takes_records(self) -> bool:
        """The vertical has JSON doors."""
        return self.vertical.request is not None

    @property
    def takes_folders(self) -> bool:
        """The vertical has folder doors."""
        return type(self.vertical).discover is not Vertical.discover

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Give the vertical its state of before back after the body."""
        before = self.vertical.snapshot()
        try:
            yield
        finally:
            if before is not None:
                self.vertical.restore(before)

    @cached_property
    def example(self) -> dict[str, Any]:
        """The example request as plain JSON data."""
        return json.loads(self.vertical.example().model_dump_json())  # type: ignore[no-any-return]

    @cached_property
    def requests(self) -> list[Any]:
        """The example, the author's requests, and gentle variants of the example."""
        requests = [self.vertical.example(), *self.given]
        if self.takes_records and len(requests) < VARIANTS + 1:
            for changed in gentle(self.example):
                try:
                    requests.append(self.vertical.parse(dump(changed)))
                except InputError:
                    continue
                if len(requests) > VARIANTS:
                    break
        return requests if len(requests) > 1 else requests * 2

    def run(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests with the vertical's own models; the shape of the answer is checked."""
        results = run_with_models(self.vertical, requests)
        if not isinstance(results, list) or len(results) != len(requests):
            got = f"{len(results)} results" if isinstance(results, list) else repr(type(results))
            raise AssertionError(
                f"infer() of {len(requests)} requests returned {got}: "
                "return a list with one result or InputError for each request, in order"
            )
        for result in results:
            wanted = self.vertical.response
            given = result.response if isinstance(result, WithArtefacts) else result
            if not isinstance(given, wanted | InputError):
                raise AssertionError(
                    f"infer() returned a {type(given).__name__}: each result is a "
                    f"{wanted.__name__}, alone or in WithArtefacts, or an InputError"
                )
        return results

    def one(self, request: Any) -> Any:
        """The answer to one valid request; an InputError is a failure."""
        result = self.run([request])[0]
        if isinstance(result, InputError):
            raise AssertionError(f"a valid request was refused: {result}")
        return result


def dump(data: Any) -> bytes:
    """Data as JSON bytes; infinite and not-a-number floats as Python spells them."""
    return json.dumps(data).encode()


def strict(raw: bytes) -> Any:
    """JSON bytes as data.

    Raises:
        AssertionError: it is not JSON, or has NaN or Infinity.
    """

    def refuse(name: str) -> None:
        raise AssertionError(f"an answer has {name}, which is not JSON: refuse the request instead")

    try:
        return json.loads(raw, parse_constant=refuse)
    except ValueError as error:
        raise AssertionError(f"encode() did not give JSON: {error}") from None


def leaves(data: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Places and values in JSON data: scalars, lists, and the first item of each list."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
        return
    if path:
        yield path, data
    if isinstance(data, list) and data:
        yield from leaves(data[0], (*path, 0))


def changed(data: Any, path: Place, value: Any) -> Any:
    """A copy of JSON data with one place changed."""
    copy = deepcopy(data)
    here = copy
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = value
    return copy


def gentle(data: Any) -> Iterator[Any]:
    """Variants of a valid record that are probably valid: one number a little larger."""
    for path, value in leaves(data):
        if isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield changed(data, path, value + 1)
        elif isinstance(value, float):
            yield changed(data, path, value * 1.5 + 0.25)


def hostile(data: Any) -> Iterator[tuple[str, Any]]:
    """Variants of a valid record at the edge of what a client may send, with the field's name."""
    for path, value in leaves(data):
        for bad in _edges(value):
            yield ".".join(str(part) for part in path), changed(data, path, bad)


def _edges(value: Any) -> list[Any]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [0, -1, 1e30, 1e300, 2**63, math.inf, math.nan]
    if isinstance(value, str):
        return ["", "\u0000", "x" * 5000]
    return [[], value[:1], value * 2]


def close(a: Any, b: Any) -> bool:
    """Equal results, floats to 1e-4 of their size (and 1e-5 near zero); of responses alone."""
    if isinstance(a, WithArtefacts) and isinstance(b, WithArtefacts):
        return close(a.response, b.response)
    if isinstance(a, BaseModel) and isinstance(b, BaseModel):
        return type(a) is type(b) and close(dict(a), dict(b))
    if isinstance(a, InputError) and isinstance(b, InputError):
        return a.as_dict() == b.as_dict()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray | Tensor):
        left, right = np.asarray(a), np.asarray(b)
        return left.shape == right.shape and _arrays_close(left, right)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float | int):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def _arrays_close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    if a.dtype.kind == "f":
        return bool(np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True))
    return bool((a != b).mean() < 1e-4) if a.size else True


def difference(a: Any, b: Any) -> str:
    """The first fields in which two results differ, without their values."""
    if isinstance(a, WithArtefacts) and isinstance(b, WithArtefacts):
        return difference(a.response, b.response)
    if isinstance(a, BaseModel) and isinstance(b, BaseModel):
        left, right = dict(a), dict(b)
        names = [name for name in left if not close(left[name], right.get(name))]
        return "fields " + ", ".join(names[:5])
    return f"{type(a).__name__} and {type(b).__name__}"
