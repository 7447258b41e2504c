"""Two small verticals for the doors' tests: ``tiny`` takes records, ``shelf`` takes folders.

A number of 1000 or more waits in the model, a file that says "hold" waits in ``load``, until the
test opens the gate: a folder with two named pipes, so that it works across processes too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plinth.engine import Call, Flow, InputError, Model, ModelSpec, Sla, TensorSpec
from plinth.verticals import Item, Settings, Vertical

GATE = "PLINTH_TEST_GATE"
HELD = 1000.0


class Gate:
    """Two named pipes: who arrives says so and waits; the test lets one through at a time."""

    def __init__(self, folder: Path) -> None:
        self.entered, self.go = folder / "entered", folder / "go"
        for pipe in (self.entered, self.go):
            if not pipe.exists():
                os.mkfifo(pipe)

    def pass_through(self) -> None:
        self.entered.write_text("x")
        self.go.read_text()

    def await_arrival(self) -> None:
        assert self.entered.read_text() == "x"

    def open(self) -> None:
        self.go.write_text("x")


@contextlib.contextmanager
def gated(folder: Path) -> Iterator[Gate]:
    """A gate in this folder, where what is slow waits while the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GATE, str(folder))
        yield Gate(folder)


def at_the_gate() -> None:
    Gate(Path(os.environ[GATE])).pass_through()


class Twice(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        if bool((rows >= HELD).any()):
            at_the_gate()
        return rows * 2


def model(name: str) -> Model:
    return Model(
        ModelSpec(
            name=name,
            version="3",
            inputs=(TensorSpec(name="rows", shape=(1,)),),
            outputs=(TensorSpec(name="twice", shape=(1,)),),
        ),
        Twice(),
    )


class Number(BaseModel):
    """A number to double."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=64)
    value: float


class Doubled(BaseModel):
    """Twice the number."""

    id: str
    twice: float


class TinySettings(Settings):
    offset: float = Field(0.0, ge=-10, le=10)


class Tiny(Vertical[Number, Doubled]):
    name = "tiny"
    summary = "Doubles numbers."
    action = "double"
    request = Number
    response = Doubled
    settings_type = TinySettings
    sla: ClassVar[Sla] = Sla(deadline_ms=60_000)

    def models(self) -> Sequence[Model]:
        return [model("twice")]

    def example(self) -> Number:
        return Number(id="a", value=1.5)

    def infer(self, requests: Sequence[Number]) -> Flow[list[Doubled | InputError]]:
        if any(request.value == 666 for request in requests):
            raise RuntimeError("secret 4111111111111111")
        rows = torch.tensor([[request.value] for request in requests])
        twice = yield Call("twice", rows)
        return [
            InputError("13 cannot be doubled", field="value", hint="send 12", reason="unlucky")
            if request.value == 13
            else Doubled(id=request.id, twice=value)
            for request, value in zip(requests, twice[:, 0].tolist(), strict=True)
        ]


class Page(BaseModel):
    id: str
    twice: float
    found: list[dict[str, Any]]


class Shelf(Vertical[Any, Page]):
    name = "shelf"
    summary = "Doubles the numbers in text files."
    action = "read"
    response = Page

    def models(self) -> Sequence[Model]:
        return [model("page")]

    def example(self) -> tuple[str, float]:
        return "example", 1.0

    def discover(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.rglob("*.txt")):
            yield Item(path.stem, (path,), {"bytes": path.stat().st_size})

    def load(self, item: Item) -> tuple[str, float]:
        text = item.paths[0].read_text().strip()
        if text == "bug":
            raise KeyError("a fault of the vertical")
        if text == "hold":
            at_the_gate()
            text = "1"
        try:
            return item.id, float(text)
        except ValueError:
            raise InputError(
                f"{item.id}: expected a number", field=item.paths[0].name, hint="write one"
            ) from None

    def infer(self, requests: Sequence[tuple[str, float]]) -> Flow[list[Page | InputError]]:
        twice = yield Call("page", torch.tensor([[value] for _, value in requests]))
        values = twice[:, 0].tolist()
        return [
            Page(id=name, twice=v, found=[{"key": "number", "value": number}, {"title": "none"}])
            for (name, number), v in zip(requests, values, strict=True)
        ]

    def write(self, result: Page, folder: Path) -> list[Path]:
        (folder / "twice.txt").write_text(f"{result.twice}\n")
        (folder / "report.html").write_text("<h1>report</h1>")
        return [folder / "twice.txt", folder / "report.html"]


def install(folder: Path) -> dict[str, str]:
    """Make both installed for a child process: entry points on PYTHONPATH; its environment."""
    info = folder / "tiny-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[plinth.verticals]\ntiny = tiny_verticals:Tiny\nshelf = tiny_verticals:Shelf\n"
    )
    here = Path(__file__).resolve().parent
    extra = filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("PLINTH_")},
        "PYTHONPATH": os.pathsep.join(map(str, (folder, here, here.parents[1], *extra))),
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
