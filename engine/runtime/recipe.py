"""How a worker process makes the same of a model as the engine has.

A recipe is data: where the model lies in a store or on disk, or the exported program of its
module, and what the engine chose to run it with. No code crosses; what a registered architecture
needs is imported by the name of its module, as it was in the engine's own process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from weakref import finalize

from torch import Tensor

from plinth.engine.backends import registry
from plinth.engine.backends.base import Executable, Wrapped, another
from plinth.engine.backends.blocks import Blocks
from plinth.engine.backends.choice import TOLERANCE, compiled, difference
from plinth.engine.backends.planner import Planned
from plinth.engine.backends.variants import load_variant
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.models import program
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import Model, ModelStore, module_of, read_model
from plinth.engine.precision.policy import PRESETS, PrecisionPolicy
from plinth.engine.precision.transforms import sharing_copy

Source = Literal["store", "onnx", "program"]
_CHECKED_ROWS = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a model is made of, and how it runs.

    Args:
        spec: its contract.
        source: what ``path`` is: the version's folder in a store, an ONNX file, or an exported
            program.
        path: where.
        digest: of the version's file, or of the ONNX file; what is found there has to have it.
        module: what registers its architecture; ``""``: the store finds it, or it needs none.
        parts: (first row count, backend, precision) of each range of rows, in order.
        variant: of the store, in the place of ``parts``.
        most: rows of its largest batch.
        example: rows that it is tried on.
    """

    spec: ModelSpec
    source: Source
    path: Path
    digest: str
    module: str
    parts: tuple[tuple[int, str, PrecisionPolicy], ...]
    variant: str | None
    most: int
    example: Mapping[str, Tensor] | None


@dataclass(slots=True, weakref_slot=True, eq=False)
class Sent:
    """A model as it is sent: the recipe, what the engine makes of its rows, and how far off
    another process may be.

    Args:
        recipe: what is sent.
        expected: outputs of the engine's own for the example rows; ``None``: it takes none.
        allowed: of the largest value of an output.
    """

    recipe: Recipe
    expected: dict[str, Tensor] | None
    allowed: float

    def check(self, found: Mapping[str, Tensor] | None) -> None:
        """Hold another process's outputs for the example rows against the engine's own.

        Raises:
            ModelError: they are others.
        """
        if self.expected is None or found is None:
            return
        worst = max(difference(found[name], want) for name, want in self.expected.items())
        if not worst <= self.allowed:
            raise ModelError(
                f"model {self.recipe.spec.name} gives other answers in a worker process: they are "
                f"off by {worst:.3g}, allowed is {self.allowed:g}",
                hint="was the model changed after it was loaded from its store?",
            )


def send(model: Model, executable: Executable, policy: PrecisionPolicy | None, most: int) -> Sent:
    """What another process needs to run the same.

    Args:
        model: the model.
        executable: what runs it here.
        policy: what it was asked for in, where that has no name of its own.
        most: rows of its largest batch.

    Raises:
        ModelError: it cannot be sent; says why, and what to do.
    """
    spec, variant = model.spec, executable.report.get("variant")
    parts = _parts(spec, executable, policy)
    source, path, digest = _source(model, parts)
    rows = None if executable.report.get("untried") else _example(model, min(_CHECKED_ROWS, most))
    expected = None
    if rows is not None:
        expected = _answers(another(executable) or executable, rows)
        rows = rows if expected is not None else None
    module = module_of(spec.architecture) if source == "store" else ""
    recipe = Recipe(spec, source, path, digest, module, parts, variant, most, rows)
    used = {precision for _, _, each in parts for precision in each.used} | {"fp32"}
    allowed = executable.report.get("allowed") or max(TOLERANCE[each] for each in used)
    sent = Sent(recipe, expected, allowed)
    if source == "program":
        finalize(sent, shutil.rmtree, path.parent, ignore_errors=True)
    return sent


def _parts(
    spec: ModelSpec, executable: Executable, policy: PrecisionPolicy | None
) -> tuple[tuple[int, str, PrecisionPolicy], ...]:
    while isinstance(executable, Wrapped):
        executable = executable.inner
    members = getattr(executable, "parts", [(1, executable)])
    parts = []
    for first, member in members:
        named = PRESETS.get(member.precision)
        if named is None and policy is not None and not policy.auto and len(members) == 1:
            named = policy
        if named is None and not executable.report.get("variant"):
            raise ModelError(
                f"model {spec.name} runs in {member.precision}, which cannot be sent to a worker "
                "process",
                hint="name a precision, such as fp32",
            )
        parts.append((first, member.backend, named or PRESETS["fp32"]))
    return tuple(parts)


def _source(
    model: Model, parts: tuple[tuple[int, str, PrecisionPolicy], ...]
) -> tuple[Source, Path, str]:
    spec = model.spec
    if model.variants is not None and module_of(spec.architecture) != "__main__":
        return "store", model.variants.folder.parent.absolute(), model.variants.reference
    if model.onnx is not None:
        return "onnx", model.onnx.absolute(), model.digest()
    if not all(policy.plain for _, _, policy in parts):
        raise ModelError(
            f"model {spec.name} is in no store, and runs in "
            f"{'+'.join(policy.name for *_, policy in parts)}: its module cannot be sent to a "
            "worker process",
            hint="save it in a store, or run it in fp32",
        )
    rows = _example(model, 4)
    if rows is None:
        raise ModelError(
            f"model {spec.name} has no example rows to export it for a worker process with",
            hint="give valid rows: add(..., example={...}), or save it in a store",
        )
    # A copy: to export a module puts other tensors into it, and a lane may run it meanwhile.
    try:
        module = sharing_copy(model.module)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"model {spec.name} has a part that cannot be copied: {error}",
            hint="save it in a store, of an architecture that is registered",
        ) from error
    path = Path(tempfile.mkdtemp(prefix="plinth-lane-")) / "program.pt2"
    try:
        program.write(spec, module.eval(), rows, path)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise
    return "program", path, ""


def _example(model: Model, count: int) -> dict[str, Tensor] | None:
    try:
        rows = model.rows(count)
        model.spec.check(rows)
    except Exception:  # noqa: BLE001 - sizes that nobody can make up
        return None
    return rows


def _answers(executable: Executable, rows: dict[str, Tensor]) -> dict[str, Tensor] | None:
    try:
        return {name: tensor.cpu() for name, tensor in executable.run(rows).items()}
    except Exception:  # noqa: BLE001 - rows that were made up, and are none of its own
        return None


# -- in the other process ----------------------------------------------------------------------
def cook(recipe: Recipe, device: Device, threads: int) -> tuple[Model, Executable]:
    """Make the model, and what runs it.

    Raises:
        ModelError, ConfigError: it is not there, another one, or cannot run here.
    """
    model = replace(read(recipe), spec=recipe.spec, example=recipe.example)
    if recipe.variant is not None:
        executable = load_variant(model, device, threads, recipe.variant)
    else:
        made: dict[tuple[str, str], Executable] = {}
        for _, backend, policy in recipe.parts:
            if (backend, policy.name) not in made:
                runs = compiled(registry.find(backend), model, device, policy, threads)
                made[backend, policy.name] = runs
        ranges = [(first, made[backend, policy.name]) for first, backend, policy in recipe.parts]
        executable = Planned(ranges) if len(ranges) > 1 else ranges[0][1]
    if recipe.spec.block is not None:
        executable = Blocks(executable, recipe.spec.block).widened(recipe.spec)
    return model, executable


def read(recipe: Recipe) -> Model:
    """The model that a recipe is of.

    Raises:
        ModelError: it is not there, or another one.
    """
    if recipe.source == "store":
        if recipe.module:
            import_module(recipe.module)
        root, name, version = recipe.path.parents[1], recipe.path.parent.name, recipe.path.name
        model = ModelStore(root).load(name, version)
        reference: Any = None if model.variants is None else model.variants.reference
        if reference != recipe.digest:
            raise ModelError(f"{recipe.path} is not what the engine loaded from there")
        return model
    model = read_model(recipe.path, recipe.spec)
    if recipe.digest and model.digest() != recipe.digest:
        raise ModelError(f"{recipe.path} is not what the engine loaded from there")
    return model
