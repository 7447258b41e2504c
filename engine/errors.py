"""The error tree of Plinth.

::

    PlinthError                  everything we raise on purpose; carries a hint
    ├── InputError               one item of input is wrong (its neighbours go on)
    ├── ConfigError              a setting is wrong; nothing has started
    ├── ModelError               a model cannot be found, verified, loaded or run
    ├── DeviceError              a device or backend is absent or failed
    │   ├── OutOfMemory          work does not fit; says which bytes
    │   └── EngineFailed         the engine's device thread ended; nothing is answered any more
    ├── ComputeError             a heavy step of a flow was lost with its worker process
    └── Refused                  the engine will not do this work
        ├── DeadlineRefused      it cannot finish before its deadline
        ├── QueueFull            the queue is at its bound
        ├── Cancelled            the client went away
        └── Closed               the engine is shutting down

Every error reads as a sentence for the user: what is wrong, where, what was expected and
what to do. ``as_dict()`` is the same for machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class PlinthError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong and where, in one sentence.
        hint: what the user can do about it.
    """

    reason = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_dict(self) -> dict[str, Any]:
        """The error as JSON-ready data: ``reason``, ``message``, ``hint``."""
        return {"reason": self.reason, "message": self.message, "hint": self.hint}

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole between processes, whatever arguments its class takes."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[PlinthError], args: tuple[Any, ...], facts: dict[str, Any]) -> PlinthError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class InputError(PlinthError):
    """One item of input is wrong. Travels as a value through flows.

    Args:
        message: what is wrong.
        field: the field, file or DICOM attribute at fault.
        hint: what to do about it.
        reason: short machine-readable cause, such as ``"malformed_json"``.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        hint: str | None = None,
        reason: str = "invalid_input",
    ) -> None:
        super().__init__(message, hint=hint)
        self.field = field
        self.reason = reason

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "field": self.field}


class ConfigError(PlinthError):
    """A setting is wrong; raised before anything starts."""

    reason = "config"


class ModelError(PlinthError):
    """A model cannot be found, verified, loaded or run."""

    reason = "model"


class DeviceError(PlinthError):
    """A device or execution backend is absent or failed."""

    reason = "device"


class OutOfMemory(DeviceError):
    """Work does not fit into the memory budget.

    Args:
        message: which work, which bytes.
        needed: bytes the work needs at its peak.
        available: bytes of the budget.
    """

    reason = "out_of_memory"

    def __init__(self, message: str, *, needed: int, available: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available


class EngineFailed(DeviceError):
    """The device thread of the engine ended; start the engine again, or the process."""

    reason = "engine_failed"


class ComputeError(PlinthError):
    """A heavy step of a flow was lost: its worker process crashed, or ran out of time.

    Args:
        message: which step, and what became of its process.
        reason: ``"worker_died"``, ``"time_limit"`` or ``"compute"``.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, reason: str = "compute", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Refused(PlinthError):
    """The engine will not do this work; ``retry_after`` (seconds) says when to try again."""

    reason = "refused"

    def __init__(
        self, message: str, *, retry_after: float | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "retry_after_seconds": self.retry_after}


class DeadlineRefused(Refused):
    """The work cannot finish before its deadline.

    Args:
        message: the sentence for the user.
        predicted: predicted finish, seconds after arrival.
        deadline: allowed time, seconds after arrival.
        rows_ahead: rows queued before this work.
        retry_after: seconds until a new attempt is likely to succeed.
    """

    reason = "deadline"

    def __init__(
        self,
        message: str,
        *,
        predicted: float,
        deadline: float,
        rows_ahead: int,
        retry_after: float,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.predicted = predicted
        self.deadline = deadline
        self.rows_ahead = rows_ahead

    def as_dict(self) -> dict[str, Any]:
        return {
            **super().as_dict(),
            "predicted_seconds": round(self.predicted, 6),
            "deadline_seconds": round(self.deadline, 6),
            "rows_ahead": self.rows_ahead,
        }


class QueueFull(Refused):
    """The queue is at its bound."""

    reason = "queue_full"


class Cancelled(Refused):
    """The client went away before the work ran."""

    reason = "cancelled"


class Closed(Refused):
    """The engine is shutting down and takes no new work."""

    reason = "shutting_down"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all of them when none is near."""
    words = list(known)
    near = get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(words)}"
