"""Tests of the pages share helpers by name, as those of the doors do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; ``.ci/run`` installs it, elsewhere tests are left out without it.

    Of one module: while it lives, playwright's event loop runs in this thread, and
    ``asyncio.run`` of other tests would be refused.
    """
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("PLINTH_REQUIRE_CHROMIUM"):
            pytest.fail("not installed: chromium")
        pytest.skip("not installed: chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=program, args=[*flags, "--enable-unsafe-swiftshader"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which nothing may go wrong: no script fails, and nothing breaks the policy."""
    found = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    found.on("pageerror", lambda error: said.append(str(error)))
    found.on(
        "console", lambda message: said.append(message.text) if message.type == "error" else None
    )
    yield found
    found.close()
    told = [one for one in said if "the server responded with a status of" not in one]
    assert not told
