"""Execution backends, and the choice between them: :func:`prepare`."""

from plinth.engine.backends.base import Backend, Executable
from plinth.engine.backends.choice import BACKENDS, prepare

__all__ = ["BACKENDS", "Backend", "Executable", "prepare"]
