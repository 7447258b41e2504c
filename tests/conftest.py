"""Settings of all tests."""

from hypothesis import settings

# Shared, noisy machines: an example's first call may pay for imports and lazy set-up.
settings.register_profile("plinth", deadline=None, max_examples=60)
settings.load_profile("plinth")
