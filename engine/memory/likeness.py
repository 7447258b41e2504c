"""What was measured of a model, for one of the same structure with other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from plinth.engine.backends.base import Executable
from plinth.engine.memory.plan import MemoryPlan
from plinth.engine.models.digest import structure_digest
from plinth.engine.models.store import Model


@dataclass(frozen=True, slots=True)
class Measured:
    """What a forward of a model takes.

    Args:
        likeness: see :func:`likeness`; ``None``: nothing else is like it.
        plan: memory of one lane, before anything was added to it.
        most: rows of the largest batch.
        cost: seconds of a batch by its rows.
    """

    likeness: str | None
    plan: MemoryPlan
    most: int
    cost: Mapping[int, float]


def likeness(model: Model, executable: Executable, *facts: object) -> str | None:
    """The same for models that take the same memory and time; ``None`` where nobody can tell.

    They have one contract and structure, their tensors have the same sizes, and the same backends
    run them in the same precision for the same numbers of rows. What is in a file of its own, an
    ONNX model or a variant of a store, is like nothing else.

    Args:
        model: the model.
        executable: what runs it.
        facts: what else was asked for.
    """
    told = executable.report
    if model.onnx is not None or told.get("variant") or told.get("untried"):
        return None
    structure = structure_digest(model.module)
    if structure is None:
        return None
    runs = (type(executable).__name__, executable.backend, executable.precision)
    made = [told.get(name) for name in ("plan", "threads", "memory")]
    contract = model.spec.model_dump_json(include={"inputs", "outputs", "block"})
    parts = structure, contract, str(executable.device), runs, made, facts
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()
