"""Sending dead letters back to the topic they came from, exactly once."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from plinth.engine import Flow, InputError, Model
from plinth.pipelines.stream.checkpoint import Checkpoint
from plinth.pipelines.stream.chunks import Chunk, Message, Outputs, Record
from plinth.pipelines.stream.dead_letters import ATTEMPT, REASON, TRUNCATED, attempt, own
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.settings import StreamConfig
from plinth.pipelines.stream.worker import StreamSummary, Worker, join
from plinth.verticals.contract import Vertical

IDLE_EXIT_S = 3.0
"""Without partitions, which another that sends dead letters back has, it ends after so long."""


def redeliver(
    config: StreamConfig,
    *,
    reasons: Collection[str] = (),
    max_attempts: int = 3,
    stop: threading.Event | None = None,
) -> StreamSummary:
    """Write dead letters again to ``config.input_topic``, original bytes, key and headers.

    Runs to the end of the dead-letter topic, waits for no more, and remembers where it was, under
    the group ``<group>.redeliver``: a second call sends only what is new. Letters that are passed
    over stay in the topic.

    Args:
        config: the stream whose dead letters they are.
        reasons: only these reasons; empty for all.
        max_attempts: letters that failed so often already are passed over.
        stop: ends it early.

    Raises:
        ConfigError: no broker, or missing topics.
        StreamError: Kafka stayed away or refuses.
    """
    back = config.model_copy(
        update={
            "input_topic": config.dead_letters,
            "output_topic": config.input_topic,
            "dead_letter_topic": config.output_topic,  # never written: nothing here can fail
            "group": f"{config.group}.redeliver",
            "instance_id": None,
            "state_dir": None,
            "start_at": "earliest",
            "max_events": None,
            "idle_exit_s": config.idle_exit_s or IDLE_EXIT_S,
        }
    )
    prepare(back)
    consumer, sink = join(back, uuid.uuid4().hex, _Letters.name)
    worker = Worker(
        back,
        consumer,
        sink,
        _Redelivery(frozenset(reasons), max_attempts),
        Checkpoint(_Letters(), None, {}, 0),
        stop or threading.Event(),
        to_end=True,
    )
    return worker.run_supervised()


@dataclass(frozen=True, slots=True)
class _Redelivery:
    """Answers a dead letter with the record it was."""

    reasons: frozenset[str]
    max_attempts: int

    def process(self, chunk: Chunk) -> Generator[float, None, Outputs]:
        yield from ()
        return Outputs(chunk, [self._message(r) for r in chunk.records if self._wanted(r)])

    def observe(self, chunk: Chunk) -> None:
        """There is no state."""

    @property
    def watches(self) -> bool:
        """There is no state."""
        return False

    def look(self, records: Sequence[Record]) -> None:
        """There is no state."""

    def see_partitions(self, mine: int, total: int, grown: int) -> None:
        """There is no state."""

    def see_start(self, at: int) -> None:
        """There is no state."""

    def _wanted(self, record: Record) -> bool:
        head = dict(record.headers)
        reason = (head.get(REASON) or b"").decode("utf-8", "replace")
        known = REASON in head and TRUNCATED not in head
        return (
            known
            and attempt(record) < self.max_attempts
            and (not self.reasons or reason in self.reasons)
        )

    def _message(self, record: Record) -> Message:
        head = (*own(record), (ATTEMPT, str(attempt(record)).encode()))
        return Message(record, record.key, record.value or b"", None, head)


class _Letters(Vertical[Any, BaseModel]):
    """Stands where a stream needs a vertical; it is never asked."""

    name = "redeliver"
    summary = "dead letters on their way back"
    response = BaseModel

    def models(self) -> Sequence[Model]:
        return ()

    def example(self) -> Any:
        return b""

    def infer(self, requests: Sequence[Any]) -> Flow[list[BaseModel | InputError]]:
        yield from ()
        return []
