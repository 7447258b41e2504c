"""Engine tests on an accelerator: ``PLINTH_TEST_DEVICE=cuda pytest tests/engine``.

Every engine that does not ask for a device by name then runs there. ``fake`` is a device made of
Python with memory of its own, as a GPU has; another word is a kind of device that torch must find.
Tests marked ``cpu`` are about the CPU, a backend that only runs there, or no device at all.
"""

import os
import sys
from pathlib import Path

import pytest

from plinth.engine.devices.device import pick
from tests.engine import fake_accelerator

DEVICE = os.environ.get("PLINTH_TEST_DEVICE", "")
LIBRARIES = fake_accelerator.install() if DEVICE == "fake" else []


def pytest_configure() -> None:
    """Never pass on another device than the one that was asked for."""
    if DEVICE not in ("", "fake") and pick("auto").kind != DEVICE:
        raise pytest.UsageError(f"PLINTH_TEST_DEVICE is {DEVICE}, torch finds {pick('auto')}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE:
        skip = pytest.mark.skip(reason="about the CPU")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)


@pytest.fixture(scope="module")
def importable():
    """Worker processes find modules where their parent does: the tests' and benchmarks' too."""
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "benchmarks")]
    yield
    del sys.path[:2]
