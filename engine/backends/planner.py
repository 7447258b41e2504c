"""The plan of a model: which candidate runs how many rows, chosen by measuring.

No backend and no precision is fastest at every number of rows, so candidates are timed at
several, and each range of rows gets its own. A plan changes from one to another only for a
real gain, and never keeps one that is slower than eager.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from plinth.engine.backends.base import Backend, Executable, another
from plinth.engine.cache import cache_folder, used
from plinth.engine.devices.device import Device
from plinth.engine.errors import ModelError
from plinth.engine.mapped import trim
from plinth.engine.models.store import Model

T = TypeVar("T")
Times = Callable[[int], "list[float] | None"]
"""Seconds of every candidate at so many rows, or ``None`` where they may not be measured."""

COUNTS = (1, 4, 16, 64, 128)
GAIN = 1.1  # what a change to another candidate must bring
_FORMAT = "1"  # of what is remembered


@dataclass(frozen=True, slots=True)
class Stretch:
    """From ``first`` rows on (to the next stretch) a candidate runs, by its label."""

    first: int
    label: str


def ranges(
    labels: Sequence[str], times: Times, most: int, reference: str | None = None
) -> list[Stretch]:
    """Which candidate runs from how many rows on.

    Candidates are timed at 1, 4, 16, 64, 128 and ``most`` rows. Where the choice changes, the
    place is narrowed down to 6 %. One stays chosen until another is 1.1 times as fast, or the
    reference faster; one in less than fp32 is chosen over fp32 for such a gain only.

    Args:
        labels: ``"backend/precision"`` of each candidate.
        times: measures them all at so many rows.
        most: rows of the largest batch.
        reference: label of the candidate that no choice may be slower than.
    """

    def choose(current: int | None, rows: int) -> int | None:
        found = times(rows)
        if found is None:
            return None
        best = _best(labels, found)
        if current is None or current == best:
            return best
        limit = found[labels.index(reference)] if reference in labels else float("inf")
        keep = found[current] <= min(GAIN * found[best], limit)
        return current if keep else best

    def walk(low: int, current: int, high: int) -> list[tuple[int, int]]:
        """Where the choice changes after ``low``, and to what, seen from the choice before."""
        after = choose(current, high)
        if after is None or after == current:
            return []
        middle = (low + high) // 2
        if high - low <= max(1, low // 16) or times(middle) is None:
            return [(high, after)]
        found = walk(low, current, middle)
        return found + walk(middle, found[-1][1] if found else current, high)

    ends = list(takewhile(times, sorted({*(count for count in COUNTS if count < most), most})))
    starts = [(1, (choose(None, ends[0]) if ends else None) or 0)]
    for low, high in pairwise(ends):
        starts += walk(low, starts[-1][1], high)
    return [Stretch(first, labels[chosen]) for first, chosen in starts]


def _best(labels: Sequence[str], seconds: Sequence[float]) -> int:
    """The fastest; one in less than fp32 only if it is ``GAIN`` times as fast as any in fp32."""
    order = sorted(range(len(labels)), key=lambda index: seconds[index])
    exact = [index for index in order if labels[index].endswith("/fp32")]
    if not exact or seconds[order[0]] * GAIN <= seconds[exact[0]]:
        return order[0]
    return exact[0]


class Planned:
    """Several executables of one model, one for each range of rows; see ``base.Executable``.

    Args:
        parts: first row count of each, in order, and the executable.
    """

    def __init__(self, parts: Sequence[tuple[int, Executable]]) -> None:
        self.members = tuple({id(part): part for _, part in parts}.values())
        self.backend = "+".join(dict.fromkeys(member.backend for member in self.members))
        self.precision = "+".join(dict.fromkeys(member.precision for member in self.members))
        self.device = self.members[0].device
        modules = {id(getattr(each, "module", each)): each.weights for each in self.members}
        self.weights = sum(modules.values())
        self.report: dict[str, Any] = dict(self.members[0].report)
        self._firsts = [first for first, _ in parts]
        self._parts = [part for _, part in parts]

    @property
    def parts(self) -> list[tuple[int, Executable]]:
        """The first row count of each range, in order, and what runs it."""
        return list(zip(self._firsts, self._parts, strict=True))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run rows on the executable of their number."""
        return self._at(len(next(iter(inputs.values())))).run(inputs)

    def _at(self, rows: int) -> Executable:
        return self._parts[bisect_right(self._firsts, rows) - 1]

    def is_native(self, rows: int) -> bool:
        """Whether the executable of so many rows is."""
        return self._at(rows).is_native(rows)

    def probe(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every member learns from the rows; gives what the last one gave."""
        return [member.probe(inputs) for member in self.members][-1]

    def another(self) -> Planned | None:
        """One more for another thread; see ``base.another``."""
        made = {id(member): another(member) for member in self.members}
        parts = [
            (first, other) for first, part in self.parts if (other := made[id(part)]) is not None
        ]
        if len(parts) < len(self._parts):
            return None
        planned = Planned(parts)
        planned.report = self.report
        return planned

    def smallest(self) -> Executable:
        """The member with the fewest weights, for where not all of them fit into memory."""
        chosen = min(self.members, key=lambda member: member.weights)
        label = f"{chosen.backend}/{chosen.precision}"
        chosen.report |= {
            **self.report,
            "resolved": {"backend": chosen.backend, "precision": chosen.precision},
            "plan": [{"from_rows": 1, "runs": label}],
            "reason": f"smallest: the plan's members take {self.weights} bytes, which do not fit",
        }
        return chosen

    def release(self) -> bool:
        """Give back the memory that members keep."""
        released = [member.release() for member in self.members]
        return any(released)


class Bounded:
    """Runs steps that may take too long, each on a thread of its own, inside one bound.

    A step that is late is left to end by itself: what it has made is in the cache by then.

    Args:
        seconds: for all steps together, their own time alone; ``None``: there is no bound, and
            the caller's thread runs them.

    Attributes:
        late: some step was.
        left: the thread of the step that was, which goes on by itself.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._left = 0.0 if seconds is None else seconds
        self.late = False
        self.left: threading.Thread | None = None

    def run(self, step: Callable[[], T], what: str) -> T:
        """What the step returns.

        Raises:
            ModelError: it is late.
            BaseException: what the step raised.
        """
        if self._seconds is None:
            return step()
        begun = time.monotonic()
        made: list[T] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                made.append(step())
            except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
                failed.append(error)
            if self.late:  # what it held is not held beside what serves by now
                made.clear()
                trim()

        thread = threading.Thread(target=work, name=f"plinth {what}")
        thread.start()
        thread.join(max(0.0, self._left))
        self._left -= time.monotonic() - begun
        if failed:
            raise failed[0]
        if not made:
            self.late, self.left = True, thread
            raise ModelError(
                f"{what} was not ready within {self._seconds:g} s; it goes on by itself, and what "
                "it makes is kept for the next start",
                hint=f"name it as the backend to wait for it: backend={what.partition('/')[0]!r}",
            )
        return made[0]


# -- what is remembered ------------------------------------------------------------------------
def plan_key(
    model: Model, device: Device, backends: Sequence[Backend], threads: int, *facts: object
) -> str:
    """The key of a plan: the model's whole state, the CPU, versions, and what was asked for."""
    versions = [f"{each.name} {each.available().version}" for each in backends]
    parts = (
        *(_FORMAT, model.digest(), model.spec.model_dump_json(), str(device), device.name),
        *(",".join(device.dtypes), torch.backends.cpu.get_cpu_capability(), str(threads)),
        *(torch.__version__, platform.python_version(), *versions, *map(repr, facts)),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


Seconds = dict[int, dict[str, float]]
"""What was measured: seconds by rows and label."""


def recall(key: str) -> tuple[list[Stretch], Seconds] | None:
    """The plan of an earlier run; ``None`` where there is none, or it is damaged."""
    path = cache_folder("plans") / f"{key}.json"
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        used(path)
        stretches = [Stretch(int(first), str(label)) for first, label in data["stretches"]]
        seconds = {int(rows): dict(found) for rows, found in data["seconds"].items()}
        return (stretches, seconds) if stretches and stretches[0].first == 1 else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # damaged or of another version: it is measured again and written anew


def remember(key: str, stretches: Sequence[Stretch], seconds: Seconds) -> None:
    """Keep a plan for the next run."""
    path = cache_folder("plans") / f"{key}.json"
    data = {"stretches": [[each.first, each.label] for each in stretches], "seconds": seconds}
    part = path.with_suffix(f".{threading.get_native_id()}.part")
    part.write_text(json.dumps(data))
    part.replace(path)
