"""The walls of the house, drawn as tests. What each protects is in docs/architecture.md."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import plinth
from plinth import engine, verticals
from plinth.verticals.testing import devices_named

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "verticals", "pipelines")
MAY_IMPORT = {
    "engine": {"distribution", "engine", "faces"},
    "verticals": {"compiled", "distribution", "engine", "faces", "verticals"},
    "pipelines": {"compiled", "distribution", "engine", "verticals", "pipelines"},
}
DOORS = {
    *("fastapi", "starlette", "uvicorn", "granian", "httpx", "requests", "aiohttp", "http"),
    *("kafka", "confluent_kafka", "grpc", "typer", "click", "tomllib", "argparse", "flask"),
}
CONCURRENCY = {"threading", "multiprocessing", "concurrent", "asyncio", "socket", "subprocess"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAY_PICKLE = {"engine/lanes/worker.py"}
"""Between a process and a child that it started itself, over a socket that nobody else has."""
ARGUMENTS = 8
"""Most arguments of a function, self and those with a default that are keyword-only left out."""
FIELDS = 16
"""Most private fields a class may set on itself."""
FLAT = 14
"""Most files at one level of a room."""

ENGINE_NAMES = """
    Answer Batch Batcher Call Cancelled Closed Compute ComputeError ConfigError DeadlineRefused
    DeviceError Engine EngineFailed Flow InputError LatencyModel Model ModelError ModelSpec
    ModelStore Pause PlinthError QueueFull Refused Sla TensorSpec Tiling Timing Told Work
    architecture from_pretrained
"""
VERTICALS_NAMES = "Item LeftOut Query Settings Tally Vertical WithArtefacts"
PLINTH_NAMES = """
    Answer Call Cancelled Closed Compute ComputeError ConfigError DeadlineRefused DeviceError
    Engine EngineFailed Flow InputError Item Model ModelError ModelSpec ModelStore Pause PlinthError
    QueueFull Refused Settings Sla TensorSpec Tiling Timing Vertical WithArtefacts __version__
    architecture from_pretrained
"""


@pytest.fixture(scope="module", autouse=True)
def trees_stay() -> Iterator[None]:
    """The trees of all files are kept: looking through their millions of nodes frees nothing."""
    gc.disable()
    yield
    gc.enable()


@cache
def files(*rooms: str) -> tuple[Path, ...]:
    return tuple(sorted(path for room in rooms for path in (ROOT / room).rglob("*.py")))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each_of(*rooms: str) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of all files, which names every file that breaks the rule."""

    def of_rule(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            broken = []
            for path in files(*rooms):
                try:
                    rule(path)
                except AssertionError as error:
                    broken.append(f"{relative(path)}: {error}")
            if broken:
                pytest.fail("\n".join(broken), pytrace=False)

        test.__name__, test.__doc__ = rule.__name__, rule.__doc__
        return test

    return of_rule


def module_name(path: Path) -> str:
    """The dotted name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("plinth", *parts) if parts[0] in ROOMS else parts)


@cache
def tree(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    try:
        return ast.parse(text)
    except SystemError:
        # CPython 3.11 counts the parser's depth across threads (gh-106905); another may be at it.
        return ast.parse(text)


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


@cache
def is_module(name: str) -> bool:
    base = ROOT / "src" / name.replace(".", "/")
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        for alias in node.names:
            yield f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base


@cache
def imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Every module a file imports, late imports included.

    Args:
        path: the file.
        for_types: also what is imported for type checkers alone.
    """

    found: set[str] = set()
    left: list[ast.AST] = [tree(path)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.body if for_types else []
        else:
            found.update(imported(node))
            left += ast.iter_child_nodes(node)
    return found


def top(name: str) -> str:
    """The room of one of our modules, else the package."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "plinth" and rest else first


def room_of(path: Path) -> str:
    """The folder a module lies in; what lies beside rooms stands alone."""
    folder = path.parent
    beside_rooms = folder.parent in (ROOT, ROOT / "verticals")
    return relative(path) if beside_rooms else relative(folder)


def acyclic(graph: dict[str, set[str]], what: str) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these {what} import each other: " + " <- ".join(error.args[1]))


@each_of(*ROOMS)
def test_imports_point_one_way(path: Path) -> None:
    room = relative(path).partition("/")[0]
    ours = {name for name in imports(path) if name.split(".")[0] in ("plinth", *ROOMS)} - {"plinth"}
    upward = {name for name in ours if top(name) not in MAY_IMPORT[room]}
    assert not upward, f"{room} must not know {sorted(upward)}"


@each_of(*ROOMS, "tests", "benchmarks", "src")
def test_there_is_one_way_to_import(path: Path) -> None:
    found = {name for name in imports(path) if name.split(".")[0] in ROOMS or name[0] == "."}
    assert not found, f"import these as plinth.*: {sorted(found)}"


@each_of(*ROOMS)
def test_rooms_take_their_version_alone_from_the_face(path: Path) -> None:
    faces = ("plinth", "plinth.finance", "plinth.medical")
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.module in faces:
            assert [alias.name for alias in node.names] == ["__version__"]


@each_of("verticals")
def test_verticals_do_not_know_each_other(path: Path) -> None:
    own = relative(path).split("/")[1]
    domains = {p.name for p in (ROOT / "verticals").iterdir() if p.is_dir()} - {"testing", own}
    others = {
        name
        for name in imports(path)
        if name.split(".")[:3] in [["plinth", "verticals", domain] for domain in domains]
    }
    assert not others, f"a vertical stands alone, but this one imports {sorted(others)}"


def test_no_module_imports_itself_through_others() -> None:
    """Late imports count: a circle hidden inside a function is a circle."""
    known = {module_name(path): path for path in files(*ROOMS)}
    acyclic(
        {n: imports(path, for_types=False) & known.keys() for n, path in known.items()}, "modules"
    )


def test_no_room_imports_itself_through_others() -> None:
    """A room is a folder; ``__init__`` at the top of a big room gathers, and is left out."""
    known = {module_name(path): path for path in files(*ROOMS)}
    graph: dict[str, set[str]] = {}
    for path in known.values():
        if path.name == "__init__.py":
            continue
        seen = {known[name] for name in imports(path) if name in known}
        rooms = {room_of(other) for other in seen if other.name != "__init__.py"}
        graph.setdefault(room_of(path), set()).update(rooms - {room_of(path)})
    acyclic(graph, "rooms")


@pytest.mark.parametrize("room", [*ROOMS, "verticals/finance", "verticals/medical"])
def test_rooms_are_not_flat(room: str) -> None:
    for folder in {path.parent for path in files(room)}:
        flat = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
        assert len(flat) <= FLAT, f"{relative(folder)} has {len(flat)} files: give it rooms by noun"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_of(*ROOMS)
def test_functions_take_few_arguments(path: Path) -> None:
    """Complexity is ruff's to count (C90); this counts what must be passed."""
    many = {
        f"{node.name} ({len(given)})"
        for node in functions(path)
        if not is_command(node)
        if len(given := required(node)) > ARGUMENTS
    }
    assert not many, f"more than {ARGUMENTS} arguments: {sorted(many)}"


def required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of positional arguments but self, and of keyword-only ones without a default."""
    place = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in SELF]
    named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return place + [a.arg for a, default in named if default is None]


SELF = ("self", "cls")


def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A function whose arguments are a command's options."""
    return any("command" in ast.unparse(d) for d in node.decorator_list) or any(
        "typer." in ast.unparse(a.annotation) for a in node.args.args if a.annotation
    )


@each_of(*ROOMS)
def test_classes_keep_few_private_fields(path: Path) -> None:
    for node in nodes_of(path):
        if isinstance(node, ast.ClassDef):
            fields = {
                target.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                for target in [inner]
                if isinstance(target.value, ast.Name) and target.value.id == "self"
                if target.attr.startswith("_")
            }
            assert len(fields) <= FIELDS, f"{node.name} has {len(fields)} private fields"


@each_of("verticals", "pipelines")
def test_only_the_engine_names_devices(path: Path) -> None:
    # The kit that looks for device names must spell them.
    allowed = relative(path) == "verticals/testing/source.py"
    assert allowed or not devices_named(path.read_text(encoding="utf-8"))


@each_of("engine", "verticals")
def test_http_kafka_and_argv_stay_in_pipelines(path: Path) -> None:
    doors = {name for name in imports(path) if top(name) in DOORS}
    if is_script(path):
        doors -= {"argparse", "tomllib"}
    if path.with_name("standard.toml").exists():  # what is declared comes with its declaration
        doors.discard("tomllib")
    assert not doors, f"only pipelines may import {sorted(doors)}"


@each_of("verticals")
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


@each_of(*ROOMS, "benchmarks")
def test_nothing_is_unpickled(path: Path) -> None:
    unsafe = {name for name in imports(path) if top(name) in UNSAFE}
    allowed = relative(path) in MAY_PICKLE
    assert allowed or not unsafe, f"{sorted(unsafe)} can run what a file says: use safetensors"
    for node in nodes_of(path):
        if not isinstance(node, ast.Call):
            continue
        said, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"line {node.lineno}: {said}"
        if said == "torch.load":
            assert given.get("weights_only") == "True", f"{where} without weights_only=True"
        assert said != "torch.save", f"{where} writes a pickle: use safetensors"
        assert given.get("allow_pickle", "False") == "False", f"{where} unpickles"
        assert not said.startswith("yaml.") or "safe" in said, f"{where} builds any object"


MAY_PAUSE = {"eventually", "until", "watch", "stall"}
"""Helpers that look again within a bound, watch something idle, or play a server that hangs."""


@each_of("tests")
def test_no_event_that_nobody_sets_is_waited_for(path: Path) -> None:
    """``Event().wait(2.0)`` is a sleep by another name."""
    if "Event(" not in path.read_text(encoding="utf-8"):
        return
    set_somewhere = {
        ast.unparse(node.value)
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and node.attr in ("set", "is_set")
    }
    given = {
        ast.unparse(value)
        for node in nodes_of(path)
        if isinstance(node, ast.Call)
        for value in (*node.args, *(keyword.value for keyword in node.keywords))
    }
    made = {
        ast.unparse(target)
        for node in nodes_of(path)
        if isinstance(node, ast.Assign) and EVENT.fullmatch(ast.unparse(node.value))
        for target in node.targets
    }
    allowed = {
        inner
        for function in functions(path)
        if function.name in MAY_PAUSE
        for inner in ast.walk(function)
    }
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            waited = ast.unparse(node.func.value)
            pause = waited in made - set_somewhere - given or EVENT.fullmatch(waited)
            assert node in allowed or node.func.attr != "wait" or not pause, (
                f"line {node.lineno} sleeps: wait for what is to come, or name it {MAY_PAUSE}"
            )


EVENT = re.compile(r"(threading\.|asyncio\.)?Event\(\)")


@each_of("tests")
def test_no_test_sleeps(path: Path) -> None:
    for node in nodes_of(path):
        called = node.func if isinstance(node, ast.Call) else None
        if "sleep" in (getattr(called, "attr", None), getattr(called, "id", None)):
            said = ast.unparse(called)  # type: ignore[arg-type]
            assert said not in ("time.sleep", "asyncio.sleep", "sleep", "anyio.sleep"), (
                f"line {node.lineno} sleeps: wait for an event, or turn a clock by hand"
            )


def test_public_names_change_on_purpose() -> None:
    assert sorted(engine.__all__) == sorted(ENGINE_NAMES.split())
    assert sorted(verticals.__all__) == sorted(VERTICALS_NAMES.split())
    assert sorted(plinth.__all__) == sorted(PLINTH_NAMES.split())
    assert all(getattr(plinth, name) for name in plinth.__all__)


@each_of(*ROOMS)
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


@each_of(*ROOMS, "tests", "benchmarks")
def test_no_path_of_somebodys_machine(path: Path) -> None:
    places = re.findall(r"[\"'\s](/(?:home|root|work|Users)/[\w./-]*)", path.read_text("utf-8"))
    assert not places, f"these exist on one machine only: {places}"


@each_of("benchmarks")
def test_benchmarks_share_one_head(path: Path) -> None:
    """One parser with ``--json``, whose answer has the facts of the machine."""
    alone = path.parent.name == "benchmarks" and path.name != "head.py"
    made = "ArgumentParser" in path.read_text(encoding="utf-8")
    assert not (alone and made), "take the parser of benchmarks/head.py"
