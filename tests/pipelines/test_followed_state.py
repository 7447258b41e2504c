"""A standby that reads a worker's state on disk goes on with the same features, bit for bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from plinth.pipelines.state.store import DiskStore
from plinth.pipelines.stream.checkpoint import MAX_BEHIND, Checkpoint
from plinth.pipelines.stream.chunks import Partition
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.online import Event

ORIGIN = {"vertical": "finance", "topic": "payments", "group": "g"}
PLACE = Partition("payments", 0)
SMALL = {f"max_{table}": 8 for table in ("cards", "terminals", "customers", "devices")}
CHUNK = 20
FORK = multiprocessing.get_context("fork")


def scoring() -> FraudScoring:
    """Of which next to nothing is in memory."""
    return FraudScoring(FraudSettings(**SMALL))


def payments(number: int) -> list[Event]:
    """Of one chunk, of few cards, some of them late or again."""
    dice = random.Random(number)
    return [
        Event(
            f"x{number * CHUNK + n - dice.choice((0, 0, 0, 30))}",
            1_700_000_000_000 + (number * CHUNK + n) * 60_000 - dice.choice((0, 0, 3_600_000)),
            float(dice.randrange(1, 100)),
            f"tok_{dice.randrange(400)}",
            f"c{dice.randrange(40)}",
            f"t{dice.randrange(30)}",
            f"d{dice.randrange(30)}",
        )
        for n in range(CHUNK)
    ]


class Member:
    """A worker or a standby, at a chunk."""

    def __init__(self, checkpoint: Checkpoint, vertical: FraudScoring) -> None:
        self.checkpoint, self.vertical = checkpoint, vertical

    @property
    def at(self) -> int:
        """The next chunk."""
        return self.checkpoint.applied.get(PLACE, 0)

    def take(self) -> bytes:
        """Take a chunk in; its features."""
        at = self.at
        batch = self.vertical.state.update(payments(at))
        self.checkpoint.advance({PLACE: at + 1})
        return batch.rows.tobytes() + batch.flags.tobytes()

    def save(self) -> None:
        """Make a checkpoint, whole."""
        self.checkpoint.save()
        self.checkpoint.finish()


def serve(folder: Path, asked: Connection) -> None:
    """Be a worker: take a chunk in, or make a checkpoint, whenever asked."""
    vertical = scoring()
    store = DiskStore(folder, ORIGIN)
    member = Member(Checkpoint(vertical, None, ORIGIN, 1_000, store), vertical)
    with contextlib.suppress(EOFError):
        while True:
            asked.send(member.take() if asked.recv() == "take" else member.save())


class Worker:
    """Another process that holds the state."""

    def __init__(self, folder: Path) -> None:
        self._asked, there = FORK.Pipe()
        self._process = FORK.Process(target=serve, args=(folder, there), daemon=True)
        self._process.start()
        there.close()
        self.at = 0

    def take(self) -> bytes:
        """Take a chunk in; its features."""
        self._asked.send("take")
        self.at += 1
        taken: bytes = self._asked.recv()
        return taken

    def save(self) -> None:
        """Make a checkpoint, whole."""
        self._asked.send("save")
        self._asked.recv()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[Worker]:
    made = Worker(folder)
    try:
        yield made
    finally:
        made.kill()


def standby(folder: Path) -> Member:
    vertical = scoring()
    return Member(Checkpoint(vertical, None, ORIGIN, 1_000, followed=folder), vertical)


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """Features of each chunk, from a state that is all in memory."""
    made = map(FraudScoring().state.update, map(payments, range(130)))
    return [batch.rows.tobytes() + batch.flags.tobytes() for batch in made]


@pytest.mark.parametrize("seed", range(2))
def test_whoever_stands_by_goes_on_where_it_stands(
    tmp_path: Path, expected: list[bytes], seed: int
) -> None:
    """Whenever checkpoints came, and however far behind it was."""
    dice = random.Random(seed)
    second, held = standby(tmp_path), [0]
    assert not second.checkpoint.follow(), "there is nothing yet"
    with worker(tmp_path) as first:
        for number in range(100):
            assert first.take() == expected[number]
            if dice.random() < 0.2:
                first.save()
            if dice.random() < 0.5 and second.checkpoint.follow():
                for _ in range(dice.randrange(first.at - second.at + 1)):
                    assert second.take() == expected[second.at - 1]
                held.append(len(second.vertical.state.cards.items))
    assert second.at > 0
    second.checkpoint.release()
    with contextlib.closing(DiskStore(tmp_path, ORIGIN)) as store:
        second.checkpoint.take_over(store)
        assert second.at > 0
        while second.at < 130:
            assert second.take() == expected[second.at - 1]
            if dice.random() < 0.2:
                second.save()
    assert min(held[-20:]) < 330, "what a checkpoint of the worker has may leave memory"


def test_one_that_is_far_behind_begins_with_the_newest_checkpoint(tmp_path: Path) -> None:
    second = standby(tmp_path)
    with worker(tmp_path) as first:
        first.take()
        first.save()
        assert second.checkpoint.follow()
        assert second.at == 1
        for _ in range(MAX_BEHIND):
            first.take()
            first.save()
        assert second.checkpoint.follow()
        assert second.at == 1, "it reads on from the one that it began with"
        first.take()
        first.save()
        assert second.checkpoint.follow()
        assert second.at == first.at
        second.checkpoint.release()


def test_a_state_of_another_is_not_followed(tmp_path: Path) -> None:
    with worker(tmp_path) as first:
        first.take()
        first.save()
        vertical = scoring()
        other = Checkpoint(vertical, None, ORIGIN | {"topic": "x"}, 1_000, followed=tmp_path)
        assert not other.follow()
        other.release()
