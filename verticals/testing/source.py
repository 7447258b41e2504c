"""What the source of a vertical says: it names no device."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

_DEVICE = re.compile(r"(cuda|npu|xpu|mps|hip|hpu)(:\d+)?")
_ROOMS = ("cuda", "npu", "xpu", "mps", "accelerator")


def devices_named(source: str) -> list[tuple[int, str]]:
    """Places where Python source names an accelerator.

    Args:
        source: text of a module.

    Returns:
        Line number and text of each string such as ``"cuda:0"``, each ``torch.cuda`` (or
        ``npu``, ``xpu``, ``mps``, ``accelerator``) and each ``.cuda()``.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if _DEVICE.fullmatch(text):
                found.append((node.lineno, repr(text)))
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in _ROOMS:
                found.append((node.lineno, f"torch.{attr}"))
            case ast.Call(func=ast.Attribute(attr=attr)) if attr in _ROOMS:
                found.append((node.lineno, f".{attr}()"))
    return sorted(set(found))


def files_of(kind: type) -> list[Path]:
    """The Python files a class was written in: its package's, or its own module alone."""
    own = Path(inspect.getfile(kind))
    if not sys.modules[kind.__module__].__package__ or _is_test(own):
        return [own]
    return sorted(path for path in own.parent.rglob("*.py") if not _is_test(path))


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") or path.name == "conftest.py"
