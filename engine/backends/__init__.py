"""Execution backends, and the choice between them: :func:`prepare`."""

from plinth.engine.backends.base import Availability, Backend, Executable
from plinth.engine.backends.choice import prepare
from plinth.engine.backends.registry import backends

__all__ = ["Availability", "Backend", "Executable", "backends", "prepare"]
