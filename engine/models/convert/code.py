"""Weights (``.safetensors``) with the code that builds their module, which the user names."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from plinth.engine.errors import ModelError
from plinth.engine.models import weights
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.signature import Wishes, derive
from plinth.engine.models.store import Model

_CODE = "say which: --code net.py:build, a function that gives the module; the file is run"


def read(path: Path, request: Request) -> Source:
    """A module built by a function of the user's, with the weights of a file.

    Raises:
        ModelError: no code was named, it fails, or a tensor does not fit; the first is named.
    """
    function, example_of = _functions(request.options.code, path)
    module = _built(function, request)
    weights.fill(module, path, request.name, _tied(module))
    example: Any = request.example
    if example is None and example_of is not None:
        example = example_of()
    if example is None:
        raise ModelError(
            f"{path}: there are no rows to run it on",
            hint="give --example rows.npz, or the code a function example() that gives rows",
        )
    if isinstance(example, dict) and set(example) == {""}:
        example = example[""]
    wishes = Wishes(
        request.name,
        request.version,
        free=request.options.free,
        outputs=request.options.outputs,
        rows_dim=request.options.rows_dim,
        source=path.name,
    )
    found = derive(module, example, wishes)
    return Source(
        Model(found.spec, found.module, example=found.example),
        facts={"kind": "safetensors", "code": request.options.code},
    )


def _functions(code: str | None, path: Path) -> tuple[Callable[..., Any], Any]:
    file, _, name = (code or "").rpartition(":")
    if not file or not name.isidentifier():
        raise ModelError(f"{path} holds weights without the code of their module", hint=_CODE)
    if not Path(file).is_file():
        raise ModelError(f"{file} is not a file", hint=_CODE)
    module_name = "plinth_code_" + re.sub(r"\W", "_", Path(file).stem)
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} is not a file of Python", hint=_CODE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and the like look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code raises what it likes
        raise ModelError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ModelError(f"{file} has no function {name}", hint=_CODE)
    return function, getattr(module, "example", None)


def _built(function: Callable[..., Any], request: Request) -> nn.Module:
    try:
        module = function(**request.options.arguments)
    except Exception as error:  # as above
        raise ModelError(
            f"{request.options.code} fails: {type(error).__name__}: {error}",
            hint="its arguments come from --arguments '{\"width\": 32}'",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{request.options.code} gives {type(module).__name__}, not a module")
    return module


def _tied(module: nn.Module) -> dict[str, str]:
    """Names of tensors that are one in memory: other -> first, as :func:`weights.fill` takes it."""
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        first.setdefault(key, name)
    return tied
