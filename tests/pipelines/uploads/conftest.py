"""A server of one folder vertical, for the tests of uploads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import Running, running
from tiny_verticals import Shelf

CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "http" / "inputs"


@pytest.fixture(scope="session")
def shelf() -> Iterator[Running]:
    """A server whose uploads are read by ``shelf``, which doubles numbers in ``*.txt``."""
    with running({"shelf": Shelf()}, serve={"upload": {"max_files": 50}}) as server:
        yield server


@pytest.fixture(scope="session")
def cases() -> Path:
    """Recorded inputs that went wrong once, where they are at hand."""
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not here")
    return CASES
