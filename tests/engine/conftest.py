"""Engine tests on a device made of Python: ``PLINTH_TEST_DEVICE=fake pytest tests/engine``.

Every engine that does not ask for a device by name then runs on an accelerator with memory of
its own, as a GPU has. Tests marked ``cpu`` are about the CPU, or a backend that only runs there.
"""

import os

import pytest

from tests.engine import fake_accelerator

FAKE = os.environ.get("PLINTH_TEST_DEVICE") == "fake"
LIBRARIES = fake_accelerator.install() if FAKE else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if FAKE:
        skip = pytest.mark.skip(reason="about the CPU")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)
