"""What every converter is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plinth.engine.models.fidelity import Run
from plinth.engine.models.signature import Rows
from plinth.engine.models.store import Model


@dataclass(frozen=True)
class Options:
    """What a source does not say itself.

    Args:
        example: rows it takes: a ``.npz`` with an array (n, ...) by input name, or a ``.npy``
            for the only input.
        outputs: names of the outputs to keep.
        rows_dim: the dimension of rows where it is not the first, by input or output name.
        free: dimensions of any size by input.
        code: ``file.py:function`` that builds the module for a file of weights. It is run.
        arguments: keyword arguments of that function.
    """

    example: Path | None = None
    outputs: Sequence[str] | None = None
    rows_dim: Mapping[str, int] = field(default_factory=dict)
    free: Mapping[str, Sequence[int]] = field(default_factory=dict)
    code: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One conversion.

    Args:
        name: of the model in the store; ``version``: its version there.
        example: rows by input name, if there are any.
        options: what the source does not say.
        folder: for files on the way.
    """

    name: str
    version: str
    example: Rows | None
    options: Options
    folder: Path


@dataclass(frozen=True)
class Source:
    """A model that was read.

    Args:
        model: ready for the store, with example rows.
        run: the source as its own library computes it; ``None``: as the model.
        facts: more for the report.
        libraries: whose versions count.
    """

    model: Model
    run: Run | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
