"""Work on a few threads: all of it done, the first error told, nothing left running."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from plinth.engine.parallel import MOST, import_ahead, spread

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("threads", [None, 1, 2, 100])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_every_part_is_done_once(threads: int | None, count: int) -> None:
    done: list[int] = []
    spread(done.append, range(count), threads)
    assert sorted(done) == list(range(count))


def test_parts_are_done_side_by_side_and_never_more_than_allowed() -> None:
    together, names = threading.Barrier(2, timeout=60), set[str]()

    def work(_: int) -> None:
        names.add(threading.current_thread().name)
        together.wait()

    spread(work, range(10), threads=2)
    assert len(names) == 2
    spread(lambda _: names.add(threading.current_thread().name), range(1000), threads=1000)
    assert len(names) <= 2 + MOST


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_is_told_and_ends_the_rest(threads: int) -> None:
    begun: list[int] = []

    def work(part: int) -> None:
        begun.append(part)
        if part == 3:
            raise ValueError("part 3")

    with pytest.raises(ValueError, match="part 3"):
        spread(work, range(100_000), threads)
    assert len(begun) < 100_000
    assert not [t for t in threading.enumerate() if t.name.startswith("plinth-spread")]


def test_of_several_errors_that_of_the_first_part_is_told() -> None:
    later = threading.Event()

    def work(part: int) -> None:
        if part == 0:
            assert later.wait(60)
        else:
            later.set()
        raise ValueError(f"part {part}")

    for _ in range(20):
        later.clear()
        with pytest.raises(ValueError, match="part 0"):
            spread(work, range(2), threads=2)


def test_modules_come_ahead_of_their_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_ahead.py").write_text("raise OSError\n")
    (tmp_path / "found_ahead.py").write_text("found = 1\n")
    import_ahead("broken_ahead", "nowhere_ahead", "found_ahead")
    for thread in threading.enumerate():
        if thread.name == "plinth-import":
            thread.join(60)
    assert sys.modules["found_ahead"].found == 1
    del sys.modules["found_ahead"]
