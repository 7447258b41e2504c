"""``plinth archive run``: four threads around one queue on disk.

The door takes images; the poller fetches them; the analyst takes each study that has been quiet
for long enough through the service that batches and uploads use too; the sender stores results.
Each may be killed at any moment: what was begun is done again, what was stored is not.
"""

from __future__ import annotations

import datetime
import io
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.core import GaugeMetricFamily
from pydicom import dcmread

from plinth.engine import Engine, EngineFailed, InputError, PlinthError, Refused, Sla
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.archive.dicomweb import DicomWeb, NotWanted, Unreachable
from plinth.pipelines.archive.queue import Letter, Queue, Ready, digest
from plinth.pipelines.archive.rules import chosen, facts_of, facts_of_answer, why_not
from plinth.pipelines.archive.settings import Archive, Peer, Poll
from plinth.pipelines.folders.items import (
    SoftwareFault,
    analyse,
    software_fault,
    survey,
    versions,
)
from plinth.pipelines.folders.storage import StorageError
from plinth.pipelines.records import FAULTS
from plinth.verticals import Item, LeftOut, Vertical

if TYPE_CHECKING:
    from plinth.pipelines.archive.dimse import DicomPeer

log = logging.getLogger("plinth.archive")

LOOK_SECONDS = 0.5
"""Between two looks for something to do."""
FIRST, LONGEST = 1.0, 60.0
"""Seconds after which something is tried again: doubled each time, up to a bound."""
CLEAN_SECONDS = 60.0
FIRST_SENT = ("segmentation.dcm", "structures.dcm", "measurements.dcm")
"""What others refer to goes first."""
NAMED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
MAX_IMAGES = 20_000
"""Of one series."""
MAX_FAILED = 5
"""Series of one look that cannot be fetched, before the next look is waited for."""

Verticals = Mapping[str, Vertical[Any, Any]]


class Target(Protocol):
    """An archive that results go to; each method raises ``Unreachable`` when it cannot answer."""

    def has(self, study: str, series: str, image: str) -> bool:
        """Whether it has an object."""

    def store(self, content: bytes) -> None:
        """Store an object; raises ``NotWanted`` if it will not have it."""

    def confirm(self, kind: str, image: str) -> None:
        """Have it confirm that it keeps a stored object, of a SOP class."""


def _peer(settings: Peer) -> DicomPeer:
    from plinth.pipelines.archive.dimse import DicomPeer  # brings pynetdicom

    return DicomPeer(settings)


class Service:
    """The work of ``plinth archive``; :meth:`run` lasts until :meth:`stop`.

    Args:
        settings: the file.
        verticals: by name of the analysis.
        engine: a started engine that has their models.
        queue: the folder, held by this process.
    """

    def __init__(
        self, settings: Archive, verticals: Verticals, engine: Engine, queue: Queue
    ) -> None:
        self._settings, self._verticals = settings, verticals
        self._engine, self._queue = engine, queue
        self._stop = threading.Event()
        self._broken: PlinthError | None = None
        self._told = ""
        self.port: int | None = None

    def stop(self) -> None:
        """End after what is in work; a second signal ends at once."""
        self._stop.set()

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Work until stopped.

        Args:
            ready: called when the door is open.

        Raises:
            ConfigError: the door cannot be opened, or a secret is not set.
            EngineFailed, SoftwareFault: nothing more can be analysed.
        """
        settings = self._settings
        with ExitStack() as stack:
            tasks: list[Callable[[], None]] = [self._analyst]
            peer = None if settings.store is None else _peer(settings.store)
            target: Target | None = peer
            if settings.send is not None:
                target = stack.enter_context(DicomWeb(settings.send))
            if target is not None:
                tasks.append(lambda: self._sender(target))
            if settings.poll is not None:
                asked, poll = stack.enter_context(DicomWeb(settings.poll)), settings.poll
                tasks.append(lambda: self._poller(asked, poll))
            collector = QueueMetrics(self._queue)
            REGISTRY.register(collector)
            stack.callback(REGISTRY.unregister, collector)
            if settings.listen is not None:
                from plinth.pipelines.archive.listener import Listener

                reported = None if peer is None else peer.reported
                door = Listener(settings.listen, self._queue, reported)
                self.port = stack.enter_context(door).port
            # The door stays open until all have ended: reports on commitment come in by it.
            threads = [threading.Thread(target=self._guarded(task), name=f"plinth-archive-{n}")
                       for n, task in enumerate(tasks)]  # fmt: skip
            for thread in threads:
                stack.callback(thread.join)
                thread.start()
            stack.callback(self._stop.set)
            ready()
            self._stop.wait()
        if self._broken is not None:
            raise self._broken

    def _guarded(self, task: Callable[[], None]) -> Callable[[], None]:
        """A thread's work: what ends it ends the service, and is told."""

        def guarded() -> None:
            try:
                task()
            except PlinthError as error:
                self._broken = self._broken or error
            except FAULTS as error:
                self._broken = self._broken or software_fault("the archive", "working", error)
            finally:
                self._stop.set()

        return guarded

    # -- analysing -----------------------------------------------------------------------------
    def _analyst(self) -> None:
        listen = self._settings.listen
        poll = self._settings.poll
        quiet = listen.quiet_seconds if listen else poll.quiet_seconds if poll else 0.0
        cleaned, pause = time.monotonic(), FIRST
        while not self._stop.wait(LOOK_SECONDS):
            try:
                while (ready := self._queue.ready(quiet)) and not self._stop.is_set():
                    self._study(ready)
                if time.monotonic() - cleaned > CLEAN_SECONDS:
                    self._queue.clean(self._settings.keep_days * 86_400)
                    cleaned = time.monotonic()
                pause = FIRST
            except (StorageError, Refused) as error:
                log.error("%s; it is tried again in %.0f s", error.message, pause)
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST)

    def _study(self, ready: Ready) -> None:
        told = self._why_incomplete(ready.study)
        if told:
            log.warning("study %s is not analysed: %s", ready.study, told)
            self._queue.finish(ready, told, "incomplete")
            return
        contents = self._queue.contents(ready.study)
        left, made, fault = Counter[str](), 0, ""
        for name, vertical in self._verticals.items():
            try:
                items, out = found_in(vertical, ready.folder)
            except PlinthError as error:
                left[error.reason] += 1
                fault = fault or (error.message if isinstance(error, SoftwareFault) else "")
                continue
            left.update(one.reason for one in out)
            for item in items:
                if self._stop.is_set():
                    return
                try:
                    facts = facts_of(item.paths[0], len(item.paths))
                except InputError as error:
                    left[error.reason] += 1
                    continue
                if name in chosen(self._settings.rules, facts):
                    made += self._item(ready, name, vertical, item, contents)
                else:
                    left["no_rule"] += 1
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(left.items()))
        log.info(
            "study %s: %d images, %d analyses made%s",
            *(ready.study, len(contents), made, f"; left out: {said}" if said else ""),
        )
        self._queue.finish(ready, fault, "failed" if fault else "done")

    def _why_incomplete(self, study: str) -> str:
        gone = self._queue.missing(study)
        if gone:
            return f"{gone} images of it were deleted since they came: send the whole study again"
        broken = self._queue.broken_off(study)
        if broken:
            return (
                f"the sender broke off while it sent {broken} series of it: send the study again, "
                "or have it analysed as it is with plinth archive retry"
            )
        return ""

    def _item(
        self,
        ready: Ready,
        name: str,
        vertical: Vertical[Any, Any],
        item: Item,
        contents: Mapping[str, str],
    ) -> bool:
        """Analyse a series, unless the same images were analysed the same way before."""
        inputs = _inputs(vertical, item, contents)
        if not self._queue.begin(ready.study, name, item.id, inputs):
            return False
        parent = self._queue.folder / "results" / ready.study / name
        folder = parent / f"{item.id}-{inputs[:8]}"
        promise = replace(vertical.sla, deadline_ms=None)
        started = time.monotonic()
        try:
            files = self._analysed(vertical, item, folder, promise)
        except (StorageError, EngineFailed, Refused):  # the images are not at fault
            self._queue.forget(ready.study, name, item.id)
            raise
        except PlinthError as error:
            log.warning("study %s, %s: %s", ready.study, name, error.reason)
            self._queue.failed(ready.study, name, item.id, error.reason, error.message)
            return False
        self._queue.done(ready.study, name, item.id, files)
        for other in parent.glob(f"{item.id}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        seconds = time.monotonic() - started
        log.info("study %s, %s: %d files to send, %.1f s", ready.study, name, len(files), seconds)
        return True

    def _analysed(
        self, vertical: Vertical[Any, Any], item: Item, folder: Path, promise: Sla
    ) -> list[Path]:
        """Results of one series; the DICOM files of it, those that others refer to first."""
        done = analyse(vertical, self._engine, item, folder, sla=promise)
        names = [one for one in done.files if one.endswith(".dcm")]
        order = {one: place for place, one in enumerate(FIRST_SENT)}
        return [folder / one for one in sorted(names, key=lambda n: (order.get(n, 9), n))]

    # -- sending -------------------------------------------------------------------------------
    def _sender(self, target: Target) -> None:
        pause = FIRST
        while not self._stop.wait(LOOK_SECONDS):
            while (letter := self._queue.next_letter()) and not self._stop.is_set():
                try:
                    self._send(target, letter)
                    pause = FIRST
                except Unreachable as error:
                    log.warning("%s; it is tried again in %.0f s", error.message, pause)
                    self._queue.later(letter, error.message, pause)
                    self._stop.wait(pause)
                    pause = min(2 * pause, LONGEST)
                except NotWanted as error:
                    log.error("a result is not taken: %s", error.message)
                    self._queue.refused(letter, error.message)

    def _send(self, target: Target, letter: Letter) -> None:
        """Store a file, unless the archive got it before this could be written down."""
        try:
            content = letter.path.read_bytes()
        except FileNotFoundError:
            raise NotWanted("its file is gone") from None
        header = dcmread(io.BytesIO(content), stop_before_pixels=True)
        study, series, kind, image = (str(header[name].value) for name in NAMED)
        if not (letter.attempts and target.has(study, series, image)):
            self._queue.attempt(letter)
            target.store(content)
        target.confirm(kind, image)
        self._queue.sent(letter)

    # -- fetching ------------------------------------------------------------------------------
    def _poller(self, web: DicomWeb, poll: Poll) -> None:
        while True:
            try:
                self._look(web, poll)
            except (Unreachable, NotWanted, StorageError) as error:
                log.warning("fetching: %s; it goes on in %g s", error.message, poll.every_seconds)
            if self._stop.wait(poll.every_seconds):
                return

    def _look(self, web: DicomWeb, poll: Poll) -> None:
        """Fetch each series that a rule may choose and that has stayed the same."""
        wanted = {"includefield": ",".join(ASKED)}
        if poll.days:
            first = datetime.date.today() - datetime.timedelta(days=poll.days - 1)
            wanted["StudyDate"] = f"{first:%Y%m%d}-"
        failed = 0
        passed = Counter[str]()
        for one in web.ask("series", **wanted):
            count = one.get("NumberOfSeriesRelatedInstances", "")
            study, series = one.get("StudyInstanceUID"), one.get("SeriesInstanceUID")
            if self._stop.is_set():
                return
            if not (study and series):
                continue
            images = int(count) if count.isdecimal() else 0
            if not 0 < images <= MAX_IMAGES:
                many = f"has more than {MAX_IMAGES} images"
                passed[many if images else "does not say how many images it has"] += 1
                continue
            facts = facts_of_answer(one, images)
            if all(why_not(rule, facts) for rule in self._settings.rules):
                continue
            if self._queue.stable(series, images, poll.quiet_seconds):
                self._queue.fetching(series, study)
                try:
                    self._fetch(web, study, series, images, poll.max_object_bytes)
                except (Unreachable, NotWanted) as error:  # the others are not kept waiting for it
                    log.warning("series %s is not fetched: %s", digest(series), error.message)
                    failed += 1
                    if failed >= MAX_FAILED:
                        raise
                    continue
                self._queue.fetched(series, images)
        self._passed_over(passed)

    def _passed_over(self, passed: Counter[str]) -> None:
        """Tell of series that are never fetched, whenever there are others than before."""
        told = ", ".join(f"{count} that {why}" for why, count in sorted(passed.items()))
        if told and told != self._told:
            log.warning("series of the archive are not fetched: %s", told)
        self._told = told

    def _fetch(self, web: DicomWeb, study: str, series: str, images: int, max_bytes: int) -> None:
        """Every image that the archive says a series has, each the one that was asked for."""
        listed = set()
        for one in web.ask(f"studies/{study}/series/{series}/instances"):
            image = one.get("SOPInstanceUID")
            if self._stop.is_set():
                raise Unreachable("stopped while fetching")
            if not image:
                continue
            listed.add(image)
            if not self._queue.has(study, image):
                content = web.fetch(study, series, image, max_bytes)
                check_asked(content, study, image)
                self._queue.put(study, image, content)
        if len(listed) < images:
            raise Unreachable(f"the archive counts {images} images and lists {len(listed)}")


def check_asked(content: bytes, study: str, image: str) -> None:
    """An archive's image is the one that was asked for.

    Args:
        content: a file of PS3.10.
        study: Study Instance UID that was asked for.
        image: SOP Instance UID that was asked for.

    Raises:
        NotWanted: it is another one, or cannot be read.
    """
    try:
        header = dcmread(
            io.BytesIO(content),
            stop_before_pixels=True,
            specific_tags=["StudyInstanceUID", "SOPInstanceUID"],
        )
        found = str(header.get("StudyInstanceUID", "")), str(header.get("SOPInstanceUID", ""))
    except Exception:  # noqa: BLE001 - of whatever kind, it is no image
        raise NotWanted("what the archive gives as an image cannot be read") from None
    if found != (study, image):
        raise NotWanted("the archive gives another image than the one that was asked for")


ASKED = (
    *("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription"),
    *("StudyDescription", "BodyPartExamined", "NumberOfSeriesRelatedInstances"),
)


def found_in(vertical: Vertical[Any, Any], folder: Path) -> tuple[list[Item], list[LeftOut]]:
    """All that a vertical finds in a folder: items, and what it leaves out.

    Raises:
        PlinthError: it can read none of it.
    """
    items: dict[str, Item] = {}
    left: list[LeftOut] = []
    for one in survey(vertical, folder):
        if isinstance(one, LeftOut):
            left.append(one)
            continue
        for name in one.replaces:
            items.pop(name, None)
        items[one.id] = one
    return list(items.values()), left


def _inputs(vertical: Vertical[Any, Any], item: Item, contents: Mapping[str, str]) -> str:
    """What a result depends on: the images' contents, the settings, the models' versions."""
    parts = [vertical.name, vertical.settings.model_dump_json(), repr(versions(vertical))]
    parts += sorted(contents.get(path.name, path.name) for path in item.paths)
    return digest(*parts)


class QueueMetrics:
    """Counts of the queue for Prometheus, taken when they are asked for."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def collect(self) -> Sequence[GaugeMetricFamily]:
        """See ``prometheus_client.registry.Collector``."""
        found = self._queue.status()
        families = []
        for what, name in (("studies", "study"), ("analyses", "analysis"), ("files", "file")):
            family = GaugeMetricFamily(
                f"plinth_archive_{what}", f"How many there are of each state of a {name}.",
                labels=["state"],
            )  # fmt: skip
            for state, count in found[what].items():
                family.add_metric([state], count)
            families.append(family)
        size = GaugeMetricFamily("plinth_archive_bytes", "Disk that images take.")
        size.add_metric([], found["bytes"])
        return [*families, size]
