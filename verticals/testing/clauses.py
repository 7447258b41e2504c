"""The clauses of the contract about what a vertical declares: names, types, doors, source.

Each raises AssertionError with what the author should change.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from plinth.engine import InputError, Model, Sla
from plinth.verticals.contract import Item, Settings, Vertical
from plinth.verticals.testing.case import Case, NotApplicable, close, difference
from plinth.verticals.testing.source import devices_named, files_of

Clause = Callable[[Case], None]

NAME = re.compile(r"[a-z][a-z0-9_]*")
ITEM_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
DOORS_OWN = ("sla", "batch_range")


def must(holds: object, otherwise: str) -> None:
    """Raise AssertionError with ``otherwise`` unless ``holds`` is true."""
    if not holds:
        raise AssertionError(otherwise)


def names(case: Case) -> None:
    """Name, action, summary and SLA are of use to routes, tables and lists."""
    kind = type(case.vertical)
    for attribute in ("name", "action"):
        value = str(getattr(kind, attribute, None))
        must(
            NAME.fullmatch(value),
            f"{attribute} is {value!r}: make it lower case letters, digits and _, "
            "it is part of a route and a config table",
        )
    summary = str(getattr(kind, "summary", ""))
    must(
        summary.strip() and "\n" not in summary,
        f"summary is {summary!r}: make it one line, `plinth list` shows it",
    )
    must(isinstance(kind.sla, Sla), f"sla is {kind.sla!r}: make it an engine.Sla")


def types(case: Case) -> None:
    """Request, response and settings are pydantic types with a JSON schema."""
    kind = type(case.vertical)
    declared: list[tuple[str, Any, type[BaseModel]]] = [
        ("response", getattr(kind, "response", None), BaseModel),
        ("settings_type", kind.settings_type, Settings),
    ]
    if kind.request is not None:
        declared.append(("request", kind.request, BaseModel))
    for attribute, given, base in declared:
        if not (isinstance(given, type) and issubclass(given, base)):
            raise AssertionError(f"{attribute} is {given!r}: make it a subclass of {base.__name__}")
        try:
            given.model_json_schema()
        except Exception as error:
            raise AssertionError(
                f"{attribute} {given.__name__} has no JSON schema: {error}. "
                "Use types that JSON knows, or exclude the field"
            ) from error
    taken = [name for name in DOORS_OWN if name in kind.settings_type.model_fields]
    must(not taken, f"the settings {taken} belong to the doors: give them other names")


def doors(case: Case) -> None:
    """At least one kind of door is open, and wholly."""
    must(
        case.takes_records or case.takes_folders,
        "neither `request` (records) nor discover() (folders) is there: define one",
    )
    must(
        not case.takes_folders or type(case.vertical).load is not Vertical.load,
        "discover() is there but load() is not: define it, it reads what discover() found",
    )


def models(case: Case) -> None:
    """Models are engine models with inputs and outputs, in eval mode, each name once."""
    brought = list(case.vertical.models())
    for model in brought:
        if not isinstance(model, Model):
            raise AssertionError(
                f"models() has a {type(model).__name__}: give engine.Model, "
                "from a ModelStore or as Model(spec, module)"
            )
        must(
            model.spec.inputs and model.spec.outputs,
            f"the spec of {model.spec.name!r} names no inputs or outputs: add their TensorSpec",
        )
        must(
            model.module is None or not model.module.training,
            f"{model.spec.name!r} is in training mode: call .eval() before Model(...)",
        )
    known = [model.spec.name for model in brought]
    must(len(set(known)) == len(known), f"models() has a name twice: {known}")


def example(case: Case) -> None:
    """The example is a request, and survives being written and parsed."""
    shown = case.vertical.example()
    key = case.vertical.key(shown)
    must(
        key is None or isinstance(key, str),
        f"key() gave {type(key).__name__}: give a str, or None",
    )
    request = case.vertical.request
    if request is None:
        raise NotApplicable("takes folders only")
    must(
        isinstance(shown, request),
        f"example() gave a {type(shown).__name__}: give a {request.__name__}",
    )
    again = case.vertical.parse(shown.model_dump_json().encode())
    must(
        close(again, shown),
        f"example() written as JSON and parsed is another request ({difference(again, shown)}): "
        "the API docs show it and warm-up sends it, so it must survive",
    )


def devices(case: Case) -> None:
    """The source names no device."""
    try:
        files = files_of(type(case.vertical))
    except OSError:
        raise NotApplicable("its source is not in a file") from None
    for path in files:
        for line, text in devices_named(path.read_text(encoding="utf-8")):
            raise AssertionError(
                f"{path.name}:{line} says {text}: leave devices to the engine, "
                "rows and modules stay in host memory"
            )


def folders(case: Case) -> None:
    """Items of a folder have safe, unique, lasting ids, and an empty folder has none."""
    if not case.takes_folders:
        raise NotApplicable("takes records only")
    with tempfile.TemporaryDirectory() as name:
        try:
            found = list(case.vertical.discover(Path(name)))
        except InputError:
            found = []
        must(not found, "discover() found items in an empty folder")
    if case.folder is None:
        return
    items = list(case.vertical.discover(case.folder))
    must(items, f"discover() found nothing in {case.folder.name}: give a folder that has items")
    ids = [item.id for item in items]
    for item in items:
        must(isinstance(item, Item), f"discover() gave a {type(item).__name__}: give an Item")
        must(
            ITEM_ID.fullmatch(item.id),
            f"the item id {item.id!r} cannot name a folder: use [A-Za-z0-9._-], at most 128",
        )
    must(len(set(ids)) == len(ids), f"discover() gave an id twice: {sorted(ids)}")
    must(
        sorted(item.id for item in case.vertical.discover(case.folder)) == sorted(ids),
        "discover() gave other ids the second time: derive them from what the item is, "
        "a batch is resumed by them",
    )
    case.one(case.vertical.load(items[0]))


DECLARED: dict[str, Clause] = {
    "name and summary": names,
    "types and schemas": types,
    "a door is open": doors,
    "models": models,
    "example": example,
    "no device is named": devices,
    "folders are discovered": folders,
}
"""What must hold -> the function that checks it."""
