"""``plinth benchmark VERTICAL``: an engine in this process, asked by LoadGen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plinth.engine import Call, Engine, Flow, InputError, Model, Sla, from_pretrained
from plinth.engine.benchmark import Outcome, Sut, offline, server, single_stream
from plinth.engine.errors import ConfigError, nearest
from plinth.pipelines.assembly import (
    build_engine,
    is_folder_vertical,
    load_vertical,
    sla_of,
    store_path,
)
from plinth.pipelines.bench.over_http import read_bodies
from plinth.pipelines.bench.search import Trial
from plinth.pipelines.config.settings import Config
from plinth.verticals import Vertical, registry

SCENARIOS = ("single_stream", "offline", "server")
MODEL = "model:"
SAMPLES = 64  # rows of noise a lone model is asked with
CHUNK = 256  # records per flow in Offline; a folder vertical takes one item at a time


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An engine, not yet started, what it is asked, and the promise."""

    engine: Engine
    sut: Sut
    sla: Sla

    def scenario(
        self, name: str, *, rate: float, seconds: float, seed: int, folder: Path | None
    ) -> Outcome:
        """Run one of :data:`SCENARIOS`; ``rate`` is that of ``server``."""
        logs = None if folder is None else folder / name
        common: Any = {"seconds": seconds, "seed": seed, "folder": logs}
        if name == "single_stream":
            return single_stream(self.engine, self.sut, sla=self.sla, **common)
        if name == "offline":
            return offline(self.engine, self.sut, **common)
        return server(self.engine, self.sut, rate=rate, sla=self.sla, **common)

    def trial(self, rate: float, seconds: float, seed: int) -> Trial:
        """One run of Server; its ``detail`` is the outcome."""
        found = self.scenario("server", rate=rate, seconds=seconds, seed=seed, folder=None)
        in_time = found.samples - found.late - sum(found.failed.values())
        return Trial(found.samples, in_time, detail={"rate": rate, **found.as_dict()})


def prepare(
    config: Config, target: str, files: Sequence[Path], changes: dict[str, Any]
) -> Prepared:
    """Build what a target names: a vertical, or ``model:NAME`` or ``model:NAME@VERSION``.

    Args:
        config: settings of engine and verticals.
        target: what to measure.
        files: requests instead of the vertical's own example.
        changes: fields of the promise that differ from the vertical's.

    Raises:
        ConfigError: there is no such vertical, model or request.
    """
    if target.startswith(MODEL):
        if files:
            raise ConfigError("a lone model is asked with noise", hint="leave out --body")
        return _of_model(config, target.removeprefix(MODEL), changes)
    if target not in registry.names():
        known = nearest(target, registry.names())
        raise ConfigError(
            f"there is no vertical {target!r}", hint=f"{known}; or a URL, or model:NAME"
        )
    vertical = load_vertical(config, target)
    requests = _requests(vertical, files)

    def flow(numbers: Sequence[int]) -> Flow[Any]:
        return vertical.infer([requests[number] for number in numbers])

    chunk = 1 if is_folder_vertical(vertical) else CHUNK
    sut = Sut(target, len(requests), flow, chunk, heavy=vertical.heavy)
    promise = dataclasses.replace(sla_of(vertical, config), **changes)
    return Prepared(build_engine(config, {target: vertical}), sut, promise)


def _requests(vertical: Vertical[Any, Any], files: Sequence[Path]) -> list[Any]:
    folders = [file for file in files if file.is_dir()]
    try:
        found = [vertical.load(item) for folder in folders for item in vertical.discover(folder)]
        found += [
            vertical.parse(body) for body in read_bodies([f for f in files if f not in folders])
        ]
    except InputError as error:
        raise ConfigError(f"--body: {error.message}", hint=error.hint) from None
    if files and not found:
        raise ConfigError(f"{vertical.name} finds nothing in {files[0]}", hint="check --body")
    return found or [vertical.example()]


def _of_model(config: Config, name: str, changes: dict[str, Any]) -> Prepared:
    registry.describe()  # imports the verticals, which register the code of their models
    short, _, version = name.partition("@")
    model: Model = from_pretrained(short, version=version or None, store=store_path(config))
    engine = build_engine(config, {})
    engine.add(model, sla=(promise := Sla(**changes)))
    rows = model.spec.example(SAMPLES)

    def flow(numbers: Sequence[int]) -> Flow[Any]:
        chosen = list(numbers)
        return (yield Call(short, {key: tensor[chosen] for key, tensor in rows.items()}))

    return Prepared(engine, Sut(name, SAMPLES, flow, CHUNK), promise)
