"""Records under every door: parse, promise, run, encode; one bad record at a time.

A door (HTTP, gRPC, the Open Inference Protocol) turns bytes of its protocol into calls of a
:class:`RecordService`, and the errors it raises or returns into answers. What a vertical raises
where it should not becomes an :class:`InternalError` without the exception's text, which may hold
a record; a group in which that happens is run again by halves, until the guilty record stands
alone and the others have their answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import orjson
from pydantic import BaseModel, ValidationError

from plinth.engine import (
    Answer,
    Compute,
    ComputeError,
    ConfigError,
    DeadlineRefused,
    DeviceError,
    Engine,
    EngineFailed,
    Flow,
    InputError,
    ModelError,
    PlinthError,
    Refused,
    Sla,
)
from plinth.engine.metrics import SLA_MISSES
from plinth.engine.runtime.flow_driver import FlowDriver
from plinth.verticals import Query, Vertical
from plinth.verticals.contract import Pending, StateError, invalid

log = logging.getLogger("plinth.records")

_NUMBER = re.compile(rb"[0-9]{1,12}(?:\.[0-9]{0,12})?(?:[eE][+-]?[0-9]{1,2})?")

_GAP = re.compile(r"[ \t\r\n,]*")
_SCAN = json.JSONDecoder(parse_int=len, parse_float=len)
"""Finds where a value ends; numbers are left to whoever reads it."""

FAULTS = (Exception, SystemExit)
"""What code of a vertical may raise without ending the server."""


class InternalError(PlinthError):
    """Something is wrong here and not with the request; the log has the place."""

    reason = "internal"

    def __init__(self) -> None:
        super().__init__(
            "something went wrong here; the request was not answered",
            hint="try again; if it stays, look into the server's log",
        )


@dataclasses.dataclass(slots=True)
class Part:
    """What became of some records that ran together.

    Args:
        count: how many.
        answer: one result or ``InputError`` for each, in order; ``None`` if they failed.
        error: why they failed.
    """

    count: int
    answer: Answer[list[Any]] | None = None
    error: PlinthError | None = None


@dataclasses.dataclass(slots=True)
class Reply:
    """What is answered to one request.

    Args:
        outcomes: encoded result or error of each record, in order.
        answer: where the time went and which models ran; ``None`` if none did.
    """

    outcomes: list[bytes | PlinthError]
    answer: Answer[list[Any]] | None


class RecordService:
    """One record vertical on one engine, for any door.

    Args:
        vertical: has a ``request`` type.
        engine: started, with the vertical's models.
        sla: the promise unless a request brings its own.
        max_items: records of one request.
        seconds: longest wait for an answer.
        pool: threads for the own steps of heavy verticals.
    """

    def __init__(
        self,
        vertical: Vertical[Any, Any],
        engine: Engine,
        sla: Sla,
        *,
        max_items: int = 1024,
        seconds: float = 30.0,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self.vertical = vertical
        self.sla = sla
        self.max_items = max_items
        self.seconds = seconds
        self._engine = engine
        self._pool = pool

    # -- one step at a time --------------------------------------------------------------------
    def promise(self, deadline_ms: bytes | str | float | None) -> Sla:
        """The promise for a request that asks for this deadline.

        Raises:
            InputError: no number of milliseconds.
        """
        if deadline_ms is None:
            return self.sla
        try:
            if isinstance(deadline_ms, bytes | str) and not _is_number(deadline_ms):
                raise ValueError
            return dataclasses.replace(self.sla, deadline_ms=float(deadline_ms))
        except (ValueError, ConfigError):
            raise InputError(
                "the deadline is no number of milliseconds above 0 and below a day",
                hint="send a number such as 25",
                reason="bad_deadline",
            ) from None

    def parse(self, raw: bytes) -> Any:
        """Read one record.

        Raises:
            InputError: the record is wrong.
            InternalError: the vertical is.
        """
        try:
            return self.vertical.parse(raw)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of a Rust library is no Exception
            raise explained(error) from None

    def encode(self, result: Any) -> bytes | PlinthError:
        """Write one result; an error stays one."""
        if isinstance(result, PlinthError):
            return result
        try:
            return self.vertical.encode(result)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - as in parse
            return explained(error)

    async def infer(self, records: Sequence[Any], sla: Sla) -> list[Part]:
        """Run records together; after a fault by halves, within what is left of the deadline.

        Raises:
            Refused: the engine does not do the work.
            EngineFailed: it cannot do any.
            StateError: what was taken in is not durable.
        """
        begun = time.perf_counter()
        try:
            return [Part(len(records), await self._run(records, sla))]
        except (Refused, EngineFailed, StateError):
            raise
        except FAULTS as error:
            if len(records) == 1:
                return [Part(1, error=explained(error))]
        return await self._halves(records, sla, begun)

    async def _halves(self, records: Sequence[Any], sla: Sla, begun: float) -> list[Part]:
        parts: list[Part] = []
        middle = len(records) // 2
        for half in (records[:middle], records[middle:]):
            try:
                answer = await self._run(half, _rest(sla, begun))
                parts.append(Part(len(half), answer))
            except (Refused, EngineFailed, StateError) as error:
                parts.append(Part(len(half), error=error))
            except FAULTS as error:
                if len(half) == 1:
                    parts.append(Part(1, error=explained(error)))
                else:
                    parts += await self._halves(half, sla, begun)
        return parts

    async def _run(self, records: Sequence[Any], sla: Sla) -> Answer[list[Any]]:
        flow = self.vertical.infer(records)
        if self.vertical.heavy and self._pool is not None:
            answer = await self._stepped(flow, sla, self._pool)
        else:
            answer = await self._engine.run_async(flow, sla)
        if self.vertical.settled is not None:
            await _durable(self.vertical.settled())
        if len(answer.value) != len(records):
            raise RuntimeError(f"{len(answer.value)} results for {len(records)} records")
        return answer

    async def _stepped(
        self, flow: Flow[list[Any]], sla: Sla, pool: ThreadPoolExecutor
    ) -> Answer[list[Any]]:
        """Drive a heavy flow: its own steps on threads, its calls waited for here."""
        loop = asyncio.get_running_loop()

        async def aside(step: Callable[..., Any], *given: Any) -> Any:
            return await loop.run_in_executor(pool, step, *given)

        driver: FlowDriver[list[Any]] = await aside(FlowDriver, flow, time.monotonic)
        while (call := driver.call) is not None:
            give: Callable[[Any], None] = driver.send
            try:
                if isinstance(call, Compute):
                    give = driver.computed
                    future = await aside(self._engine.compute, call, driver.left(sla))
                else:
                    future = self._engine.submit(call, sla, driver.since(sla))
                result = await asyncio.wrap_future(future)
            except Exception as error:  # noqa: BLE001 - the flow's own to handle
                await aside(driver.throw, error)
            else:
                await aside(give, result)
        return driver.answer(sla)

    # -- whole requests ------------------------------------------------------------------------
    async def answer(self, raws: Sequence[bytes], sla: Sla, arrived: float) -> Reply:
        """Answer records that came together, each with its result or its error.

        Args:
            raws: one JSON object each.
            sla: from :meth:`promise`.
            arrived: when the request was there (``perf_counter``).

        Raises:
            Refused: the engine does not do the work.
        """
        outcomes: list[Any] = []
        records: list[Any] = []
        for raw in raws:
            try:
                records.append(self.parse(raw))
                outcomes.append(None)
            except PlinthError as error:
                outcomes.append(error)
        decoded = time.perf_counter()
        parts = await self.infer(records, sla) if records else []
        encoding = time.perf_counter()
        results = iter([self.encode(one) for part in parts for one in _results(part)])
        encoded = [next(results) if outcome is None else outcome for outcome in outcomes]
        answer = next((part.answer for part in parts if part.answer is not None), None)
        if answer is not None:
            now = time.perf_counter()
            timing = answer.timing
            timing.decode, timing.encode = decoded - arrived, now - encoding
            timing.total = now - arrived
            answer.late = answer.late or late_at_door(answer, sla, timing.total)
        return Reply(encoded, answer)

    def split(self, body: bytes) -> list[bytes]:
        """The records of a JSON list, each as it was sent.

        Written anew, a record would lose a key that stands twice and the digits of long numbers,
        and a list would be answered where its record alone is refused.

        Raises:
            InputError: no list, empty, too long, or nested too deeply.
        """
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise _malformed(f"{error.msg} at byte {error.pos}") from None
        if not isinstance(parsed, list):
            raise _malformed("expected an object or a list")
        if not parsed:
            raise InputError("the list is empty", hint="send at least one record", reason="empty")
        if len(parsed) > self.max_items:
            raise InputError(
                f"the list has {len(parsed):,} records, at most {self.max_items:,} are taken "
                "at once",
                hint="send several requests, or raise serve.max_items",
                reason="too_many_items",
            )
        try:
            orjson.dumps(parsed)  # takes less depth than is read
            return _elements(body.decode())
        except (orjson.JSONEncodeError, RecursionError):
            raise _malformed("it is nested too deeply") from None


def _elements(text: str) -> list[bytes]:
    """The text of each element of a valid JSON list."""
    elements: list[bytes] = []
    begin = _GAP.match(text, text.index("[") + 1)
    while begin is not None and text[begin.end()] != "]":
        _, end = _SCAN.raw_decode(text, begin.end())
        elements.append(text[begin.end() : end].encode())
        begin = _GAP.match(text, end)
    return elements


def explained(error: BaseException) -> PlinthError:
    """The error as a client may know it: its own mistake, a refusal, or that we failed.

    The text of an unexpected exception may hold what another client sent: neither client nor log
    see it. The log gets the exception's type and the frames.
    """
    if isinstance(error, InputError | Refused | EngineFailed | InternalError | ComputeError):
        return error
    cause = error.__cause__ or error
    frames = "".join(traceback.format_tb(cause.__traceback__))
    log.error("unexpected %s\n%s", type(cause).__name__, frames)
    if isinstance(error, ModelError | DeviceError):
        return _model_failed()
    return InternalError()


def _model_failed() -> ModelError:
    return ModelError(
        "the model failed on this record", hint="try again; the server's log has the place"
    )


def pairs(words: Mapping[str, str]) -> str:
    """Models and their versions, or the like, in one line: ``risk=3, lung=1``."""
    return ", ".join(f"{name}={value}" for name, value in words.items())


def late_at_door(answer: Answer[Any], sla: Sla, seconds: float) -> bool:
    """Whether an answer missed its promise at the door alone; if so, that is counted.

    Args:
        answer: of the engine.
        sla: the promise.
        seconds: from the arrival of the request until now.
    """
    if sla.deadline_ms is None or seconds * 1e3 <= sla.deadline_ms:
        return False
    for model in answer.models:
        SLA_MISSES.labels(model, "door").inc()
    return True


async def _durable(settled: Pending) -> None:
    """Wait until what was taken in is durable; whoever stops waiting leaves the others to it."""
    try:
        if not settled.done():
            await asyncio.shield(asyncio.wrap_future(cast(Future[None], settled)))
        settled.result()
    except StateError as error:
        log.error("%s", error)  # it names a folder of ours
        raise StateError(
            "what was sent could not be kept here, so it is not answered",
            hint="send it again, as it is: what was counted is not counted twice",
        ) from None


def _results(part: Part) -> Sequence[Any]:
    if part.answer is None:
        return [part.error] * part.count
    return part.answer.value


def _rest(sla: Sla, begun: float) -> Sla:
    """The promise, less the time since ``begun``.

    Raises:
        DeadlineRefused: nothing is left.
    """
    if sla.deadline_ms is None:
        return sla
    spent = time.perf_counter() - begun
    left = sla.deadline_ms - spent * 1e3
    if left <= 0:
        raise DeadlineRefused(
            "the deadline passed while a failed batch was run again",
            predicted=spent,
            deadline=sla.deadline_ms / 1e3,
            rows_ahead=0,
            retry_after=0.0,
        )
    return dataclasses.replace(sla, deadline_ms=left)


def _is_number(text: bytes | str) -> bool:
    """Whether it is a plain decimal number: Python's ``float`` also reads ``1_000`` and ``nan``."""
    raw = text if isinstance(text, bytes) else text.encode()
    return _NUMBER.fullmatch(raw) is not None


def _malformed(what: str) -> InputError:
    return InputError(
        f"the body is not JSON: {what}",
        hint="send one JSON object or a list of them",
        reason="malformed_json",
    )


async def ask(query: Query, fields: Mapping[str, Any], *, as_text: bool) -> BaseModel:
    """The answer to a query of a vertical, from the event loop in which its flows run.

    Args:
        query: of the vertical.
        fields: of what is asked.
        as_text: their values are text, as paths, forms and query strings have them.

    Raises:
        InputError: a field is wrong, or there is no such thing.
    """
    check = query.asked.model_validate_strings if as_text else query.asked.model_validate
    try:
        asked: BaseModel = check(fields)
    except ValidationError as error:
        raise invalid(error) from None
    found = query.answer(asked)
    return found if isinstance(found, BaseModel) else await asyncio.to_thread(found)
