"""Inputs as tritonclient makes them, for its HTTP and its gRPC module alike."""

from __future__ import annotations

from typing import Any

import numpy as np


def tensor(kind: Any, name: str, array: Any, datatype: str, **options: Any) -> Any:
    """An ``InferInput`` of one of tritonclient's modules."""
    found = kind.InferInput(name, list(array.shape), datatype)
    found.set_data_from_numpy(array, **options)
    return found


def mixed_inputs(kind: Any, **options: Any) -> list[Any]:
    picture = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    return [
        tensor(kind, "picture", picture, "FP32", **options),
        tensor(kind, "ids", ids, "INT64", **options),
        tensor(kind, "on", np.array([True, False]), "BOOL", **options),
    ]
