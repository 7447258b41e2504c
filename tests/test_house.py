"""The walls of the house, drawn as tests. What each protects is in docs/architecture.md."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import engine
import verticals
from verticals.testing import devices_named

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "verticals", "pipelines")
MAY_IMPORT = {
    "engine": {"engine"},
    "verticals": {"engine", "verticals"},
    "pipelines": {"engine", "verticals", "pipelines"},
}
DOORS = {
    *("fastapi", "starlette", "uvicorn", "httpx", "requests", "aiohttp", "http", "flask"),
    *("kafka", "typer", "click", "tomllib", "argparse"),
}
CONCURRENCY = {"threading", "multiprocessing", "concurrent", "asyncio", "socket", "subprocess"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LONGEST = 400

ENGINE_NAMES = """
    Answer Batch Batcher Call Cancelled Closed ConfigError DeadlineRefused DeviceError Engine Flow
    InputError LatencyModel Model ModelError ModelSpec ModelStore PlinthError QueueFull Refused Sla
    TensorSpec Tiling Timing Work architecture from_pretrained
"""
VERTICALS_NAMES = "Item Settings Vertical"


def files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    try:
        return ast.parse(text)
    except SystemError:
        # CPython 3.11 counts the parser's depth across threads (gh-106905); another may be at it.
        return ast.parse(text)


@cache
def is_module(name: str) -> bool:
    base = ROOT / name.replace(".", "/")
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


def imported(path: Path, node: ast.AST) -> Iterator[str]:
    """Modules that an import statement names, absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [base])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base


def imports(path: Path) -> set[str]:
    """Every module a file imports, late imports included."""
    return {name for node in ast.walk(tree(path)) for name in imported(path, node)}


def imports_at_load(path: Path) -> set[str]:
    """Modules a file imports while it is itself imported."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
                continue
            yield node
            for part in ("body", "orelse", "finalbody"):
                if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
                    yield from statements(getattr(node, part, []))

    return {name for node in statements(tree(path).body) for name in imported(path, node)}


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", files(*ROOMS), ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    room = relative(path).partition("/")[0]
    upward = {name for name in imports(path) if top(name) in ROOMS} - {
        name for name in imports(path) if top(name) in MAY_IMPORT[room]
    }
    assert not upward, f"{room} must not know {sorted(upward)}"


@pytest.mark.parametrize("path", files("verticals"), ids=relative)
def test_verticals_do_not_know_each_other(path: Path) -> None:
    own = relative(path).split("/")[1]
    domains = {p.name for p in (ROOT / "verticals").iterdir() if p.is_dir()} - {"testing", own}
    others = {n for n in imports(path) if n.split(".")[:2] in [["verticals", d] for d in domains]}
    assert not others, f"a vertical stands alone, but this one imports {sorted(others)}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_cycles(room: str) -> None:
    known = {module_name(path): path for path in files(room)}
    graph = {name: imports_at_load(path) & known.keys() for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these modules import each other: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("path", files("verticals", "pipelines"), ids=relative)
def test_only_the_engine_names_devices(path: Path) -> None:
    # The kit that looks for device names must spell them.
    allowed = relative(path) == "verticals/testing/source.py"
    assert allowed or not devices_named(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", files("engine", "verticals"), ids=relative)
def test_http_kafka_and_argv_stay_in_pipelines(path: Path) -> None:
    doors = {name for name in imports(path) if top(name) in DOORS}
    if is_script(path):
        doors.discard("argparse")
    assert not doors, f"only pipelines may import {sorted(doors)}"


@pytest.mark.parametrize("path", files("verticals"), ids=relative)
def test_verticals_start_no_threads_and_open_no_sockets(path: Path) -> None:
    found = {name for name in imports(path) if top(name) in CONCURRENCY}
    allowed = relative(path).startswith("verticals/testing/") or is_script(path)
    assert allowed or not found, f"a vertical is a flow; it does not need {sorted(found)}"


def is_script(path: Path) -> bool:
    """A file run with ``python -m``; it may read its own arguments."""
    return path.name == "__main__.py" or any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree(path).body
    )


@pytest.mark.parametrize("path", files(*ROOMS, "tests", "benchmarks"), ids=relative)
def test_files_stay_small_enough_to_read(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it by noun"


@pytest.mark.parametrize("path", files(*ROOMS, "benchmarks"), ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    unsafe = {name for name in imports(path) if top(name) in UNSAFE}
    assert not unsafe, f"{sorted(unsafe)} can run what a file says: use safetensors or JSON"
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        said, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"line {node.lineno}: {said}"
        if said == "torch.load":
            assert given.get("weights_only") == "True", f"{where} without weights_only=True"
        assert said != "torch.save", f"{where} writes a pickle: use safetensors"
        assert given.get("allow_pickle", "False") == "False", f"{where} unpickles"
        assert not said.startswith("yaml.") or "safe" in said, f"{where} builds any object"


@pytest.mark.parametrize("path", files("tests"), ids=relative)
def test_no_test_sleeps(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            said = ast.unparse(node.func)
            assert said not in ("time.sleep", "asyncio.sleep", "sleep", "anyio.sleep"), (
                f"line {node.lineno} sleeps: wait for an event, or turn a clock by hand"
            )


def test_public_names_change_on_purpose() -> None:
    assert sorted(engine.__all__) == sorted(ENGINE_NAMES.split())
    assert sorted(verticals.__all__) == sorted(VERTICALS_NAMES.split())


@pytest.mark.parametrize("path", files(*ROOMS), ids=relative)
def test_everything_public_has_a_docstring(path: Path) -> None:
    if path.stat().st_size:
        assert ast.get_docstring(tree(path)), "the module has no docstring"
    missing = [name for name in undocumented(path) if not inherits_docstring(path, name)]
    assert not missing, f"no docstring: {missing}"


def undocumented(path: Path) -> Iterator[str]:
    """Dotted names of public classes, functions and methods without a docstring of their own."""

    def below(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_"):
                continue
            overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
            if not ast.get_docstring(node) and not overload:
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from below(node.body, f"{prefix}{node.name}.")

    return below(tree(path).body, "")


def inherits_docstring(path: Path, name: str) -> bool:
    """A method that overrides a documented one says what its base says."""
    if "." not in name:
        return False
    pytest.importorskip(top(module_name(path)), reason="this room is not installed")
    here = importlib.import_module(module_name(path))
    for part in name.split("."):
        here = inspect.getattr_static(here, part)
    return inspect.getdoc(here) is not None or _base_has_doc(path, name)


def _base_has_doc(path: Path, name: str) -> bool:
    kind_name, method = name.rsplit(".", 1)
    kind = importlib.import_module(module_name(path))
    for part in kind_name.split("."):
        kind = getattr(kind, part)
    return any(inspect.getdoc(vars(base).get(method)) for base in inspect.getmro(kind)[1:])


@pytest.mark.parametrize("path", files(*ROOMS, "tests", "benchmarks"), ids=relative)
def test_no_path_of_somebodys_machine(path: Path) -> None:
    places = re.findall(r"[\"'\s](/(?:home|root|work|Users)/[\w./-]*)", path.read_text("utf-8"))
    assert not places, f"these exist on one machine only: {places}"
