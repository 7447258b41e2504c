"""Keys of hashes, from the environment: never in a file of settings, a log or a command line."""

from __future__ import annotations

import os

from plinth.engine import ConfigError

MIN_KEY = 16
"""Characters."""


def hash_key(variable: str, hint: str) -> bytes:
    """The key that an environment variable holds.

    Args:
        variable: its name.
        hint: which setting names it.

    Raises:
        ConfigError: it holds no key.
    """
    key = os.environ.get(variable, "")
    if len(key) < MIN_KEY:
        raise ConfigError(
            f"the environment variable {variable} holds no key of {MIN_KEY} characters or more",
            hint=hint,
        )
    return key.encode()
