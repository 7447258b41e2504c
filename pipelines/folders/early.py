"""A fork server that imports while the command itself does.

A command whose worker processes are forked from one that has imported all would import everything
twice, one after the other: itself, and then that process. This starts it first; it needs nothing
but the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOMS = Path(__file__).resolve().parents[2]
CARRIER = "plinth.pipelines.folders.carrier"


def begin(vertical: str | None) -> Any:
    """Start a process that imports what carries items, and a packaged vertical.

    Returns:
        What :func:`plinth.engine.lanes.fork_server.offered` takes; ``None``: there is none here.
    """
    server = _server()
    if not server.is_possible():
        return None
    modules = [CARRIER]
    if vertical and (ROOMS / "verticals" / vertical / "vertical.py").is_file():
        modules.append(f"plinth.verticals.{vertical}.vertical")
    try:
        return server.start_process(*modules)
    except OSError:
        return None  # the engine starts one later, and tells what is wrong with that


def _server() -> ModuleType:
    """The module by its path: by its name all of the engine would be imported first."""
    name = "plinth_fork_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOMS / "engine" / "lanes" / "fork_server.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclass looks itself up there
        spec.loader.exec_module(module)
    return sys.modules[name]
