"""The same bytes to this server and to uvicorn: nothing is a request here that is none there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from http_fuzz import fuzz


@pytest.mark.slow
def test_two_thousand_streams_are_read_as_uvicorn_reads_them_or_refused() -> None:
    report = fuzz(2000, seed=7)
    assert not report.faults, report.faults[0]
    assert report.streams == 2000
    assert report.plain > 500
    assert report.same > 1000
