"""The service under the batch door and the upload door: find items, carry each to its outputs.

One bad name, file or item never ends the rest: what is wrong with an item travels with it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from plinth.engine import Answer, Call, Engine, Flow, InputError, PlinthError, Sla
from plinth.pipelines.folders.storage import storing, write_whole
from plinth.pipelines.observability.tracing import Begun
from plinth.pipelines.records import FAULTS, pairs
from plinth.verticals import Item, LeftOut, Settings, Vertical

log = logging.getLogger("plinth.items")

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


STEPS = {
    "find": "looking for what can be read",
    "load": "reading the files",
    "infer": "analysing",
    "write": "writing the results",
    "carry": "a worker process had it",
}
"""The steps of an item, in words for the user."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of an item that went well.

    Args:
        folder: where its files are.
        files: the files, relative to ``folder``.
        answer: the engine's answer: result, timing, model versions.
        encoded: the result as JSON.
        seconds: wall time from load to the files' final place.
    """

    folder: Path
    files: tuple[str, ...]
    answer: Answer[Any]
    encoded: bytes
    seconds: float


@dataclass(slots=True)
class Steps:
    """Where one item is on its way, and hooks of the one who drives it.

    Args:
        device: held while a call of the item is with the engine, never while its own steps run.
        on_stage: told ``"load"``, ``"infer"``, ``"write"`` as they begin.
        within: the span in which the item's own is, if traces are asked for.
        stage: the last of them.
        begun: when each began (``perf_counter``).
        waited: seconds for ``device``.
    """

    device: AbstractContextManager[Any] = field(default_factory=nullcontext)
    on_stage: Callable[[str], None] = lambda stage: None
    within: Begun | None = None
    stage: str = "load"
    begun: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self.stage = stage
        self.begun[stage] = time.perf_counter()
        self.on_stage(stage)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Held while a call is with the engine."""
        asked = time.perf_counter()
        with self.device:
            self.waited += time.perf_counter() - asked
            yield

    def failure(self, error: PlinthError) -> dict[str, Any]:
        """An error in the present stage as JSON-ready data, with the step in words."""
        told: dict[str, Any] = printable(error.as_dict())
        return {"field": None, "step": STEPS[self.stage], **told}


class SoftwareFault(PlinthError):
    """A fault of the software, not of the data; the log has the frames, never the values."""

    reason = "internal"


def software_fault(what: str, step: str, error: BaseException) -> SoftwareFault:
    """The error that tells of a fault met in a step; logs where it was.

    Args:
        what: which vertical, or whose item.
        step: in words, from :data:`STEPS`.
        error: the fault.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    kind = type(error).__name__
    log.error("%s: %s while %s\n%s", what, kind, step, frames)
    return SoftwareFault(
        f"{what}: the software met a fault ({kind}) while {step}",
        hint="this is a fault in the software; the log has the place",
    )


def survey(
    vertical: Vertical[Any, Any], folder: Path, engine: Engine | None = None
) -> Iterator[Item | LeftOut]:
    """What the vertical finds below a folder, as it finds it; ids of items can name folders.

    An id that cannot, or that was given before, is replaced by one made from it; which stays the
    same as long as the files keep their places. An item that replaces one of its id keeps it.

    Args:
        vertical: the domain.
        folder: where to look.
        engine: runs what takes long; all is told at the end then. ``None``: it is found here.

    Raises:
        InputError: the vertical found the folder unreadable.
        SoftwareFault: the vertical failed.
        PlinthError: the engine's.
    """
    try:
        if engine is None:
            yield from _named(vertical, folder, vertical.survey(folder))
        else:
            found = engine.run(vertical.surveying(folder), Sla()).value
            yield from _named(vertical, folder, found)
    except PlinthError:
        raise
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror or type(error).__name__}",
            hint="check that it is there and the permissions",
            reason="io",
        ) from error
    except FAULTS as error:
        raise software_fault(vertical.name, STEPS["find"], error) from error


def _named(
    vertical: Vertical[Any, Any], folder: Path, all_found: Iterable[Item | LeftOut]
) -> Iterator[Item | LeftOut]:
    """What was found, with ids that can name folders and are given once."""
    seen: set[str] = set()
    for found in all_found:
        if isinstance(found, LeftOut):
            yield found
            continue
        name = found.id
        seen -= set(found.replaces)
        if not _ID.fullmatch(name) or name in seen:
            places = (os.path.relpath(path, folder) for path in sorted(found.paths))
            name = _safe_name(name, "\0".join(places))
        if name in seen:
            raise SoftwareFault(
                f"{vertical.name} found the same files twice and gave them one id",
                hint="this is a fault in the vertical",
            )
        seen.add(name)
        yield found if name == found.id else replace(found, id=name)


def _safe_name(text: str, told_apart_by: str) -> str:
    """What can stand in a path of ``text``, and a digest."""
    digest = hashlib.blake2b(as_bytes(told_apart_by), digest_size=5).hexdigest()
    clean = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:100]
    return f"{clean or 'item'}-{digest}"


def as_bytes(name: str) -> bytes:
    """A name of a file as bytes, also one that is not UTF-8 on disk."""
    return name.encode("utf-8", "surrogatepass")


def printable(value: Any) -> Any:
    """JSON-ready data in which bytes of names that are no UTF-8 are spelt ``\\udce9``."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [printable(one) for one in value]
    return value


def fingerprint(item: Item, settings: Settings) -> str:
    """A short digest of what an item's result depends on besides the models.

    It covers the vertical's settings, and name, size and time of change of each file.
    """
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for path in sorted(item.paths):
        try:
            stat = path.stat()
        except OSError:  # load() will say what is wrong with it
            digest.update(as_bytes(f"{path.name}\0gone\0"))
        else:
            digest.update(as_bytes(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return digest.hexdigest()[:16]


def versions(vertical: Vertical[Any, Any]) -> dict[str, str]:
    """Version by name of the models a vertical brings."""
    return {model.spec.name: model.spec.version for model in vertical.models()}


def analyse(
    vertical: Vertical[Any, Any],
    engine: Engine,
    item: Item,
    folder: Path,
    *,
    sla: Sla,
    steps: Steps | None = None,
) -> Finished:
    """Carry one item from its files to its outputs, and tell of it in a span of its own.

    Args:
        vertical: the domain.
        engine: a started engine that has the vertical's models.
        item: from :func:`survey`.
        folder: final place of the outputs; appears whole or not at all.
        sla: the promise, usually background.
        steps: hooks.

    Raises:
        InputError: the item's own failure.
        SoftwareFault: the vertical failed.
        StorageError: the outputs could not be written.
        PlinthError: the engine's.
    """
    own = steps or Steps()
    return within_span(vertical, own, lambda: _analyse(vertical, engine, item, folder, sla, own))


def within_span(
    vertical: Vertical[Any, Any], steps: Steps, work: Callable[[], Finished]
) -> Finished:
    """Carry an item by ``work``, and tell of it in a span of its own if traces are asked for.

    Args:
        vertical: the domain.
        steps: of the item.
        work: carries it.
    """
    if steps.within is None:
        return work()
    span = steps.within.begin(f"item {vertical.name}", time.perf_counter())
    about: dict[str, str | int] = {"plinth.vertical": vertical.name}
    try:
        done = work()
    except PlinthError as error:
        about |= {"plinth.step": steps.stage, "error.type": error.reason}
        span.end(about, failed=not isinstance(error, InputError))
        raise
    about |= {"plinth.models": pairs(done.answer.models)} if done.answer.models else {}
    span.end(about, _timing(steps, done))
    return done


def _timing(steps: Steps, done: Finished) -> dict[str, float]:
    """Where an item's time went: reading its files, waiting, the device, writing its outputs."""
    begun, timing = steps.begun, done.answer.timing
    return replace(
        timing,
        decode=begun["infer"] - begun["load"],
        queue=timing.queue + steps.waited,
        encode=begun["load"] + done.seconds - begun["write"],
    ).as_dict()


def _analyse(
    vertical: Vertical[Any, Any],
    engine: Engine,
    item: Item,
    folder: Path,
    sla: Sla,
    steps: Steps,
) -> Finished:
    started = time.perf_counter()
    try:
        steps.begin("load")
        request = engine.run(vertical.loading(item), sla).value
        steps.begin("infer")
        answer = engine.run(calls_within(steps.on_device, vertical.infer([request])), sla)
        result = answer.value[0]
        if isinstance(result, InputError):
            raise result
        steps.begin("write")
        encoded = vertical.encode(result)
        with storing():
            files = write_whole(
                folder, lambda into: engine.run(vertical.writing(result, into), sla).value
            )
    except PlinthError:
        raise
    except OSError as error:
        raise InputError(
            f"{item.id}: {error.strerror or type(error).__name__}",
            hint="check that the files are there and readable",
            reason="io",
        ) from error
    except FAULTS as error:
        raise software_fault(item.id, STEPS[steps.stage], error) from error
    return Finished(folder, files, answer, encoded, time.perf_counter() - started)


def calls_within(slot: Callable[[], AbstractContextManager[Any]], flow: Flow[T]) -> Flow[T]:
    """The same flow; a ``slot`` is held from each of its calls to that call's answer.

    The flow's own steps (rules, measurements on the host), those it yields among them, run without
    the slot, so that another item's calls keep the device busy meanwhile.
    """
    try:
        asked = next(flow)
        while True:
            try:
                with slot() if isinstance(asked, Call) else nullcontext():
                    answer = yield asked
            except Exception as error:  # noqa: BLE001 - the flow's own to handle
                asked = flow.throw(error)
            else:
                asked = flow.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        flow.close()
