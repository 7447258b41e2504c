"""Settings of all tests."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

os.environ.setdefault("PLINTH_COMPILED", "0")  # tests are of the source, unless it says 1

from plinth.pipelines.console import PlacesOnly

# Shared, noisy machines: an example's first call may pay for imports and lazy set-up. One commit
# has one result, so examples are drawn from the test's own text; `make fuzz` draws others.
settings.register_profile("plinth", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "plinth"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of a broker, which wait more than they compute, by turns with those that compute.

    Those with most slow tests come first, so that processes that take whole files
    (``--dist loadfile``) are busy all the time and end together.
    """
    broker = {item.path for item in items if item.get_closest_marker("kafka")}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    ranked = sorted(dict.fromkeys(item.path for item in items), key=lambda path: -slow[path])
    waiting = [path for path in ranked if path in broker]
    computing = [path for path in ranked if path not in broker]
    place = {path: 2 * n for n, path in enumerate(waiting)}
    place |= {path: 2 * n + 1 for n, path in enumerate(computing)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets logging up; the next test has its own again."""
    root, ours = logging.getLogger(), logging.getLogger("plinth")
    before, levels = root.handlers[:], (root.level, ours.level)
    yield
    for handler in root.handlers[:]:
        if handler not in before and any(isinstance(one, PlacesOnly) for one in handler.filters):
            root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``needs(module)`` needs it; ``make test`` has it all and skips nothing."""
    for mark in item.iter_markers("needs"):
        missing = [name for name in mark.args if find_spec(name) is None]
        if missing and os.environ.get("PLINTH_REQUIRE_EXTRAS"):
            pytest.fail(f"not installed: {missing}; run make extras")
        if missing:
            pytest.skip(f"not installed: {missing}")
