"""``plinth convert``: models of other libraries into the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from plinth.pipelines.console import show_json, show_table

EPILOG = (
    "Example: plinth convert net.onnx --name net · plinth convert net.pt2 --name net --example "
    "rows.npz · plinth convert net.safetensors --code net.py:build --arguments '{\"width\": 8}' "
    "--name net · plinth convert my-bert/ --name bert"
)


CodeOption = Annotated[
    str | None,
    typer.Option(metavar="FILE:FUNCTION", help="Builds the module of weights. It is run."),
]
ArgumentsOption = Annotated[
    str | None, typer.Option(metavar="JSON", help="Keyword arguments of that function.")
]


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .pt2, .onnx or .safetensors file, LightGBM's .txt, XGBoost's .json or .ubj, or "
            "a folder of Hugging Face."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name in the store.")],
    version: Annotated[str, typer.Option(help="Version in the store.")] = "1",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the store; default: models.store, then PLINTH_MODEL_STORE.",
        ),
    ] = None,
    example: Annotated[
        Path | None,
        typer.Option(help="Rows it takes: .npz with an array per input, or .npy for one input."),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(help="Keep this output; repeat it for several.", show_default="all"),
    ] = None,
    rows_dim: Annotated[
        list[str] | None,
        typer.Option(metavar="TENSOR=DIM", help="Where rows are not the first dimension."),
    ] = None,
    free: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT=DIM", help="A dimension of any size."),
    ] = None,
    code: CodeOption = None,
    arguments: ArgumentsOption = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Bring a model of another library into the store, and hold it against its source."""
    from plinth.engine.models.convert import Options
    from plinth.engine.models.convert import convert as converted
    from plinth.pipelines.cli.models import store_of

    free_dims: dict[str, list[int]] = {}
    for key, dim in _pairs("--free", free):
        free_dims.setdefault(key, []).append(dim)
    options = Options(
        example=example,
        outputs=output,
        rows_dim=dict(_pairs("--rows-dim", rows_dim)),
        free=free_dims,
        code=code,
        arguments=table(arguments),
    )
    found = converted(source, store_of(out, config), name=name, version=version, options=options)
    if as_json:
        spec = found.spec.model_dump(mode="json")
        show_json({"spec": spec, "folder": str(found.folder), "report": found.report})
        return
    tensors = [
        (kind, tensor.name, tensor.dtype, "x".join(str(s or "any") for s in tensor.shape) or "-")
        for kind, side in (("input", found.spec.inputs), ("output", found.spec.outputs))
        for tensor in side
    ]
    show_table(f"{name} {version} is in the store", ("", "tensor", "dtype", "row shape"), tensors)
    rows = [(key, json.dumps(value)) for key, value in found.report.items()]
    show_table("Held against its source", ("", ""), rows)


def _pairs(option: str, given: list[str] | None) -> list[tuple[str, int]]:
    """``name=1`` as a name and a number."""
    found = []
    for text in given or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise typer.BadParameter(f"{text!r} is not NAME=NUMBER", param_hint=option)
        found.append((name, int(number)))
    return found


def table(text: str | None) -> dict[str, Any]:
    """The keyword arguments of ``--arguments``."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--arguments") from error
    if not isinstance(found, dict):
        raise typer.BadParameter('expected an object, {"name": value}', param_hint="--arguments")
    return found
