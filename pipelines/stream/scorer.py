"""From records to messages: one vertical on one engine, one bad record at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from plinth.engine import (
    Call,
    Closed,
    Engine,
    Flow,
    InputError,
    ModelError,
    PlinthError,
    Refused,
    Sla,
)
from plinth.pipelines.stream.loop import Chunk, Message, Partition, Poisoned, Record, Rewind, Scored
from plinth.pipelines.stream.metrics import SCORE_SECONDS
from plinth.verticals.contract import Vertical

log = logging.getLogger(__name__)

T = TypeVar("T")
LONGEST_STREAK = 50
"""Records in a row on which the vertical may fail before the stream stops."""


@dataclass(slots=True)
class Scorer:
    """Turns records into messages with one vertical on one engine.

    Args:
        vertical: reads, infers and encodes.
        engine: runs its flows.
        wait: called when the engine refuses work; waits, keeps the source alive, and raises
            when waiting has no point any more.
        applied: called with the positions up to which records are in the vertical's state.
        max_record_bytes: larger records and answers become dead letters.
        stateful: the vertical has state, so a failed flow leaves doubt behind it.
        sla: the promise asked of the engine; whatever it says, late is better than never here.
    """

    vertical: Vertical[Any, Any]
    engine: Engine
    wait: Callable[[Refused], None]
    applied: Callable[[Mapping[Partition, int]], None]
    max_record_bytes: int = 1_000_000
    stateful: bool = False
    sla: Sla = field(default_factory=Sla)
    careful: dict[Partition, int] = field(default_factory=dict, init=False)
    streak: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.sla = replace(self.sla, on_overload="late")

    def score(self, chunk: Chunk) -> Scored:
        """Answer every record of a chunk, each with a message or a dead letter.

        Raises:
            Poisoned: the vertical raised on the chunk and has state; the records must come
                again, after which each is scored alone.
            PlinthError: the engine cannot do the work at all.
        """
        started = time.perf_counter()
        messages: list[Message] = []
        readable = self._parse(chunk.records, messages)
        for p, start in chunk.starts.items():
            if self.careful.get(p, start) <= start:
                self.careful.pop(p, None)
        alone = not self.careful.keys().isdisjoint(chunk.starts)
        groups = [[pair] for pair in readable] if alone else [readable] if readable else []
        for group in groups:
            self._infer(chunk, group, messages, alone=alone)
        self.applied(chunk.ends)
        SCORE_SECONDS.observe(time.perf_counter() - started)
        return Scored(chunk, messages)

    def observe(self, chunk: Chunk) -> None:
        """Take a replayed chunk into the vertical's state, without answers."""
        readable = self._parse(chunk.records, [])
        if readable:
            self.vertical.observe([request for _, request in readable])
        self.applied(chunk.ends)

    def _parse(
        self, records: Sequence[Record], messages: list[Message]
    ) -> list[tuple[Record, Any]]:
        parse, limit = self.vertical.parse, self.max_record_bytes
        readable: list[tuple[Record, Any]] = []
        for record in records:
            raw = record.value
            try:
                if raw is None or len(raw) > limit:
                    raise _unfit(raw, limit)
                readable.append((record, parse(raw)))
            except InputError as error:
                messages.append(Message(record, error=error))
            except Exception as error:
                log.exception("%s.parse raised on %s", self.vertical.name, _place(record))
                messages.append(Message(record, error=_failure("parse", error)))
        return readable

    def _infer(
        self,
        chunk: Chunk,
        group: Sequence[tuple[Record, Any]],
        messages: list[Message],
        *,
        alone: bool,
    ) -> None:
        requests = [request for _, request in group]
        try:
            results = drive(self.vertical.infer(requests), self._submit)
            if len(results) != len(requests):
                raise RuntimeError(f"infer gave {len(results)} results for {len(requests)}")
        except InputError as error:
            results = self._failed(chunk, group, messages, error, alone)
        except (PlinthError, Rewind):
            raise
        except Exception as error:
            log.exception("%s.infer raised on %d records", self.vertical.name, len(requests))
            results = self._failed(chunk, group, messages, _failure("infer", error), alone)
        else:
            self.streak = 0
        for (record, request), result in zip(group, results, strict=False):
            messages.append(self._message(record, request, result))

    def _failed(
        self,
        chunk: Chunk,
        group: Sequence[tuple[Record, Any]],
        messages: list[Message],
        error: InputError,
        alone: bool,
    ) -> list[Any]:
        if alone:
            self.streak += 1
            if self.streak >= LONGEST_STREAK:
                raise ModelError(
                    f"{self.vertical.name}.infer failed on {self.streak} records in a row",
                    hint="see the log; nothing of this chunk was committed",
                ) from error
            return [error]
        if self.stateful:
            self.careful.update(chunk.ends)
            raise Poisoned(chunk)
        for pair in group:
            self._infer(chunk, [pair], messages, alone=True)
        return []

    def _message(self, record: Record, request: Any, result: Any) -> Message:
        if isinstance(result, InputError):
            return Message(record, error=result)
        try:
            value = self.vertical.encode(result)
            key = self.vertical.key(request)
        except InputError as error:
            return Message(record, error=error)
        except Exception as error:
            log.exception("%s.encode raised on %s", self.vertical.name, _place(record))
            return Message(record, error=_failure("encode", error))
        if len(value) > self.max_record_bytes:
            return Message(record, error=_unfit(value, self.max_record_bytes, "the answer"))
        return Message(record, record.key if key is None else key.encode(), value)

    def _submit(self, call: Call) -> Any:
        while True:
            try:
                return self.engine.run(_one(call), self.sla).value
            except Closed:
                raise
            except Refused as refused:
                self.wait(refused)


def drive(flow: Flow[T], submit: Callable[[Call], Any]) -> T:
    """Run a flow to its end, each call through ``submit``.

    A refused call can so be offered again without running the vertical's own steps, which may
    have changed its state, a second time.
    """
    answer: Any = None
    while True:
        try:
            call = flow.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer = submit(call)


def _one(call: Call) -> Generator[Call, Any, Any]:
    return (yield call)


def _place(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"


def _failure(step: str, error: Exception) -> InputError:
    return InputError(
        f"the vertical's {step} step failed on this record: {type(error).__name__}",
        reason=f"{step}_failed",
        hint="see the worker's log at this record's topic, partition and offset",
    )


def _unfit(raw: bytes | None, limit: int, what: str = "the record") -> InputError:
    if raw is None:
        return InputError(
            "the record has no value", reason="empty_record", hint="send one JSON object"
        )
    return InputError(
        f"{what} has {len(raw)} bytes, at most {limit} are taken",
        reason="too_large",
        hint="raise stream.max_record_bytes and the topics' max.message.bytes, or send less",
    )
