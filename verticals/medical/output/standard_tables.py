"""The standard's tables as highdicom carries them, read module by module.

highdicom looks up which attributes a module has, and for that reads 22 MB of JSON whole, on first
use: a quarter to half a second, and 70 to 95 MB that stay. An object that is made here needs a few
dozen of the 436 modules; only these are read, when they are first asked for.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "get_module_attribute_map"
BLOCK = 1 << 20
_KEY = re.compile(rb'\n  "([^"\n]+)": \[')


class Modules(Mapping[str, list[dict[str, Any]]]):
    """Attributes by module, from a file of JSON that is indented by two spaces.

    Args:
        path: of the file.

    Raises:
        ValueError: it is laid out in another way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        starts = list(_keys(path))
        if not starts or len(dict(starts)) < len(starts):
            raise ValueError(f"{path.name} is not laid out by module")
        ends = [at for _, at in starts[1:]] + [path.stat().st_size]
        self._places = {key: (at, end) for (key, at), end in zip(starts, ends, strict=True)}
        self._read: dict[str, list[dict[str, Any]]] = {}

    def __getitem__(self, key: str) -> list[dict[str, Any]]:
        if key not in self._read:
            start, end = self._places[key]
            with self._path.open("rb") as file:
                file.seek(start)
                text = file.read(end - start).rstrip(b",}\n ")
            self._read[key] = json.loads(b"{" + text + b"}")[key]
        return self._read[key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _keys(path: Path) -> Iterator[tuple[str, int]]:
    """Keys of the outermost object, and where each begins."""
    at, kept = 0, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            part = kept + block
            whole = max(0, part.rfind(b"\n"))
            for found in _KEY.finditer(part, 0, whole):
                yield found[1].decode(), at - len(kept) + found.start() + 1
            kept, at = part[whole:], at + len(block)


@lru_cache(maxsize=1)
def read_in_parts() -> bool:
    """Let highdicom look modules up in :class:`Modules`; whether it does.

    It does not where a version of it keeps its tables in another way, and then reads all of it.
    """
    import highdicom  # heavy: only when an object is written

    utils = sys.modules.get("highdicom._standard_utils")
    whole = getattr(utils, NAME, None)
    path = Path(highdicom.__file__).parent / "_standard" / "module_attribute_map.json"
    if not isinstance(utils, ModuleType) or whole is None or not path.is_file():
        return False
    try:
        modules = Modules(path)
    except ValueError:
        return False
    for name, module in list(sys.modules.items()):
        if name.startswith("highdicom.") and getattr(module, NAME, None) is whole:
            setattr(module, NAME, lambda: modules)
    return True
