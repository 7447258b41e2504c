"""The loop, the scorer and the state's keeper over a log in memory: every failure, no Kafka."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tally import TallyVertical, expect_each_once, started_engine

from plinth.engine import ConfigError, InputError, ModelError, Refused
from plinth.pipelines.stream.checkpoint import Keeper, claim
from plinth.pipelines.stream.loop import Chunk, Partition, Rewind, Scored, pump
from plinth.pipelines.stream.scorer import LONGEST_STREAK, Scorer

P = Partition("in", 0)
ENGINE = started_engine(TallyVertical())


@dataclass(frozen=True)
class Line:
    """A record in memory."""

    offset: int
    value: bytes | None
    topic: str = "in"
    partition: int = 0
    timestamp: int = 0
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


def lines(count: int, **amounts: float) -> list[Line]:
    return [
        Line(i, json.dumps({"id": i, "card": f"c{i % 5}", "amount": amounts.get(f"at_{i}", 1.0)})
             .encode())
        for i in range(count)
    ]  # fmt: skip


@dataclass
class MemoryLog:
    """One partition in memory, source and sink at once.

    ``fates`` says what becomes of each commit: "ok", "lost" (nothing was written, and we are
    told so) or "doubt" (it was written, and we are told it was not).
    """

    records: list[Line]
    keeper: Keeper
    fates: list[str] = field(default_factory=list)
    size: int = 4
    at: int = 0
    mark: int = 0
    durable: int = 0
    written: list[Any] = field(default_factory=list)

    def take(self) -> Chunk | None:
        replay = self.at < self.mark
        end = min(self.at + self.size, self.mark if replay else len(self.records))
        if end == self.at:
            return None
        chunk = Chunk(list(self.records[self.at : end]), {P: self.at}, {P: end}, None, replay)
        self.at = end
        return chunk

    def write(self, scored: Scored) -> None:
        fate = self.fates.pop(0) if self.fates else "ok"
        if fate != "lost":
            self.durable = scored.chunk.ends[P]
            self.written += scored.messages
        if fate != "ok":
            raise Rewind(fate)

    def settle(self) -> None:
        return None

    def recover(self, why: Rewind) -> None:
        self.keeper.torn |= why.cause == "poison"
        self.at, self.mark = self.keeper.plan({P: self.durable}, {P: 0})[P]

    def run(self, vertical: TallyVertical) -> None:
        scorer = Scorer(
            vertical, ENGINE, wait=lambda _: None, applied=self.keeper.note, stateful=True
        )
        pump(
            self, scorer, self, threading.Event(),
            recover=self.recover, after=lambda chunk: chunk is None,
        )  # fmt: skip

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(m.value) for m in self.written if m.error is None]


def keeper(vertical: TallyVertical, path: Path | None = None, **more: Any) -> Keeper:
    return Keeper(vertical, path, {"vertical": "tally"}, more.get("replay_max_records", 1_000))


@given(
    fates=st.lists(st.sampled_from(["ok", "lost", "doubt"]), max_size=12),
    size=st.integers(1, 9),
    bad=st.sets(st.integers(0, 29), max_size=3),
)
def test_whatever_becomes_of_commits_nothing_is_lost_or_counted_twice(
    fates: list[str], size: int, bad: set[int]
) -> None:
    vertical = TallyVertical()
    kept = keeper(vertical)
    records = lines(30)
    for number in bad:
        records[number] = Line(number, b"{")
    log = MemoryLog(records, kept, fates, size)
    log.run(vertical)
    answers = log.answers()
    assert sorted(a["id"] for a in answers) == sorted(set(range(30)) - bad)
    assert len(log.written) == 30
    seen: dict[str, int] = {}
    for answer in answers:
        seen[answer["card"]] = seen.get(answer["card"], 0) + 1
        assert answer["count"] == seen[answer["card"]]


def test_a_poison_record_of_a_stateful_vertical_is_found_by_scoring_alone() -> None:
    vertical = TallyVertical()
    log = MemoryLog(lines(20, at_6=-2.0), keeper(vertical), size=5)
    log.run(vertical)
    errors = [(m.record.offset, m.error.reason) for m in log.written if m.error]
    assert errors == [(6, "infer_failed")]
    assert len(log.answers()) == 19


def test_a_vertical_that_fails_on_everything_stops_the_stream_instead_of_draining_it() -> None:
    vertical = TallyVertical()
    amounts = {f"at_{i}": -2.0 for i in range(200)}
    log = MemoryLog(lines(200, **amounts), keeper(vertical), size=LONGEST_STREAK * 2)
    with pytest.raises(ModelError, match="in a row"):
        log.run(vertical)
    assert log.written == []


def test_refused_work_runs_the_verticals_own_steps_once() -> None:
    vertical = TallyVertical()
    waits: list[Refused] = []
    calls = iter([Refused("full"), Refused("full")])

    class Full(type(ENGINE)):  # type: ignore[misc]
        def __init__(self) -> None:
            """Nothing of its own: it refuses twice, then lends the real engine."""

        def run(self, *args: Any) -> Any:
            for refused in calls:
                raise refused
            return ENGINE.run(*args)

    scorer = Scorer(vertical, Full(), wait=waits.append, applied=lambda _: None)
    scored = scorer.score(Chunk(list(lines(10)), {P: 0}, {P: 10}))
    assert len(waits) == 2
    expect_each_once([json.loads(m.value) for m in scored.messages], 10)


def test_a_snapshot_is_picked_up_with_its_offsets_and_only_the_rest_is_read_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = keeper(first, path)
    log = MemoryLog(lines(30), kept)
    log.run(first)
    kept.save()
    second = TallyVertical()
    again = keeper(second, path)
    assert second.counts == first.counts
    assert again.plan({P: 34}, {P: 0}) == {P: (30, 34)}


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_snapshot_that_cannot_be_trusted_is_rebuilt_from_the_input(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = keeper(first, path)
    MemoryLog(lines(30), kept).run(first)
    kept.save()
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        Keeper(first, path, {"vertical": "another"}, 1).note({P: 30})
        other = Keeper(first, path, {"vertical": "another"}, 1)
        other.note({P: 30})
        other.save()
    second = TallyVertical()
    again = keeper(second, path)
    assert second.counts == {}
    assert again.plan({P: 30}, {P: 0}) == {P: (0, 30)}
    assert "built again" in caplog.text


def test_a_snapshot_ahead_of_reset_offsets_is_said_and_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state"
    first = TallyVertical()
    kept = keeper(first, path)
    MemoryLog(lines(30), kept).run(first)
    kept.save()
    second = TallyVertical()
    assert keeper(second, path).plan({P: 10}, {P: 0}) == {P: (0, 10)}
    assert second.counts == {}
    assert "ahead of the committed offsets" in caplog.text


def test_replay_is_bounded_and_says_what_retention_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keeper(TallyVertical(), replay_max_records=100)
    assert kept.plan({P: 1_000}, {P: 0}) == {P: (900, 1_000)}
    assert kept.plan({P: 1_000}, {P: 950}) == {P: (950, 1_000)}
    kept.note({P: 500})
    assert kept.plan({P: 1_000}, {P: 700}) == {P: (700, 1_000)}
    assert "500 to 700 are not retained" in caplog.text


def test_a_state_folder_belongs_to_one_worker(tmp_path: Path) -> None:
    with (
        claim(tmp_path) as name,
        pytest.raises(ConfigError, match="in use by another worker"),
        claim(tmp_path),
    ):
        pass
    with claim(tmp_path) as again:
        assert again == name  # and the name lasts


def test_an_answer_too_large_for_kafka_is_a_dead_letter() -> None:
    vertical = TallyVertical()
    scorer = Scorer(
        vertical, ENGINE, wait=lambda _: None, applied=lambda _: None, max_record_bytes=52
    )
    record = Line(0, b'{"id":1,"card":"' + b"x" * 20 + b'","amount":1}')
    (message,) = scorer.score(Chunk([record], {P: 0}, {P: 1})).messages
    assert isinstance(message.error, InputError)
    assert message.error.reason == "too_large"
