"""Helper modules shared by the tests of fraud scoring, and payments long enough to score."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "benchmarks")]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Training on one thread gives the same weights each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
