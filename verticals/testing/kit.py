"""The conformance kit: every clause of the contract as a check, and the report of them all."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plinth.verticals.contract import Vertical
from plinth.verticals.testing.behaviour import BEHAVIOUR
from plinth.verticals.testing.case import Case, NotApplicable
from plinth.verticals.testing.clauses import DECLARED, Clause

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """One clause of the contract, bound to a vertical. Call it: it raises AssertionError.

    Args:
        name: what must hold, in a few words.
        run: does the work.
    """

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        """Check the clause; a clause that does not apply passes."""
        outcome = self.outcome()
        if outcome.status == "failed":
            raise AssertionError(f"{self.name}: {outcome.message}")

    def outcome(self) -> Outcome:
        """Check the clause and say how it went; never raises."""
        try:
            self.run()
        except NotApplicable as why:
            return Outcome(self.name, "skipped", str(why))
        except AssertionError as error:
            return Outcome(self.name, "failed", str(error))
        except Exception as error:  # noqa: BLE001 - a report tells every fault of a plug-in
            return Outcome(self.name, "failed", _surprise(error))
        return Outcome(self.name, "ok")

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one check went; ``message`` says what to change, or why it was skipped."""

    name: str
    status: Status
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How a vertical stands against the contract. ``print(report)`` reads well."""

    vertical: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the whole report unless it is ok."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        counts = {
            status: sum(outcome.status == status for outcome in self.outcomes)
            for status in ("ok", "failed", "skipped")
        }
        head = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        width = max(len(outcome.name) for outcome in self.outcomes)
        lines = [f"{self.vertical}: {head}"]
        for outcome in self.outcomes:
            note = f"  {outcome.message}" if outcome.message else ""
            lines.append(f"  {outcome.status:<7}  {outcome.name:<{width}}{note}".rstrip())
        return "\n".join(lines)


def checks(
    vertical: Vertical[Any, Any], requests: Sequence[Any] = (), folder: Path | None = None
) -> list[Check]:
    """The clauses of the contract as callables, for ``pytest.mark.parametrize``.

    Args:
        vertical: the vertical to check; its state is as before afterwards.
        requests: valid requests beside ``vertical.example()``; the more they differ, the more
            the checks of order and independence can see.
        folder: a folder with items, for verticals that read folders.
    """
    case = Case(vertical, tuple(requests), folder)
    return [Check(name, _bound(case, clause)) for name, clause in (DECLARED | BEHAVIOUR).items()]


def check_vertical(
    vertical: Vertical[Any, Any], requests: Sequence[Any] = (), folder: Path | None = None
) -> Report:
    """Run the whole contract on a vertical, on the CPU and without an engine.

    Args:
        vertical: the vertical to check; its state is as before afterwards.
        requests: valid requests beside ``vertical.example()``.
        folder: a folder with items, for verticals that read folders.

    Returns:
        A printable report. Every failure says what to change.
    """
    outcomes = tuple(check.outcome() for check in checks(vertical, requests, folder))
    return Report(getattr(vertical, "name", type(vertical).__name__), outcomes)


def _bound(case: Case, clause: Clause) -> Callable[[], None]:
    def run() -> None:
        with case.fresh():
            clause(case)

    return run


def _surprise(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "site-packages/torch" not in f.filename), None)
    where = f" at {Path(place.filename).name}:{place.lineno} in {place.name}" if place else ""
    return f"raised {type(error).__name__}: {error}{where}"
