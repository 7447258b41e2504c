"""Which of the declared features a model sees, by name and definition, not by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ModelError
from plinth.verticals.finance.features.language import Ratio
from plinth.verticals.finance.features.program import STANDARD, Program

FACT = "features"
"""Under this name the store keeps the features of a model, and a digest of what each means."""


def definitions(program: Program) -> dict[str, str]:
    """The features that models of these see, and a digest of what each means."""
    known = {one.name: one for one in program.declaration.feature}
    found = {}
    for name in program.model_names:
        one = known[name]
        parts = [known[part] for part in (one.of, one.to)] if isinstance(one, Ratio) else []
        told = [part.model_dump(exclude={"name", "use", "reason"}) for part in (one, *parts)]
        words = json.dumps(told, sort_keys=True).encode()
        found[name] = hashlib.sha256(words).hexdigest()[:12]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Columns of the declared features that one model sees.

    Args:
        program: the features.
        names: of the columns, in the model's order.
        places: of each among the program's columns.
    """

    program: Program
    names: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def all(cls, program: Program) -> Columns:
        """What a model sees that is trained now."""
        return cls(program, program.model_names, tuple(range(program.model)))

    @classmethod
    def of(cls, program: Program, facts: Mapping[str, Any], model: str) -> Columns:
        """What a model sees that is in the store; without facts of it, the standard features.

        Args:
            program: the features as they are declared now.
            facts: of the model, from the store.
            model: its name and version, for the error.

        Raises:
            ModelError: it was trained on a feature that is not declared, or declared otherwise.
        """
        wanted, have = facts.get(FACT) or definitions(STANDARD), definitions(program)
        for name, digest in dict(wanted).items():
            if have.get(name) != digest:
                what = "is declared otherwise now" if name in have else "is not declared"
                raise ModelError(
                    f"{model} was trained on the feature {name}, which {what}",
                    hint="declare it as it was in [verticals.finance.features], or train again",
                )
        names = tuple(wanted)
        return cls(program, names, tuple(map(program.names.index, names)))

    def seen(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of the columns of rows (n, columns of the program) that the model sees."""
        if self.places == tuple(range(len(self.places))):
            return rows[:, : len(self.places)].copy()
        return np.ascontiguousarray(rows[:, self.places])

    @property
    def reasons(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """Code, text and columns of each group that stands for a reason."""
        seen = set(self.names)
        found = [(c, t, tuple(n for n in ns if n in seen)) for c, t, ns in self.program.reasons]
        return tuple(group for group in found if group[2])
