"""Work on a few threads: all of it done, the first error told, nothing left running."""

from __future__ import annotations

import threading

import pytest

from plinth.engine.parallel import MOST, spread


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
