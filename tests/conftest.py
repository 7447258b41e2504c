"""Settings of all tests."""

import os
from collections import Counter
from importlib.util import find_spec

import pytest
from hypothesis import settings

# Shared, noisy machines: an example's first call may pay for imports and lazy set-up. One commit
# has one result, so examples are drawn from the test's own text; `make fuzz` draws others.
settings.register_profile("plinth", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "plinth"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of a broker first, which wait more than they compute; then those with most slow tests.

    So processes that take whole files (``--dist loadfile``) end together.
    """
    broker = {item.path for item in items if item.get_closest_marker("kafka")}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path not in broker, -slow[item.path]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``needs(module)`` needs it; ``make test`` has it all and skips nothing."""
    for mark in item.iter_markers("needs"):
        missing = [name for name in mark.args if find_spec(name) is None]
        if missing and os.environ.get("PLINTH_REQUIRE_EXTRAS"):
            pytest.fail(f"not installed: {missing}; run make extras")
        if missing:
            pytest.skip(f"not installed: {missing}")
