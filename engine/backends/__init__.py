"""Execution backends, and the choice between them: :func:`prepare`."""

from engine.backends.base import Backend, Executable
from engine.backends.choice import BACKENDS, prepare

__all__ = ["BACKENDS", "Backend", "Executable", "prepare"]
