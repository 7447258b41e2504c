"""How far a converted model is from its source, on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from plinth.engine.errors import ModelError
from plinth.engine.models.signature import apart, largest

TOLERANCE = 1e-3
LIBRARIES = ("torch", "onnx", "onnxruntime")

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Fidelity(BaseModel):
    """Differences between two models on the same rows.

    Args:
        rows: how many rows both answered.
        largest_difference: of all outputs; of floats relative to the largest magnitude of the
            source's output, of other dtypes 0 where all are equal.
        output: the output in which it is; ``row``: the row in which it is.
        versions: of the libraries that computed.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    largest_difference: float
    output: str
    row: int
    versions: dict[str, str]


def compare(
    name: str, converted: Run, source: Run, rows: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> Fidelity:
    """Run both on the same rows.

    Args:
        name: the model's, for errors.
        converted: rows (n, ...) by input name to rows by output name.
        source: the same, as its own library computes it.
        rows: what both get.
        tolerance: largest difference that is taken.

    Raises:
        ModelError: they differ by more; says by how much, in which output and row.
    """
    found = converted({key: tensor.clone() for key, tensor in rows.items()})
    wanted = source({key: tensor.clone() for key, tensor in rows.items()})
    count = len(next(iter(rows.values())))
    worst = max(
        (apart(found[key][row : row + 1], want[row : row + 1], _scale(want)), key, row)
        for key, want in wanted.items()
        for row in range(count)
    )
    if not worst[0] <= tolerance:
        raise ModelError(
            f"model {name} gives other answers once it is converted: output {worst[1]} of row "
            f"{worst[2]} is off by {worst[0]:.3g}, allowed is {tolerance:g}",
            hint="compare both on this row; nothing was stored",
        )
    return Fidelity(
        rows=count,
        largest_difference=worst[0],
        output=worst[1],
        row=worst[2],
        versions=versions(*LIBRARIES),
    )


def versions(*libraries: str) -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _scale(want: Tensor) -> float:
    return largest(want) if want.is_floating_point() else 1.0
