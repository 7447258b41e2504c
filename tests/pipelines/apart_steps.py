"""Heavy steps of the verticals in apart.py; a worker process imports this file alone."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path


def double(value: float) -> tuple[float, int]:
    """Twice a number, and who computed it; 13 is refused, 666 a fault, 911 a crash."""
    if value == 911:
        ctypes.string_at(0)
    if value == 666:
        raise RuntimeError("secret 4111111111111111")
    if value == 13:
        from plinth.engine import InputError  # brings torch, which the others do not need

        raise InputError("13 cannot be doubled", field="value", hint="send 12", reason="unlucky")
    return 2 * value, os.getpid()


def read(path: Path) -> float:
    return float(path.read_text())


def write(twice: float, folder: Path) -> list[Path]:
    (folder / "writer.txt").write_text(str(os.getpid()))
    (folder / "twice.txt").write_text(str(twice))
    return [folder / "twice.txt", folder / "writer.txt"]
