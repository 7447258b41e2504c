"""The folder of a service's helpers, and what its tests need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "verticals"))
sys.path.insert(0, str(Path(__file__).parent))

from orthanc import INSTALLED


@pytest.fixture(scope="session")
def orthanc_installed() -> None:
    """``.ci/run`` installs it; elsewhere the tests are left out without."""
    if not INSTALLED:
        if os.environ.get("PLINTH_REQUIRE_ORTHANC"):
            pytest.fail("not installed: orthanc, orthanc-dicomweb")
        pytest.skip("not installed: orthanc (apt-get install orthanc orthanc-dicomweb)")
