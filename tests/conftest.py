"""Settings of all tests."""

from collections import Counter

import pytest
from hypothesis import settings

# Shared, noisy machines: an example's first call may pay for imports and lazy set-up.
settings.register_profile("plinth", deadline=None, max_examples=60)
settings.load_profile("plinth")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast files first; of the slow ones the largest first, so that processes end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (slow[item.path] > 0, -slow[item.path]))
