"""Rooms that load what they show when it is first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def loads_on_demand(room: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The ``__getattr__`` of a package that names of its modules can be imported from.

    What needs no torch is then imported without it, as by a command that checks a file.

    Args:
        room: the package.
        homes: names, apart by spaces, by the module in the package that has them.

    Returns:
        Gives a name of the table, and raises AttributeError for another.
    """
    where = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{room}.{where[name]}"), name)
        setattr(sys.modules[room], name, found)
        return found

    return get
