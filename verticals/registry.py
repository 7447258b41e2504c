"""Discovery: which verticals are installed, and how one is brought to life.

A vertical is found through the entry-point group ``plinth.verticals``, whoever wrote it; the
built-in ones take the same road. Nothing is imported before it is asked for, and a plug-in
that cannot be imported is listed with its reason and stops nobody else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from plinth.distribution import extra_of, install_hint
from plinth.engine import ConfigError, PlinthError
from plinth.verticals.contract import Settings, Vertical

GROUP = "plinth.verticals"


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of ``plinth list``.

    Args:
        name: name of the entry point, the route and the config table.
        summary: the vertical's own one-line summary; empty when it cannot be imported.
        distribution: the installed distribution it comes from.
        version: version of that distribution.
        error: why it cannot be used; ``None`` when it can.
    """

    name: str
    summary: str
    distribution: str
    version: str
    error: str | None = None


def names() -> list[str]:
    """Names of all installed verticals, sorted; imports none of them."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find(name: str) -> type[Vertical[Any, Any]]:
    """The class of an installed vertical, imported now.

    Args:
        name: name of its entry point.

    Raises:
        ConfigError: it is not installed, installed twice, cannot be imported, or is not a
            :class:`Vertical` of that name.
    """
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        raise unknown(name)
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in found))
        raise ConfigError(
            f"two distributions bring a vertical named {name!r}: {owners}",
            hint="uninstall one, or have its author rename the entry point and the class's name",
        )
    return _checked(found[0], _import(found[0]))


def load(name: str, settings: Mapping[str, Any] | Settings | None = None) -> Vertical[Any, Any]:
    """An instance of an installed vertical with checked settings.

    Args:
        name: name of its entry point.
        settings: the table ``[verticals.<name>]``, as plain data or already checked.

    Raises:
        ConfigError: as :func:`find`, or the settings are wrong; an unknown key is answered
            with the nearest known one.
    """
    kind = find(name)
    checked = settings if isinstance(settings, Settings) else _settings(kind, settings or {})
    if not isinstance(checked, kind.settings_type):
        raise ConfigError(
            f"[verticals.{name}] takes {kind.settings_type.__name__}, not {type(checked).__name__}"
        )
    try:
        return kind(checked)
    except PlinthError:
        raise
    except Exception as error:
        raise ConfigError(
            f"vertical {name!r} could not start: {type(error).__name__}: {error}",
            hint="this is a fault of the plug-in, please tell its author",
        ) from error


def describe() -> list[Listing]:
    """Every installed vertical, sorted by name, the broken ones with their reason."""
    entries = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _owner(entry)))
    return [_listing(entry) for entry in entries]


def _listing(entry: EntryPoint) -> Listing:
    dist = entry.dist
    distribution, version = (dist.name, dist.version) if dist else ("unknown", "")
    try:
        summary, error = find(entry.name).summary, None
    except ConfigError as reason:
        summary, error = "", str(reason)
    return Listing(entry.name, summary, distribution, version, error)


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _import(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"vertical {entry.name!r} of {_owner(entry)} needs the module {error.name!r}, "
            "which is not installed",
            hint=_install_hint(entry, error.name or ""),
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"vertical {entry.name!r} of {_owner(entry)} cannot be imported: "
            f"{type(error).__name__}: {error}",
            hint=f"the entry point is {entry.value!r}; update or uninstall its distribution",
        ) from error


def _install_hint(entry: EntryPoint, module: str) -> str:
    """The extra that brings the module; else the one named like the vertical; else all of it."""
    if entry.dist is None:
        return f"install what {entry.value!r} imports"
    if extra_of(module, entry.dist.name):
        return install_hint(module, entry.dist.name)
    extras = entry.dist.metadata.get_all("Provides-Extra") or []
    extra = f"[{entry.name}]" if entry.name in extras else ""
    return f"pip install '{entry.dist.name}{extra}'"


def _checked(entry: EntryPoint, loaded: object) -> type[Vertical[Any, Any]]:
    where = f"entry point {entry.name} = {entry.value!r} of {_owner(entry)}"
    if not (isinstance(loaded, type) and issubclass(loaded, Vertical)):
        raise ConfigError(
            f"{where} is not a subclass of verticals.Vertical",
            hint="point the entry point at the class itself, as 'package.module:Class'",
        )
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise ConfigError(f"{where} does not define {missing}", hint="define them in the class")
    for attribute in ("name", "summary", "response"):
        if not hasattr(loaded, attribute):
            raise ConfigError(
                f"{where} has no class attribute {attribute!r}", hint="set it in the class"
            )
    if loaded.name != entry.name:
        raise ConfigError(
            f"{where} calls itself {loaded.name!r}",
            hint=f"the class attribute and the entry point must agree: name = {entry.name!r}",
        )
    return loaded


def unknown(name: str) -> ConfigError:
    """The error for a name no installed vertical has, with the nearest one that is."""
    installed = names()
    if not installed:
        return ConfigError(
            f"no vertical is installed, so there is no {name!r}",
            hint="install Plinth itself (pip install -e . in a checkout): "
            "the built-in verticals come with it",
        )
    return ConfigError(
        f"no vertical named {name!r}{did_you_mean(name, installed)}; "
        f"installed: {', '.join(installed)}",
        hint=f"pip install the distribution that brings it (entry-point group {GROUP!r})",
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the nearest known word, or nothing when none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _settings(kind: type[Vertical[Any, Any]], table: Mapping[str, Any]) -> Settings:
    try:
        return kind.settings_type.model_validate(dict(table))
    except ValidationError as error:
        problems = [
            _problem(kind, item) for item in error.errors(include_url=False, include_input=False)
        ]
    raise ConfigError(
        f"[verticals.{kind.name}] {'; '.join(problems)}",
        hint="known keys: " + (", ".join(_keys(kind.settings_type)) or "none"),
    )


def _problem(kind: type[Vertical[Any, Any]], item: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys(_model_at(kind.settings_type, item["loc"][:-1]))
        return f"{path}: unknown key{did_you_mean(str(item['loc'][-1]), known)}"
    return f"{path}: {item['msg']}" if path else str(item["msg"])


def _keys(model: type[BaseModel] | None) -> list[str]:
    if model is None:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], path: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The nested model that the location of a pydantic error leads to, if it can be told."""
    here: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int) or here is None:
            continue
        fields = {field.alias or name: field for name, field in here.model_fields.items()}
        here = _model_in(fields[part].annotation) if part in fields else None
    return here


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
