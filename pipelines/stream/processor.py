"""Parse, infer, encode: from a chunk of records to its messages, one bad record at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plinth.engine import (
    Call,
    Closed,
    Compute,
    Engine,
    Flow,
    InputError,
    ModelError,
    Pause,
    PlinthError,
    QueueFull,
    Refused,
    Sla,
    Timing,
)
from plinth.engine.flow import Tensors, Told
from plinth.engine.rows import row_count
from plinth.pipelines.formats.mapping import DeclaredMapping
from plinth.pipelines.formats.registry import RegistryAway
from plinth.pipelines.observability.tracing import HEADER as TRACE
from plinth.pipelines.observability.tracing import Tracing
from plinth.pipelines.stream.chunks import (
    Chunk,
    Layout,
    Message,
    Outputs,
    Partition,
    Poisoned,
    Record,
)
from plinth.pipelines.stream.dead_letters import MAX_KEY
from plinth.pipelines.stream.metrics import APART, CHUNK_SECONDS, REFUSED
from plinth.pipelines.stream.wire.batches import MAX_UNPACKED, UNREAD
from plinth.verticals.contract import Vertical, Written

log = logging.getLogger(__name__)

_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends the worker; all else, a panic of a Rust library too, is the record's fault."""

MAX_FAILURES = 50
"""Records in a row on which the vertical may fail before the stream stops."""
MAX_PLACES = 100_000
"""Names of one kind whose partition is remembered."""
OLD_LAYOUT_MS = 600_000
"""How long producers may send by a number of partitions that has changed: twice the default of
their metadata.max.age.ms."""
LOOK_S = 0.5
"""How long the engine may work on a call before the run loop looks after the group again."""

Steps = Generator[float, None, Any]
"""Yields seconds to wait whenever the engine is not ready; returns the result."""


@dataclass(slots=True)
class KeyPlaces:
    """In which partition each of the names was met that records must share to lie together.

    Names are kept as hashes, at most :data:`MAX_PLACES` of each kind; then it begins anew.

    Args:
        since: record timestamp, milliseconds, from which on records count; -1: all do.
    """

    since: int = -1
    _width: int = field(default=0, init=False)
    _kinds: list[dict[int, int]] = field(default_factory=list, init=False)

    def follow(self, width: int, grown: int) -> None:
        """Forget what was met before partitions were added: keys may have moved since.

        Producers go on by what they knew for :data:`OLD_LAYOUT_MS` at most.
        """
        since = grown + OLD_LAYOUT_MS if grown else -1
        if (width, since) != (self._width, self.since):
            self._width, self.since = width, since
            self._kinds.clear()

    def apart(self, record: Record, names: Sequence[str | None]) -> bool:
        """Whether one of the names was met in another partition."""
        if record.timestamp < self.since:
            return False
        while len(self._kinds) < len(names):
            self._kinds.append({})
        found = False
        for kind, name in zip(self._kinds, names, strict=False):
            if name is None:
                continue
            if len(kind) >= MAX_PLACES:
                kind.clear()
            found |= kind.setdefault(hash(name), record.partition) != record.partition
        return found


@dataclass(slots=True)
class Processor:
    """Turns chunks into messages with one vertical on one engine.

    Args:
        vertical: reads, infers and encodes.
        engine: runs its calls.
        max_record_bytes: larger records and answers become dead letters.
        stateful: the vertical has state, which a failed flow leaves unknown.
        sla: the promise asked of the engine; work that would miss it is late, never refused or
            degraded.
        mapping: from messages to the vertical's records; ``None``: they are its records.
        places: watches that records which must lie together do; ``None``: nobody looks.
        tracing: told of each record, if there is any.
    """

    vertical: Vertical[Any, Any]
    engine: Engine
    max_record_bytes: int = 1_000_000
    stateful: bool = False
    sla: Sla = field(default_factory=Sla)
    mapping: DeclaredMapping | None = None
    places: KeyPlaces | None = None
    tracing: Tracing | None = None
    _timing: Timing = field(default_factory=Timing, init=False)
    _moved: int = field(default=0, init=False)
    _mine: tuple[int, int] = field(default=(1, 1), init=False)
    _isolate: dict[Partition, int] = field(default_factory=dict, init=False)
    _failures: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.sla = replace(self.sla, on_overload="late")

    def process(self, chunk: Chunk) -> Generator[float, None, Outputs]:
        """Answer every record of a chunk, each with a message or a dead letter.

        A generator: where the engine has no room or no answer yet it yields the seconds to wait,
        so that the run loop can stay in its group meanwhile; it returns the :class:`Outputs`.

        Raises:
            Poisoned: the vertical failed on the chunk and has state; the records must come again,
                after which each is processed alone.
            PlinthError: the engine cannot do the work at all.
        """
        started = time.perf_counter()
        messages: list[Message] = []
        yield from self._ask_for_schemas(chunk)
        readable = self._parse(chunk.records, messages)
        self._timing.decode = time.perf_counter() - started
        self._watch(readable)
        self._tell_moved(chunk)
        alone = self._alone(chunk)
        groups = [[pair] for pair in readable] if alone else [readable] if readable else []
        for group in groups:
            yield from self._infer(chunk, group, messages, alone=alone)
        if self.tracing is not None:
            messages = [self._traced(self.tracing, started, one) for one in messages]
        self._timing = Timing()
        CHUNK_SECONDS.observe(time.perf_counter() - started)
        return Outputs(chunk, messages)

    def _traced(self, tracing: Tracing, begun: float, message: Message) -> Message:
        """Tell of a record, whose answer carries the context on."""
        record, error = message.record, message.error
        about: dict[str, str | int] = {
            "messaging.system": "kafka",
            "messaging.destination.name": record.topic,
            "messaging.destination.partition.id": str(record.partition),
        }
        about |= {} if error is None else {"error.type": error.reason}
        told = tracing.span(
            f"process {record.topic}",
            next((value for name, value in record.headers if name == TRACE), None),
            begun,
            kind="consumer",
            about=about,
            timing=self._timing.as_dict(),
            failed=error is not None and error.reason.endswith("_failed"),
        )
        if error is not None:  # a dead letter is the record as it came
            return message
        return replace(message, headers=(*message.headers, (TRACE, told.encode())))

    def observe(self, chunk: Chunk) -> None:
        """Take a replayed chunk into the vertical's state, without answers.

        Raises:
            RegistryAway: schemas of its messages cannot be had.
        """
        readable = self._parse(chunk.records, [])
        self._watch(readable)
        if readable:
            self.vertical.observe([request for _, request in readable])

    @property
    def watches(self) -> bool:
        """Records must lie together, by what the vertical says, and it is watched that they do."""
        return self.places is not None

    def look(self, records: Sequence[Record]) -> None:
        """See whether records of partitions that others read lie where they must; no more."""
        try:
            self._watch(self._parse(records, []))
        except RegistryAway as away:  # these are for others to answer
            log.debug("records of other workers were not looked at: %s", away)

    def _watch(self, readable: Sequence[tuple[Record, Any]]) -> None:
        """Note when a record lies in another partition than one that it must meet."""
        places, together = self.places, self.vertical.together
        if places is None or self._mine[1] < 2:
            return
        try:
            found = [record for record, one in readable if places.apart(record, together(one))]
        except _ENDS:
            raise
        except BaseException:
            log.exception("%s.together raised; these records are not watched", self.vertical.name)
            return
        if not found:
            return
        self._moved = int(time.time() * 1e3)
        topic = found[0].topic
        APART.labels(topic).inc(len(found))
        log.error(
            "%s lies in another partition than an earlier record of the same card, terminal or "
            "whatever else must meet: the input is not keyed as the settings of %s declare, unless "
            "it was just given more partitions; where several workers share it, answers say so "
            "until the longest window has passed",
            _place(found[0]), self.vertical.name,
        )  # fmt: skip
        places.follow(self._mine[1], self._moved)

    def _tell_moved(self, chunk: Chunk) -> None:
        """Answer and commit this chunk as one of an input whose keys move."""
        if self._moved > chunk.layout.grown:
            chunk.layout = chunk.layout.joined(Layout(self._mine[1], self._moved))
            self.see_partitions(*self._mine, self._moved)

    def _alone(self, chunk: Chunk) -> bool:
        """Whether a record of the chunk made the vertical fail before."""
        for p, start in chunk.starts.items():
            if self._isolate.get(p, start) <= start:
                self._isolate.pop(p, None)
        return not self._isolate.keys().isdisjoint(chunk.starts)

    def see_partitions(self, mine: int, total: int, grown: int) -> None:
        """Tell the vertical how many of the input's partitions this worker reads.

        Args:
            mine: partitions of this worker.
            total: partitions of the input.
            grown: milliseconds since 1970 when keys were last seen to move; 0: never.
        """
        self._mine = mine, total
        if self.places is not None:
            self.places.follow(total, grown)
        self.vertical.see_partitions(mine, total)
        self.vertical.see_growth(grown / 1e3 if grown and mine < total else None)

    def see_start(self, at: int) -> None:
        """Tell the vertical that its state lacks what came before; milliseconds, 0: nothing."""
        self.vertical.see_start(at / 1e3 if at else None)

    # -- parse -----------------------------------------------------------------------------
    def _ask_for_schemas(self, chunk: Chunk) -> Steps:
        """Have what the chunk is read with; while the registry is away, wait for it."""
        while self.mapping is not None:
            try:
                return self.mapping.prepare(record.value for record in chunk.records)
            except RegistryAway as away:
                log.warning("%s; trying again", away)
                yield 1.0
        return None

    def _parse(
        self, records: Sequence[Record], messages: list[Message]
    ) -> list[tuple[Record, Any]]:
        given = [(record, raw) for record in records if (raw := self._raw(record)) is not None]
        found = self._read([pair for pair in given if type(pair[1]) is bytes])
        readable: list[tuple[Record, Any]] = []
        for record, raw in given:
            one = next(found) if type(raw) is bytes else raw
            if isinstance(one, InputError):
                messages.append(Message(record, error=one))
            else:
                readable.append((record, one))
        return readable

    def _raw(self, record: Record) -> bytes | InputError | None:
        """What the vertical is to read of a record, or why it cannot be; ``None``: nothing."""
        raw = record.value
        if raw is None:
            return _without_value(record)
        if len(raw) > self.max_record_bytes:
            return _unfit(raw, self.max_record_bytes)
        if self.mapping is None:
            return raw
        try:
            return self.mapping.record(raw)
        except InputError as error:
            return error
        except (*_ENDS, RegistryAway):
            raise
        except BaseException as error:  # noqa: BLE001 - told to the log
            return self._fault(record, error)

    def _read(self, given: Sequence[tuple[Record, Any]]) -> Iterator[Any]:
        """Each as the vertical reads it, or why it cannot; one that makes it fail stands alone."""
        times = [one.timestamp / 1e3 if one.timestamp >= 0 else None for one, _ in given]
        try:
            found = self.vertical.parse_each([raw for _, raw in given], times)
            if len(found) != len(given):
                raise RuntimeError(f"parse_each gave {len(found)} for {len(given)} records")
        except _ENDS:
            raise
        except BaseException as error:  # noqa: BLE001 - each alone then tells it to the log
            if len(given) == 1:
                return iter([self._fault(given[0][0], error)])
            return (one for pair in given for one in self._read([pair]))
        return iter(found)

    def _fault(self, record: Record, error: BaseException) -> InputError:
        log.error("%s.parse raised on %s", self.vertical.name, _place(record), exc_info=error)
        return _failure("parse", error)

    # -- infer -----------------------------------------------------------------------------
    def _infer(
        self,
        chunk: Chunk,
        group: Sequence[tuple[Record, Any]],
        messages: list[Message],
        *,
        alone: bool,
    ) -> Steps:
        requests = [request for _, request in group]
        try:
            flow = self.vertical.answers(requests) or self.vertical.infer(requests)
            results = yield from self._drive(flow)
            if len(results) != len(requests):
                raise RuntimeError(f"infer gave {len(results)} results for {len(requests)}")
        except InputError as error:
            failure = error
        except PlinthError as error:
            if not isinstance(error, ModelError):
                raise
            log.error("a model failed on %d records: %s", len(requests), error)
            failure = _failure("infer", error)
        except _ENDS:
            raise
        except BaseException as error:
            log.exception("%s.infer raised on %d records", self.vertical.name, len(requests))
            failure = _failure("infer", error)
        else:
            self._failures = 0
            encoding = time.perf_counter()
            pairs = zip(group, results, strict=True)
            messages += [self._message(record, one, result) for (record, one), result in pairs]
            self._timing.encode += time.perf_counter() - encoding
            return
        if alone:
            messages.append(self._failed_alone(group[0][0], failure))
        elif self.stateful:
            self._isolate.update(chunk.ends)
            raise Poisoned(chunk)
        else:
            for pair in group:
                yield from self._infer(chunk, [pair], messages, alone=True)

    def _failed_alone(self, record: Record, error: InputError) -> Message:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise ModelError(
                f"{self.vertical.name}.infer failed on {self._failures} records in a row",
                hint="see the log; nothing of this chunk was committed",
            ) from error
        return Message(record, error=error)

    def _drive(self, flow: Flow[list[Any]]) -> Steps:
        """Run a flow to its end; each of its calls goes to the engine once."""
        try:
            call = next(flow)
            while True:
                try:
                    value = yield from self._answer(call)
                except Exception as error:  # noqa: BLE001 - the flow's own to handle
                    call = flow.throw(error)
                else:
                    call = flow.send(value)
        except StopIteration as end:
            return end.value

    def _answer(self, call: Call | Compute | Pause) -> Steps:
        """What the engine answers to a call; one too large for its queue goes in parts.

        Work that is refused is offered again later: the vertical's own steps, which may have
        changed its state, do not run a second time.
        """
        if isinstance(call, Pause):
            return None
        if isinstance(call, Compute):
            future = self.engine.compute(call)
            try:
                return (yield from _result(future))
            finally:
                future.cancel()  # the stream ends, and nobody waits for it
        waiting: list[Tensors] = [call.rows]
        done: list[Tensors] = []
        while waiting:
            rows = waiting[0]
            try:
                part = replace(call, rows=rows)
                result = yield from _result(self.engine.submit(part, self.sla))
                self._timing.queue += result.timing.queue
                self._timing.device += result.timing.device
                self._timing.batch_rows = max(self._timing.batch_rows, result.timing.batch_rows)
                done.append(result.value)
            except Closed:
                raise
            except Refused as refused:
                REFUSED.inc()
                count = row_count(rows)
                if isinstance(refused, QueueFull) and call.tiling is None and count > 1:
                    waiting[:1] = _halves(rows, count // 2)
                yield min(max(refused.retry_after or 0.05, 0.005), 1.0)
            else:
                del waiting[0]
        value = _joined(done)
        return Told(value, result.precision, result.exact) if call.told else value

    # -- encode ----------------------------------------------------------------------------
    def _message(self, record: Record, request: Any, result: Any) -> Message:
        if type(result) is not Written:
            return self._encode(record, request, result)
        key, value, evidence = result
        return self._fitting(record, key, value, evidence)

    def _encode(self, record: Record, request: Any, result: Any) -> Message:
        if isinstance(result, InputError):
            return Message(record, error=result)
        try:
            value = self.vertical.encode(result)
            key = self.vertical.key(request)
            evidence = self.vertical.evidence(request, result) if self.vertical.audited else None
        except InputError as error:
            return Message(record, error=error)
        except _ENDS:
            raise
        except BaseException as error:
            log.exception("%s.encode raised on %s", self.vertical.name, _place(record))
            return Message(record, error=_failure("encode", error))
        return self._fitting(record, None if key is None else key.encode(), value, evidence)

    def _fitting(self, record: Record, key: bytes | None, value: bytes, evidence: Any) -> Message:
        """The answer, or why it cannot be written: it or its key, the record's if ``None``."""
        if len(value) > self.max_record_bytes:
            return Message(record, error=_unfit(value, self.max_record_bytes, "the answer"))
        own = record.key if key is None else key
        if own is not None and len(own) > MAX_KEY:
            return Message(record, error=_long_key(own))
        return Message(record, own, value, evidence=evidence)


def _result(future: Future[Any]) -> Steps:
    while True:
        try:
            return future.result(LOOK_S)
        except TimeoutError:
            if future.done():  # in this very moment, or with an error of that kind
                return future.result()
            yield 0.0


def _halves(rows: Tensors, first: int) -> tuple[Tensors, Tensors]:
    if isinstance(rows, Tensor):
        return rows[:first], rows[first:]
    return (
        {name: value[:first] for name, value in rows.items()},
        {name: value[first:] for name, value in rows.items()},
    )


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _place(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"


def _failure(step: str, error: BaseException) -> InputError:
    return InputError(
        f"the vertical's {step} step failed on this record: {type(error).__name__}",
        reason=f"{step}_failed",
        hint="see the worker's log at this record's topic, partition and offset",
    )


def _without_value(record: Record) -> InputError:
    if any(name == UNREAD for name, _ in record.headers):
        return InputError(
            f"the record was not read: its batch has more than {MAX_UNPACKED >> 20} MiB, unpacked",
            reason="too_large",
            hint="have the producer send smaller batches",
        )
    return InputError("the record has no value", reason="empty_record", hint="send one JSON object")


def _long_key(key: bytes) -> InputError:
    return InputError(
        f"the key of the answer has {len(key)} bytes, at most {MAX_KEY} are taken",
        reason="too_large",
        hint="send records with a shorter key: it is the answer's, too",
    )


def _unfit(raw: bytes, limit: int, what: str = "the record") -> InputError:
    return InputError(
        f"{what} has {len(raw)} bytes, at most {limit} are taken",
        reason="too_large",
        hint="raise stream.max_record_bytes and the topics' max.message.bytes, or send less",
    )
