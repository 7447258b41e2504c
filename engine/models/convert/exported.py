"""Programs that ``torch.export`` wrote (``.pt2``), by whomever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from plinth.engine.errors import ModelError
from plinth.engine.models import program
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.signature import ROWS, check_rows, contract, given_rows
from plinth.engine.models.spec import TensorSpec
from plinth.engine.models.store import Model


class _Named(nn.Module):
    """A program with tensors by name in and out, however it nests them."""

    def __init__(
        self, runs: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], tree: Any
    ) -> None:
        super().__init__()
        self.runs = runs
        self.inputs = inputs
        self.outputs = outputs
        self.tree = tree

    def forward(self, **rows: Tensor) -> dict[str, Tensor]:
        """Rows (n, ...) by input name to tensors by output name."""
        args, kwargs = pytree.tree_unflatten([rows[name] for name in self.inputs], self.tree)
        found = pytree.tree_leaves(self.runs(*args, **kwargs))
        return dict(zip(self.outputs, found, strict=True))


def read(path: Path, request: Request) -> Source:
    """A program whose inputs have a free first dimension.

    Raises:
        ModelError: as :func:`program.read`; a fixed number of rows, or an input that is no
            tensor; rows that mix.
    """
    if request.options.rows_dim:
        raise ModelError(f"{path}: rows are the first dimension of programs", hint=_ROWS)
    found = program.read(path)
    values = _inputs(path, found)
    outputs = _outputs(path, found)
    with program.refusing(f"{path} cannot be made to run", "export it again"):
        runs = found.module(check_guards=False)
    module = program.in_one_mode(
        _Named(runs, tuple(values), tuple(outputs), found.call_spec.in_spec)
    )
    inputs = tuple(_spec(name, value) for name, value in values.items())
    made_up = {name: _made_up(value) for name, value in values.items()}
    rows = given_rows(request.name, inputs, request.example) or made_up
    kept = choose(request.name, outputs, request.options.outputs)

    def run(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with (
            torch.inference_mode(),
            program.refusing(
                f"model {request.name} fails on its example rows", "give valid rows as example"
            ),
        ):
            answers = module(**{key: tensor.clone() for key, tensor in given.items()})
        return {name: answers[name] for name in kept}

    check_rows(run, rows, request.name)
    spec = contract(
        name=request.name,
        version=request.version,
        inputs=inputs,
        outputs=tuple(_spec(name, outputs[name]) for name in kept),
        source=path.name,
    )
    return Source(Model(spec, module, example=rows), run=run, facts={"kind": "torch.export"})


_ROWS = (
    "export it with free rows: torch.export.export(module, rows, dynamic_shapes=({0: "
    "torch.export.Dim.DYNAMIC},)), one such table for each input"
)


def _inputs(path: Path, found: torch.export.ExportedProgram) -> dict[str, Any]:
    """What the graph says of each input, by its name."""
    given = [s.arg for s in found.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    odd = next((arg for arg in given if not isinstance(arg, TensorArgument)), None)
    if odd is not None:
        raise ModelError(
            f"{path}: input {odd.name} is {type(odd).__name__}, not a tensor",
            hint="export a module whose forward takes tensors alone, and fixes the rest",
        )
    nodes = {node.name: node.meta["val"] for node in found.graph.nodes if node.op == "placeholder"}
    values = {arg.name: nodes[arg.name] for arg in given}
    if not values:
        raise ModelError(f"{path} has no inputs")
    for name, value in values.items():
        if not value.ndim or isinstance(value.shape[0], int):
            raise ModelError(
                f"{path}: input {name} is {tuple(value.shape)}, a fixed number of rows",
                hint=_ROWS,
            )
    return values


def _outputs(path: Path, found: torch.export.ExportedProgram) -> dict[str, Any]:
    """What the graph says of each output; a dict keeps its keys, others are counted."""
    (last,) = (node for node in found.graph.nodes if node.op == "output")
    given = found.graph_signature.user_outputs
    by_name = {node.name: node.meta["val"] for node in last.args[0] if hasattr(node, "meta")}
    tree = found.call_spec.out_spec
    if tree is not None and tree.type is dict and tree.num_leaves == len(tree.context):
        names = [str(key) for key in tree.context]
    else:
        names = [f"output_{i}" for i in range(len(given))] if len(given) > 1 else ["output"]
    values = dict(zip(names, (by_name.get(str(key)) for key in given), strict=True))
    odd = next((name for name, value in values.items() if not isinstance(value, Tensor)), None)
    if odd is not None or not values:
        raise ModelError(f"{path}: output {odd or 'none'} is not a tensor")
    return values


def choose(name: str, outputs: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The outputs that are kept, all by default; raises ModelError on an unknown one."""
    known = list(outputs)
    for output in wanted or ():
        if output not in known:
            raise ModelError(f"model {name} has no output {output}", hint=f"it has {known}")
    return list(wanted or known)


def _spec(name: str, value: Any) -> TensorSpec:
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape[1:])
    return TensorSpec(name=name, shape=sizes, dtype=str(value.dtype).removeprefix("torch."))


def _made_up(value: Any) -> Tensor:
    """Rows in the sizes that it was exported with, which its constraints allow."""
    sizes = tuple(_hint(size) for size in value.shape[1:])
    return TensorSpec(
        name="made up", shape=sizes, dtype=str(value.dtype).removeprefix("torch.")
    ).example(ROWS)


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 32 if hint is None else int(hint)
