"""Hot modules as machine code: built from their own source by mypyc, found only while they match.

Modules named in :data:`HOT` are plain Python and run as such. Where mypyc and a C compiler are,

    python -m plinth.compiled

compiles the same files into a folder beside this one, which is named by a digest of all of them.
A package of hot modules looks there first (:func:`extended`), so what was compiled of another
source, for another Python or another machine is never found: then the source runs.
``PLINTH_COMPILED=0`` in the environment has it run in any case.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "__compiled__"
SWITCH = "PLINTH_COMPILED"
HOT: Mapping[str, tuple[str, ...]] = {
    "plinth.verticals.finance.features": ("timeline", "places", "online"),
}
"""Modules by package. Those of a package call each other without the interpreter in between."""
WRITTEN: Mapping[str, str] = {"plinth.verticals.finance.features": "program"}
"""By package the module whose ``generated()`` writes more of them: texts by name."""
_DIGEST = re.compile(r"[0-9a-f]{16}")
_SECONDS = 1_200
_OPTIONS = """
[mypy]
python_version = {}
follow_imports = skip
ignore_missing_imports = True
namespace_packages = False
"""
"""The compiler sees hot modules and the standard library alone, so that their digest is enough."""
_SETUP = """
import sys
from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup

found = []
for package in sys.argv.pop(1).split(","):
    files = sorted(map(str, Path(package.replace(".", "/")).glob("[!_]*.py")))
    words = ["--config-file", "mypy.ini", *files]
    found += mypycify(words, group_name=f"{package}.hot", debug_level="0", target_dir="generated")
setup(name="hot", packages=[], ext_modules=found)
"""
_used: dict[str, bool] = {}


class NotCompiled(RuntimeError):
    """The modules could not be compiled; the text says why and what to do."""


def _sources() -> dict[str, Path]:
    """Files of the hot modules, by their path below the folder that holds ``plinth``."""
    names = (f"{package}.{one}" for package, ones in HOT.items() for one in ones)
    paths = (name.replace(".", "/") + ".py" for name in names)
    return {path: HERE.parent / path for path in paths}


def digest() -> str:
    """Of the hot modules' source, how they are compiled, the Python and the machine."""
    told = hashlib.sha256(EXTENSION_SUFFIXES[0].encode())
    for name, path in {**_sources(), "": Path(__file__)}.items():
        told.update(f"\0{name}\0".encode() + path.read_bytes())
    return told.hexdigest()[:16]


def folder() -> Path | None:
    """Where the compiled modules of this source are; ``None``: nowhere, or they may not be used."""
    if os.environ.get(SWITCH) == "0":
        return None
    found = FOLDER / digest()
    return found if found.is_dir() else None


def extended(path: Iterable[str], package: str) -> list[str]:
    """The ``__path__`` of a package of hot modules: compiled ones come first, if there are any.

    Args:
        path: as it is.
        package: its name.
    """
    there = folder()
    _used[package] = there is not None
    return [*path] if there is None else [str(there / package.replace(".", "/")), *path]


def hot_code_is_compiled() -> bool:
    """Whether hot modules run compiled in this process, or would, where none is imported yet."""
    return all(_used.values()) if _used else folder() is not None


def how_hot_code_runs() -> str:
    """The same for people, with the reason."""
    if hot_code_is_compiled():
        return "compiled"
    if os.environ.get(SWITCH) == "0":
        return f"interpreted, as {SWITCH}=0 says"
    others = FOLDER.is_dir() and any(_DIGEST.fullmatch(one.name) for one in FOLDER.iterdir())
    return f"interpreted; what is compiled is {'of another source' if others else 'nothing'}"


def build() -> Path:
    """Compile the hot modules; what was compiled of another source is removed.

    Returns:
        The folder that holds them.

    Raises:
        NotCompiled: mypyc or a C compiler is missing or fails, or the folder cannot be written to.
    """
    done = FOLDER / digest()
    try:
        FOLDER.mkdir(exist_ok=True)
        if not done.is_dir():
            with tempfile.TemporaryDirectory(dir=FOLDER) as room:
                _compile(Path(room), done)
        for other in FOLDER.iterdir():
            if other != done and _DIGEST.fullmatch(other.name):
                shutil.rmtree(other)
    except OSError as why:
        raise NotCompiled(f"{FOLDER} cannot be written to: {why}") from why
    return done


def _compile(room: Path, done: Path) -> None:
    """Compile a copy, which has nothing else to see, and put the result in its place at once."""
    work, made = room / "source", room / "made"
    for name, path in _sources().items():
        _write(work / name, path.read_text("utf-8"))
    for package, module in WRITTEN.items():
        for name, text in import_module(f"{package}.{module}").generated().items():
            _write(work / package.replace(".", "/") / f"{name}.py", text)
    for inner in work.glob("**/"):
        if inner != work:
            (inner / "__init__.py").touch()
    _write(work / "mypy.ini", _OPTIONS.format(sysconfig.get_python_version()))
    _write(work / "setup.py", _SETUP)
    words = ("build_ext", f"--build-lib={made}", f"--build-temp={room / 'objects'}")
    ran = subprocess.run(
        [sys.executable, "setup.py", ",".join(HOT), *words],
        cwd=work, capture_output=True, text=True, check=False, timeout=_SECONDS,
    )  # fmt: skip
    if ran.returncode:
        raise NotCompiled(
            f"{(ran.stdout + ran.stderr)[-2_000:].strip()}\nThe hot modules were not compiled. It "
            "needs pip install 'plinth-engine[compile]', a C compiler and Python's headers."
        )
    for source in work.glob("plinth/**/[!_]*.py"):
        if not (made / source.relative_to(work)).with_suffix(EXTENSION_SUFFIXES[0]).is_file():
            raise NotCompiled(f"{source.relative_to(work)} was not compiled\n{ran.stdout[-2_000:]}")
    made.rename(done)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    try:
        print(build())
    except NotCompiled as error:
        sys.exit(str(error))
