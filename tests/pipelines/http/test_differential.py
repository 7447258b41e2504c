"""The same bytes to this server and to uvicorn: nothing is a request here that is none there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from http_fuzz import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("streams", [500, pytest.param(4000, marks=pytest.mark.soak)])
def test_streams_are_read_as_uvicorn_reads_them_or_refused(streams: int) -> None:
    """``make soak`` sends 4,000, ``benchmarks/http_fuzz.py`` as many as it is asked for."""
    report = fuzz(streams, seed=7)
    assert not report.faults, report.faults[0]
    assert report.streams == streams
    assert report.plain > streams / 4
    assert report.same > streams / 2
