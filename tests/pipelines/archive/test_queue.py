"""The queue on disk: nothing that was taken is lost, nothing that was stored is sent again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import binary, integers, sampled_from

from plinth.engine import ConfigError
from plinth.pipelines.archive.queue import MAX_ATTEMPTS, Queue, digest
from plinth.pipelines.folders.storage import StorageFull


class Clock:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(tmp_path: Path, clock: Clock) -> Iterator[Queue]:
    with closing(Queue(tmp_path / "archive", clock=clock)) as queue:
        yield queue


# -- what comes in --------------------------------------------------------------------------------
def test_a_study_is_ready_when_nothing_came_for_long_enough(queue: Queue, clock: Clock) -> None:
    assert queue.put("1.2", "1.2.1", b"first") == "new"
    clock.now += 19
    queue.put("1.2", "1.2.2", b"second")
    clock.now += 19
    assert queue.ready(20) is None
    clock.now += 1
    ready = queue.ready(20)
    assert ready is not None
    assert sorted(path.read_bytes() for path in ready.folder.iterdir()) == [b"first", b"second"]
    queue.finish(ready)
    assert queue.ready(20) is None


def test_the_same_image_again_is_no_news_and_another_content_is(queue: Queue, clock: Clock) -> None:
    queue.put("1.2", "1.2.1", b"first")
    clock.now += 20
    ready = queue.ready(20)
    assert ready is not None
    queue.finish(ready)
    assert queue.put("1.2", "1.2.1", b"first") == "same"
    assert queue.ready(0) is None
    assert queue.put("1.2", "1.2.1", b"corrected") == "changed"
    assert queue.ready(0) is not None


def test_only_a_later_caller_that_says_so_makes_whole_what_was_broken_off(
    queue: Queue, clock: Clock
) -> None:
    queue.put("1.2", "1.2.1", b"first")
    study = digest("1.2")
    one = queue.sending("1.2", "1.2.7")
    clock.now += 1
    other = queue.sending("1.2", "1.2.7")
    clock.now += 1
    queue.ended("1.2", "1.2.7", one, whole=False)
    queue.ended("1.2", "1.2.7", other, whole=True)  # began before, and had its own part
    assert queue.broken_off(study) == 1
    ready = queue.ready(0)
    assert ready is not None
    queue.finish(ready, "broken off", "incomplete")
    clock.now += 1
    queue.ended("1.2", "1.2.8", queue.sending("1.2", "1.2.8"), whole=True)  # another series
    assert queue.broken_off(study) == 1
    assert queue.ready(0) is None
    again = queue.sending("1.2", "1.2.7")
    assert queue.put("1.2", "1.2.1", b"first") == "same"
    queue.ended("1.2", "1.2.7", again, whole=True)
    assert queue.broken_off(study) == 0
    assert queue.ready(0) is not None


def test_what_was_on_its_way_when_the_process_ended_was_broken_off(
    tmp_path: Path, clock: Clock
) -> None:
    with closing(Queue(tmp_path / "archive", clock=clock)) as queue:
        queue.put("1.2", "1.2.1", b"first")
        queue.sending("1.2", "1.2.7")
        assert queue.broken_off(digest("1.2")) == 0
    with closing(Queue(tmp_path / "archive", clock=clock)) as queue:
        assert queue.broken_off(digest("1.2")) == 1
        ready = queue.ready(0)
        assert ready is not None
        queue.finish(ready, "broken off", "incomplete")
        assert queue.retry() == 1  # whoever knows that it was all may say so
        assert queue.broken_off(digest("1.2")) == 0
        assert queue.ready(0) is not None


def test_what_comes_while_a_study_is_worked_on_is_not_forgotten(queue: Queue) -> None:
    queue.put("1.2", "1.2.1", b"first")
    ready = queue.ready(0)
    assert ready is not None
    queue.put("1.2", "1.2.2", b"late")
    queue.finish(ready)
    assert queue.ready(0) is not None


def test_a_clock_that_was_set_back_holds_up_no_study(queue: Queue, clock: Clock) -> None:
    queue.put("1.2", "1.2.1", b"first")
    clock.now -= 1e6
    assert queue.ready(20) is not None


def test_a_series_that_is_being_fetched_holds_its_study_up_also_after_a_kill(
    tmp_path: Path, clock: Clock
) -> None:
    queue = Queue(tmp_path / "fetch", clock=clock)
    assert not queue.stable("1.2.3", 2, quiet=10)
    clock.now += 10
    assert queue.stable("1.2.3", 2, quiet=10)
    queue.fetching("1.2.3", "1.2")
    queue.put("1.2", "1.2.3.1", b"first")
    queue.close()
    queue = Queue(tmp_path / "fetch", clock=clock)  # as after a kill
    clock.now += 1000
    assert queue.ready(20) is None
    assert queue.stable("1.2.3", 2, quiet=10)  # it is fetched again
    queue.put("1.2", "1.2.3.2", b"second")
    queue.fetched("1.2.3", 2)
    assert not queue.stable("1.2.3", 2, quiet=10)
    clock.now += 20
    assert queue.ready(20) is not None
    queue.close()


def test_disk_is_bounded_and_given_back(tmp_path: Path, clock: Clock) -> None:
    queue = Queue(tmp_path / "small", max_bytes=10, clock=clock)
    queue.put("1.2", "1.2.1", b"12345678")
    with pytest.raises(StorageFull, match="images take 8 bytes, at most 10 are kept"):
        queue.put("1.3", "1.3.1", b"123")
    queue.put("1.2", "1.2.1", b"1234567890")  # takes the place of the first
    ready = queue.ready(0)
    assert ready is not None
    queue.finish(ready)
    clock.now += 100
    assert queue.clean(keep_seconds=99) == 1
    assert not ready.folder.exists()
    queue.put("1.3", "1.3.1", b"1234567890")
    queue.close()


def test_a_study_of_which_some_was_deleted_is_not_taken_for_the_whole(
    queue: Queue, clock: Clock
) -> None:
    for number in range(3):
        queue.put("1.2", f"1.2.{number}", b"image")
    ready = queue.ready(0)
    assert ready is not None
    queue.finish(ready)
    clock.now += 100
    queue.clean(keep_seconds=50)
    queue.put("1.2", "1.2.9", b"late")
    assert queue.missing(ready.study) == 3
    for number in range(3):
        queue.put("1.2", f"1.2.{number}", b"image")
    assert queue.missing(ready.study) == 0


def test_a_study_that_waits_to_be_sent_is_not_deleted(queue: Queue, clock: Clock) -> None:
    queue.put("1.2", "1.2.1", b"first")
    ready = queue.ready(0)
    assert ready is not None
    queue.begin(ready.study, "lungs", "item", "inputs")
    queue.done(ready.study, "lungs", "item", [queue.folder / "results" / "a.dcm"])
    queue.finish(ready)
    clock.now += 1e9
    assert queue.clean(keep_seconds=1) == 0


def test_two_processes_do_not_share_a_folder(queue: Queue) -> None:
    with pytest.raises(ConfigError, match="another process works in"):
        Queue(queue.folder)
    queue.close()
    Queue(queue.folder).close()


# -- what is analysed -----------------------------------------------------------------------------
def test_an_analysis_that_ends_the_process_is_given_up(tmp_path: Path) -> None:
    for attempt in range(MAX_ATTEMPTS + 1):
        queue = Queue(tmp_path)  # as after a kill
        assert queue.begin("study", "lungs", "item", "inputs") == (attempt < MAX_ATTEMPTS)
        queue.close()
    queue = Queue(tmp_path)
    assert queue.status()["told"][0]["message"] == "the process ended 3 times in this analysis"
    assert queue.retry() == 1
    assert queue.begin("study", "lungs", "item", "inputs")
    queue.close()


def test_other_images_are_analysed_again_and_the_older_result_is_not_sent(queue: Queue) -> None:
    results = queue.folder / "results"
    assert queue.begin("study", "lungs", "item", "two slices")
    queue.done("study", "lungs", "item", [results / "old.dcm"])
    assert not queue.begin("study", "lungs", "item", "two slices")
    assert queue.begin("study", "lungs", "item", "three slices")
    queue.done("study", "lungs", "item", [results / "new.dcm"])
    letter = queue.next_letter()
    assert letter is not None
    assert letter.path.name == "new.dcm"
    assert queue.status()["files"] == {"waiting": 1}


# -- any order of events, with kills in between ---------------------------------------------------
class Life(RuleBasedStateMachine):
    """Images come, are analysed and sent; the process is killed at any moment.

    The archive takes a file whether or not the answer arrives; what it has it tells (QIDO), so the
    sender asks before it sends again.
    """

    @initialize()
    def start(self) -> None:
        self.folder = TemporaryDirectory()
        self.clock = Clock()
        self.queue = Queue(Path(self.folder.name), clock=self.clock)
        self.archive: Counter[str] = Counter()
        self.made = 0
        self.taken: dict[tuple[str, str], bytes] = {}

    @rule(study=sampled_from("ab"), image=integers(0, 3), content=binary(min_size=1, max_size=2))
    def image_comes(self, study: str, image: int, content: bytes) -> None:
        self.queue.put(study, str(image), content)
        self.taken[study, str(image)] = content

    @rule(ends=sampled_from(("done", "killed", "failed")))
    def study_is_analysed(self, ends: str) -> None:
        ready = self.queue.ready(0)
        if ready is None:
            return None
        inputs = repr(sorted(self.queue.contents(ready.study).items()))
        if self.queue.begin(ready.study, "lungs", "item", inputs):
            if ends == "killed":
                return self.kill()
            if ends == "failed":
                self.queue.failed(ready.study, "lungs", "item", "bad", "bad images")
            else:
                self.made += 1
                paths = [self.queue.folder / "results" / f"{self.made}-{n}.dcm" for n in range(2)]
                self.queue.done(ready.study, "lungs", "item", paths)
        return self.queue.finish(ready)

    @rule(answer=sampled_from(("stored", "lost", "killed", "busy", "no")))
    def file_is_sent(self, answer: str) -> None:
        letter = self.queue.next_letter()
        if letter is None:
            return None
        if letter.attempts and self.archive[letter.path.name]:
            return self.queue.sent(letter)
        self.queue.attempt(letter)
        if answer in ("busy", "no"):
            settle: Any = self.queue.later if answer == "busy" else self.queue.refused
            return settle(letter, "why", *([5.0] if answer == "busy" else []))
        self.archive[letter.path.name] += 1
        if answer == "stored":
            return self.queue.sent(letter)
        return self.kill() if answer == "killed" else self.queue.later(letter, "lost", 5.0)

    @rule()
    def time_passes(self) -> None:
        self.clock.now += 10

    @rule()
    def kill(self) -> None:
        self.queue.close()
        self.queue = Queue(Path(self.folder.name), clock=self.clock)

    @invariant()
    @precondition(lambda self: hasattr(self, "queue"))
    def nothing_is_sent_twice_and_no_image_is_lost(self) -> None:
        assert max(self.archive.values(), default=0) <= 1
        assert self.queue.status()["images"] == len(self.taken)

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.queue.close()
            self.folder.cleanup()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
