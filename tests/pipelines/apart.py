"""Verticals whose heavy steps may run in another process, and what those steps are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apart_steps import double, read, write
from tiny_verticals import Doubled, Number

from plinth.engine import Compute, Engine, Flow, InputError, Model
from plinth.verticals import Item, Vertical


class Apart(Vertical[Number, Doubled]):
    """Doubles numbers of records and of text files, without a model."""

    name = "apart"
    summary = "Doubles numbers in a worker process."
    action = "double"
    request = Number
    response = Doubled

    def models(self) -> Sequence[Model]:
        return []

    def example(self) -> Number:
        return Number(id="a", value=1.5)

    def infer(self, requests: Sequence[Number]) -> Flow[list[Doubled | InputError]]:
        found: list[Doubled | InputError] = []
        for request in requests:
            try:
                twice, by = yield Compute(double, request.value)
            except InputError as error:
                found.append(error)
            else:
                found.append(Doubled(id=f"{request.id} {by}", twice=twice))
        return found

    def discover(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.rglob("*.txt")):
            yield Item(path.stem, (path,))

    def load(self, item: Item) -> Number:
        return Number(id=item.id, value=read(item.paths[0]))

    def loading(self, item: Item) -> Flow[Number]:
        return Number(id=item.id, value=(yield Compute(read, item.paths[0])))

    def write(self, result: Doubled, folder: Path) -> list[Path]:
        return write(result.twice, folder)

    def writing(self, result: Doubled, folder: Path) -> Flow[list[Path]]:
        files: Any = yield Compute(write, result.twice, folder)
        return files


class HeavyApart(Apart):
    """The same, driven on a worker thread."""

    heavy = True


class ApartFiles(Apart):
    """Reads text files only."""

    name = "files"
    request = None


@contextmanager
def own() -> Iterator[tuple[Apart, Engine]]:
    """What a worker process carries whole items with."""
    with Engine(threads=1) as engine:
        yield Apart(), engine
