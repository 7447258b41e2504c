"""``plinth new-vertical``: a distribution with a vertical that works, to start from."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from plinth.pipelines.console import say, written_anew

EPILOG = "Example: plinth new-vertical leaks · cd leaks && pip install -e . && plinth check leaks"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "plinth-$name"
version = "0.1.0"
description = "A vertical of Plinth."
requires-python = ">=3.11"
dependencies = ["plinth-engine"]

[project.entry-points."plinth.verticals"]
$name = "plinth_$name:$Kind"

[tool.setuptools]
packages = ["plinth_$name"]
"""
_MODEL = '''\
"""The model. Put your own here, or load one from a model store with ``from_pretrained``."""

import torch
from torch import Tensor, nn

from plinth.engine import Model, ModelSpec, TensorSpec

SPEC = ModelSpec(
    name="$name",
    version="0.1.0",
    inputs=(TensorSpec(name="values", shape=(2,)),),
    outputs=(TensorSpec(name="score", shape=(1,)),),
)


class Score(nn.Module):
    """Rows (n, 2) to scores (n, 1) between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.linear.weight.data = torch.tensor([[0.5, -0.5]])
        self.linear.bias.data.zero_()

    def forward(self, values: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(values))


def model() -> Model:
    return Model(SPEC, Score().eval())
'''
_VERTICAL = '''\
"""The vertical: what a request is, which models it needs, what happens between them."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

from plinth.engine import Call, Flow, InputError, Model, Sla
from plinth.verticals import Settings, Vertical

from .model import model

Value = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Request(BaseModel):
    """What a client sends. Bound everything: what the type refuses never reaches your code."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=r"^[A-Za-z0-9-]{1,64}$$")
    first: Value
    second: Value


class Response(BaseModel):
    """What a client gets."""

    id: str
    score: float
    alarm: bool


class ${Kind}Settings(Settings):
    """The table ``[verticals.$name]`` of plinth.toml."""

    alarm_above: float = Field(0.9, ge=0, le=1)


class $Kind(Vertical[Request, Response]):
    """Scores two numbers."""

    name = "$name"
    summary = "Scores two numbers; say here what yours does."
    action = "score"
    request = Request
    response = Response
    settings_type = ${Kind}Settings
    sla = Sla(deadline_ms=150)

    def models(self) -> Sequence[Model]:
        return [model()]

    def example(self) -> Request:
        return Request(id="a-1", first=3.0, second=1.5)

    def infer(self, requests: Sequence[Request]) -> Flow[list[Response | InputError]]:
        if not requests:
            return []
        rows = torch.tensor([[request.first, request.second] for request in requests])
        scores = yield Call("$name", rows)
        return [
            Response(id=request.id, score=score, alarm=score > self.settings.alarm_above)
            for request, score in zip(requests, scores[:, 0].tolist(), strict=True)
        ]

    def key(self, request: Request) -> str:
        return request.id
'''
_TESTS = '''\
"""The contract of verticals, clause by clause, and what this one is to answer."""

import pytest
import torch
from plinth_$name import $Kind

from plinth.verticals.testing import checks, feed


@pytest.mark.parametrize("check", checks($Kind()), ids=str)
def test_contract(check):
    check()


def test_a_high_score_is_an_alarm():
    vertical = $Kind()
    (answer,) = feed(vertical.infer([vertical.example()]), torch.tensor([[0.95]]))
    assert answer.alarm
'''
_README = """\
# plinth-$name

    pip install -e .
    pytest
    plinth check $name
    plinth serve $name
"""
FILES = {
    "pyproject.toml": _PYPROJECT,
    "plinth_$name/__init__.py": _VERTICAL,
    "plinth_$name/model.py": _MODEL,
    "tests/test_$name.py": _TESTS,
    "README.md": _README,
}


def new_vertical(
    name: Annotated[str, typer.Argument(help="Of the vertical: lower case letters, digits, _.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to make; default: ./NAME.")
    ] = None,
) -> None:
    """Write a vertical that works, with a model and tests, to be changed into your own."""
    from plinth.engine import ConfigError
    from plinth.verticals import registry

    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot name a vertical",
            hint="lower case letters, digits and _, a letter first: it is part of a route",
        )
    if name in registry.names():
        raise ConfigError(f"a vertical named {name!r} is installed", hint="choose another name")
    folder = out or Path(name)
    with written_anew(folder, if_there="choose another with --out"):
        folder.mkdir(parents=True)
        for path, text in skeleton(name).items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    say(f"wrote {folder}; next: cd {folder} && pip install -e . && pytest && plinth check {name}")


def skeleton(name: str) -> dict[str, str]:
    """Text by path of every file of a new vertical."""
    words = {"name": name, "Kind": "".join(part.capitalize() for part in name.split("_"))}
    return {
        Template(path).substitute(words): Template(text).substitute(words)
        for path, text in FILES.items()
    }
