"""From a checked config to verticals and an engine that has their models."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plinth.engine import ConfigError, Engine, Model, Sla
from plinth.engine.models.store import choose_store, default_store
from plinth.engine.optimize.export_ahead import export_ahead
from plinth.pipelines.config.settings import Config
from plinth.pipelines.live.models import following
from plinth.pipelines.live.tables import settings_of
from plinth.verticals import Vertical, registry

log = logging.getLogger("plinth.assembly")

Rows = tuple[int, int] | None
"""Smallest and largest batch; ``None``: nothing is said."""
STREAM_ROWS = 1, 1024
"""Of a stream: calls come as whole chunks, and nobody waits for a row that comes between them."""


def chosen(config: Config, names: Sequence[str] = ()) -> list[str]:
    """Which verticals to run: those asked for, those with a table, or all that can be imported.

    Raises:
        ConfigError: none of those installed can be imported.
    """
    if named := list(dict.fromkeys(names)) or list(config.verticals):
        return named
    listings = registry.describe()
    for broken in (listing for listing in listings if listing.error):
        log.warning("left out %s: %s", broken.name, broken.error)
    able = [listing.name for listing in listings if listing.error is None]
    if not able:
        raise ConfigError("no installed vertical can be used", hint="plinth list says why")
    return able


def load_verticals(config: Config, names: Sequence[str] = ()) -> dict[str, Vertical[Any, Any]]:
    """Verticals by name, with the settings of their tables.

    Raises:
        ConfigError: unknown vertical or setting; names file and line.
    """
    return {name: load_vertical(config, name) for name in chosen(config, names)}


def store_path(config: Config) -> Path:
    """The model store in force: ``models.store``, ``PLINTH_MODEL_STORE``, or the user's own."""
    with choose_store(config.models.store):
        return default_store()


def load_vertical(config: Config, name: str) -> Vertical[Any, Any]:
    """One vertical with the settings of its table."""
    settings, _ = settings_of(config, name, registry.find(name).settings_type)
    with choose_store(config.models.store):
        return registry.load(name, settings)


def models_of(vertical: Vertical[Any, Any], config: Config) -> list[Model]:
    """The models that a vertical brings, from the store of the config.

    Raises:
        ModelError: a model is missing or damaged.
    """
    with choose_store(config.models.store):
        return list(vertical.models())


def sla_of(vertical: Vertical[Any, Any], config: Config) -> Sla:
    """The vertical's own promise with what ``[verticals.<name>.sla]`` changes.

    Raises:
        ConfigError: the promise makes no sense.
    """
    table = config.vertical(vertical.name).sla
    if table is None:
        return vertical.sla
    try:
        return dataclasses.replace(vertical.sla, **table.model_dump(exclude_none=True))
    except ConfigError as error:
        place = ("verticals", vertical.name, "sla")
        raise ConfigError(f"{config.origin.where(place)}{error.message}", hint=error.hint) from None


def is_folder_vertical(vertical: Vertical[Any, Any]) -> bool:
    """Whether the vertical reads folders: it has a ``discover`` of its own."""
    return type(vertical).discover is not Vertical.discover


def doors(kind: type[Vertical[Any, Any]]) -> list[str]:
    """Which doors a class of vertical opens: ``http``, ``kafka``, ``folder``."""
    records = ["http", "kafka"] if kind.request is not None else []
    folders = kind.discover is not Vertical.discover
    return records + (["folder"] if folders else []) + (["http"] if folders and not records else [])


def build_engine(
    config: Config,
    verticals: Mapping[str, Vertical[Any, Any]],
    *,
    steps_soon: bool = False,
    rows: Rows = None,
) -> Engine:
    """An engine, not yet started, that has every model of the verticals.

    A model that several verticals bring is loaded once.

    Args:
        config: the settings of all.
        verticals: by name.
        steps_soon: what forks workers for heavy steps is started beside the models.
        rows: smallest and largest batch where neither config nor vertical says; ``None``: the
            engine's own.

    Raises:
        ConfigError: a setting of ``[engine]`` is wrong for this machine, or two verticals bring
            different models of one name.
        ModelError: a model is missing or damaged.
        DeviceError: the device is not there.
    """
    engine = Engine(**config.engine.model_dump(), cluster=config.cluster.model_dump())
    if steps_soon:
        for vertical in verticals.values():
            engine.prepare_steps(type(vertical).__module__)
    brought: dict[str, tuple[str, Model, object]] = {}
    for vertical in verticals.values():
        batches = _batch_range(vertical, config, rows)
        for model in models_of(vertical, config):
            name = model.spec.name
            by, first, range_ = brought.setdefault(name, (vertical.name, model, batches))
            _check_shared(name, (by, first, range_), (vertical.name, model, batches))
            _add(engine, config, vertical, model, batches)
    return engine


def _batch_range(vertical: Vertical[Any, Any], config: Config, otherwise: Rows) -> Any:
    return config.vertical(vertical.name).batch_range or vertical.batch_range or otherwise


def _add(
    engine: Engine, config: Config, vertical: Vertical[Any, Any], model: Model, rows: Any
) -> None:
    """Add a model of a vertical, with the settings of its table."""
    options: dict[str, Any] = {} if rows is None else {"batch_range": rows}
    engine.add(model, sla=sla_of(vertical, config), **options)


@contextlib.contextmanager
def running(
    config: Config,
    verticals: Mapping[str, Vertical[Any, Any]],
    *,
    follow: bool = False,
    steps_soon: bool = False,
    rows: Rows = None,
) -> Iterator[Engine]:
    """The engine of :func:`build_engine`, started; at the end it is closed, then the verticals.

    Args:
        config: the settings of all.
        verticals: by name.
        follow: take up defaults that change in the store meanwhile.
        steps_soon, rows: see :func:`build_engine`.
    """
    with contextlib.ExitStack() as stack:
        for vertical in verticals.values():
            stack.callback(vertical.close)
        built = build_engine(config, verticals, steps_soon=steps_soon, rows=rows)
        engine = stack.enter_context(built)
        if follow:

            def add(vertical: Vertical[Any, Any], model: Model) -> None:
                if config.engine.backend in ("auto", "onnxruntime"):
                    export_ahead(model)
                _add(engine, config, vertical, model, _batch_range(vertical, config, rows))

            stack.enter_context(following(engine, list(verticals.values()), add))
        yield engine


def _check_shared(
    name: str, one: tuple[str, Model, object], other: tuple[str, Model, object]
) -> None:
    """Refuse two models of one name: a call could not say which of them it means."""
    if one[1] is not other[1] and (one[1].spec, one[1].digest()) != (
        other[1].spec,
        other[1].digest(),
    ):
        raise ConfigError(
            f"verticals {one[0]} and {other[0]} bring different models named {name}",
            hint=f"give one of them another name, such as {other[0]}-{name}",
        )
    if one[2] != other[2]:
        raise ConfigError(
            f"verticals {one[0]} and {other[0]} share model {name}, but their batch_range differs: "
            f"{one[2]} and {other[2]}",
            hint="give both the same batch_range",
        )


def plan(config: Config, names: Sequence[str] = ()) -> dict[str, Any]:
    """What would run, after everything that can be checked has been checked.

    Raises:
        PlinthError: whatever would keep the commands from starting.
    """
    config.api_key()
    verticals = load_verticals(config, names)
    engine = build_engine(config, verticals)
    found = engine.status()
    return {
        "config": config.origin.file,
        "engine": config.engine.model_dump() | {"device": found["device"]},
        "models": found["models"],
        "verticals": {name: _described(v, config) for name, v in verticals.items()},
    }


def _described(vertical: Vertical[Any, Any], config: Config) -> dict[str, Any]:
    return {
        "summary": vertical.summary,
        "doors": doors(type(vertical)),
        "route": f"POST /v1/{vertical.name}/{vertical.action}",
        "models": {m.spec.name: m.spec.version for m in models_of(vertical, config)},
        "sla": dataclasses.asdict(sla_of(vertical, config)),
    }


def sample_data() -> Path:
    """The folder of sample payments and a sample CT study that comes with the package.

    Raises:
        ConfigError: it was left out when the package was built.
    """
    folder = Path(str(importlib.resources.files("plinth"))) / "sample_data"
    if not folder.is_dir():
        raise ConfigError(f"there is no {folder}", hint="install plinth-engine again")
    return folder
