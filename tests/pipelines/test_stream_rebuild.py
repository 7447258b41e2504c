"""A decision is a function of the log: it can be made again, bit for bit, long afterwards."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kafka.errors import KafkaError
from kafka_fixtures import KafkaNode
from tally import started_engine

from plinth.engine import ConfigError, Engine, Flow
from plinth.pipelines.stream import kafka_replay
from plinth.pipelines.stream.chunks import Partition, Record
from plinth.pipelines.stream.history.rebuild import Rebuilt, has_value, rebuild
from plinth.pipelines.stream.settings import StreamConfig
from plinth.pipelines.stream.worker import run
from plinth.verticals.finance import FraudScoring, FraudSettings

pytestmark = [pytest.mark.kafka, pytest.mark.slow]
DAY_S = 86_400


class Watched(FraudScoring):
    """Keeps the features that the model was asked about, by transaction id."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[float]] = {}

    def answers(self, requests: Sequence[Any]) -> Flow[Any]:
        flow = super().answers(requests)
        ids = [r.transaction_id for r in requests if r.model_fields_set >= {"amount"}]
        try:
            call = next(flow)
            self.rows |= zip(ids, call.rows.tolist(), strict=True)
            while True:
                call = flow.send((yield call))
        except StopIteration as end:
            return end.value


def payments(count: int, seed: int) -> list[tuple[bytes, bytes]]:
    """Keyed by card, in many partitions at the same terminals; some late, repeated, or no JSON."""
    dice = random.Random(seed)
    made: list[tuple[bytes, bytes]] = []
    for n in range(count):
        card = f"tok_{dice.randrange(60)}"
        at = 1_760_000_000 + n * 600 - (dice.randrange(20 * DAY_S) if dice.random() < 0.1 else 0)
        record = {
            "transaction_id": f"x{n}",
            "event_time": datetime.fromtimestamp(at, UTC).isoformat(),
            "amount": round(dice.uniform(1, 300) * (40 if dice.random() < 0.05 else 1), 2),
            "currency": "EUR",
            "card": card,
            "customer_id": f"c{card[4:]}",
            "terminal_id": f"t{dice.randrange(25)}",
            "device_id": f"d{dice.randrange(30)}",
        }
        made.append((card.encode(), json.dumps(record).encode()))
        if dice.random() < 0.02:
            made.append(dice.choice(made))
        if dice.random() < 0.01:
            made.append((card.encode(), b"{"))
    return made


def stream(config: StreamConfig, vertical: Watched) -> None:
    with started_engine(vertical) as engine:
        run(vertical, engine, config, threading.Event())


def again(config: StreamConfig, *names: str, **options: Any) -> list[Rebuilt]:
    vertical, named = FraudScoring(), [has_value(name) for name in names]
    with started_engine(vertical) as engine:
        return list(
            rebuild(vertical, engine, config, lambda v: any(one(v) for one in named), **options)
        )


def test_thousands_of_decisions_over_restarts_are_made_again_bit_for_bit(
    kafka_node: KafkaNode, tmp_path: Path
) -> None:
    config = kafka_node.config(state_dir=tmp_path, max_records=128)
    records = payments(2_000, seed=7)
    kafka_node.fill(config, records)
    first = Watched()
    stream(config.model_copy(update={"max_events": 1_000}), first)
    (tmp_path / "state.snapshot").unlink()  # so the next one begins with a replay
    second = Watched()
    stream(config, second)

    found = again(config, "*", features=False)
    assert len(found) == len(records)
    # a repeat gets the row of its first time, which may have come in another order from elsewhere
    assert [one for one in found if not one.equal and b'"duplicate":true' not in one.value] == []
    assert sum(one.equal for one in found) > len(found) - 20
    assert any(one.value is None for one in found)  # dead letters among them

    seen = first.rows | second.rows
    names = ("x3", "x500", "x1500", "x1999")
    told = {json.loads(one.value)["transaction_id"]: one for one in again(config, *names)}
    assert told.keys() == set(names)
    assert all(one.equal for one in told.values())
    assert {name: one.rows for name, one in told.items()} == {n: [seen[n]] for n in names}


def read(replay: kafka_replay.Replay, count: int) -> list[Record]:
    found: list[Record] = []
    while replay.partitions or len(found) < count:
        chunk = replay.take()
        found += chunk.records if chunk else []
    return found


def test_records_that_a_silent_broker_keeps_back_are_not_left_out(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kafka_node.config(partitions=1)
    kafka_node.fill(config, payments(200, seed=5))
    monkeypatch.setattr(kafka_replay, "SILENCE_S", 0.5)
    monkeypatch.setattr(kafka_replay, "ANSWER_MS", 500)
    span = {Partition(config.input_topic, 0): (0, 200)}
    with contextlib.closing(kafka_replay.Replay(config, span)) as replay:
        kafka_node.freeze()
        try:
            with pytest.raises(KafkaError):
                read(replay, 200)
        finally:
            kafka_node.thaw()
    with contextlib.closing(kafka_replay.Replay(config, span)) as replay:
        found = read(replay, 200)
    assert [record.offset for record in found] == list(range(200))


def test_partitions_of_many_records_are_read_one_far_ahead_of_another(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = kafka_node.config(partitions=3), 250
    kafka_node.fill(config, ((f"c{n}".encode(), b"%d" % n) for n in range(6_000)))
    monkeypatch.setattr(kafka_replay, "MAX_AHEAD", 300)
    written = kafka_node.read(config.input_topic)
    ends = Counter(Partition(one.topic, one.partition) for one in written)
    with contextlib.closing(kafka_replay.Log(config)) as log:
        found = {place: log.take(place, 0, step) for place in ends}
        for place, end in ends.items():
            for start in range(step, end, step):
                found[place] += log.take(place, start, min(start + step, end))
    offsets = {place: [record.offset for record in records] for place, records in found.items()}
    assert offsets == {place: list(range(end)) for place, end in ends.items()}


def test_why_a_decision_is_another_now_is_said(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=2, max_events=100)
    kafka_node.fill(config, payments(100, seed=3))
    stream(config, Watched())

    def why(engine: Engine, **settings: Any) -> dict[str, list[dict[str, Any]]]:
        """The decisions that became others, by the reason, both answers with each."""
        vertical = FraudScoring(FraudSettings(**settings))
        made = list(rebuild(vertical, engine, config, has_value("*"), features=False))
        assert len(made) == 100
        assert all(one.equal != bool(one.why) for one in made)
        found: dict[str, list[dict[str, Any]]] = {}
        for one in made:
            for reason in one.why:
                found.setdefault(reason.partition(":")[0], []).append(one.as_dict())
        return found

    with started_engine(FraudScoring()) as engine:
        assert why(engine) == {}
        assert len(why(engine, hard_amount=100.0)["other rules"]) > 80
        strict = {"review_threshold": 0.0, "decline_threshold": 0.0}
        told = why(engine, **strict)
        assert told.keys() == {"other thresholds"}, {
            reason: of[:3] for reason, of in told.items() if reason != "other thresholds"
        }
        assert len(why(engine, rates={"EUR": 1.5})["other features"]) > 80
        assert why(engine, rates={"USD": 1.0}).keys() == {"it is refused now"}


def test_what_cannot_be_made_again_is_said(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(positions=False, max_events=10)
    kafka_node.fill(config, payments(10, seed=1)[:10])
    stream(config, Watched())
    with pytest.raises(ConfigError, match="says which records it was made from"):
        again(config, "x3")
