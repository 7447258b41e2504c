"""The contract between a vertical (a domain) and everything else.

A vertical is one class. It names its request and response types, brings its models, and
describes inference as a :data:`plinth.engine.Flow`. The doors (HTTP, Kafka, folders) drive it; it
knows none of them, and no device, batch size, thread or socket.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
)

import orjson
from pydantic import BaseModel, ValidationError

from plinth.engine import ConfigError, Flow, InputError, PlinthError, Sla, Timing
from plinth.engine.tables import Table
from plinth.verticals.double_keys import refuse_double_keys

if TYPE_CHECKING:
    from plinth.engine import Model

Response = TypeVar("Response", bound=BaseModel)
Artefacts = TypeVar("Artefacts")


@dataclass(frozen=True, slots=True, eq=False)
class WithArtefacts(Generic[Response, Artefacts]):
    """A response, and what its files are made from: a volume, a mask, a curve.

    A flow returns it in place of the bare response when :meth:`Vertical.write` needs more than
    the response holds. Only the response leaves through a door; the artefacts stay in memory
    until the files are written.

    Args:
        response: what clients get.
        artefacts: what ``write`` draws from; any type of the vertical's own.
    """

    response: Response
    artefacts: Artefacts


def response_of(result: BaseModel | WithArtefacts[Any, Any]) -> BaseModel:
    """The response of a result, whether or not artefacts go with it."""
    return cast(BaseModel, result.response) if isinstance(result, WithArtefacts) else result


Req = TypeVar("Req")
Res = TypeVar("Res", bound=BaseModel | WithArtefacts[Any, Any])


class Settings(Table):
    """Base of a vertical's settings: the table ``[verticals.<name>]`` of the config file.

    Class attributes:
        live_tables: fields that are tables and may be given as the path of a TOML file that holds
            the table; when the file changes, :meth:`Vertical.reconfigure` gets the new settings.
    """

    live_tables: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def live_table(cls, field: str, content: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        """What a file holds for a field, with what it must know of other fields to be checked.

        Args:
            field: of ``live_tables``.
            content: of its file.
            others: fields that come before it, as they were given.
        """
        return content


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of a folder door: a study, a file, whatever :meth:`Vertical.discover` finds.

    Args:
        id: stable across runs, unique in the folder, without personal data; names the
            output folder and the journal entry, so only ``[A-Za-z0-9._-]``, at most 128.
        paths: the files it is made of.
        facts: what the user may see of it in lists and logs, without personal data.
        replaces: ids of items told before that were incomplete and are withdrawn.
    """

    id: str
    paths: tuple[Path, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Files below a folder that are no item, and why.

    Args:
        path: the file, or the folder they lie in.
        reason: in a word, such as ``"not_dicom"``.
        message: a sentence, without personal data.
        files: how many.
        failed: they should have been part of an item, and cannot be read.
    """

    path: Path
    reason: str
    message: str
    files: int = 1
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Query:
    """A question about a vertical's own state, or a note to it, that JSON doors offer.

    Its answer takes no model; a door asks between the steps of the flows, so it may read what they
    write. It takes at most about a millisecond: what takes longer is returned as a function of
    nothing, over copies, which a door calls on a thread beside the flows.

    Args:
        method: ``GET`` asks and changes nothing, ``POST`` changes something.
        path: below the vertical's own, such as ``alerts/{alert}``.
        summary: one line for the API docs.
        asked: type of the fields of path and query string, or of path and JSON body.
        given: type of the answer.
        answer: gives it, or the function that does; raises InputError, ``not_found`` where there is
            no such thing.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    asked: type[BaseModel]
    given: type[BaseModel]
    answer: Callable[[Any], BaseModel | Callable[[], BaseModel]]


class Tally:
    """Adds up what a vertical answered to a history, for ``plinth backtest``.

    Subclass it, and return it from :meth:`Vertical.tally`.
    """

    def __init__(self) -> None:
        self.records = 0
        self.refused = 0

    def add(self, request: Any, result: Any) -> str:
        """Take in one record and its result; returns what became of it, in a word or two.

        Args:
            request: as :meth:`Vertical.parse` read it; ``None`` where it could not.
            result: of :meth:`Vertical.infer`, or the error.
        """
        self.records += 1
        if isinstance(result, InputError):
            self.refused += 1
            return f"refused: {result.reason}"
        return "answered"

    def figures(self) -> dict[str, float]:
        """What is to be compared, by name in the order of a table."""
        return {"records": self.records, "refused": self.refused}


class StateError(PlinthError):
    """The state of a vertical on disk cannot be read or written; nothing is answered without it."""

    reason = "state"


class Pending(Protocol):
    """Something that a store does meanwhile: a future of :mod:`concurrent.futures`."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""

    def result(self) -> None:
        """Wait for its end; raises what went wrong."""


class StateStore(Protocol):
    """Where a vertical keeps a state that is larger than memory: parts by key, in checkpoints.

    Attributes:
        logs: what the vertical takes in is to be told to :meth:`append`, for there is no other log
            that it could be read from again.
    """

    logs: bool

    def get(self, key: bytes) -> bytes | None:
        """A part as of the last checkpoint that is durable; StateError if it cannot be read."""

    def fetch(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """The same of many, those that there are: what the disk has to be asked for overlaps."""

    def put(self, key: bytes, part: bytes) -> None:
        """Make a part belong to the checkpoint in progress."""

    def append(self, entry: bytes) -> None:
        """Log what was taken in; it is durable once :meth:`durable` says so."""

    def entries(self) -> Iterable[bytes]:
        """What was logged behind the last checkpoint that is durable, in order."""

    def durable(self) -> Pending:
        """Done once all that was appended up to now is durable; StateError where it is not."""


class Evidence(NamedTuple):
    """What an answer was made from, written by the vertical: :meth:`Vertical.evidence` as bytes.

    Args:
        texts: members of a JSON object, without its braces; at least one.
        numbers: more members, whose values are floats under names that no record has brought.
        outside: all that the answer and ``texts`` have from the sender and that is long enough for
            a card number, with a quotation mark between any two: an audit searches it for them,
            and nothing else where there is none.
    """

    texts: bytes
    numbers: bytes
    outside: bytes


class Written(NamedTuple):
    """An answer as it is written.

    Args:
        key: the record's, as :meth:`Vertical.key` has it.
        value: as :meth:`Vertical.encode` writes it.
        evidence: where the door is audited.
    """

    key: bytes | None
    value: bytes
    evidence: Evidence | None = None


class Vertical(ABC, Generic[Req, Res]):
    """A domain on the engine. Subclass it, register it as an entry point, and every door opens.

    Class attributes:
        name: lower case, ``[a-z][a-z0-9_]*``; the entry point, the route and the config table.
        summary: one line for ``plinth list`` and the API docs.
        action: the verb in the route ``POST /v1/<name>/<action>``.
        request: the pydantic type of a record at the JSON doors (HTTP, Kafka); ``None`` when
            the vertical reads folders only.
        response: the pydantic type of an answer (of its response, where artefacts go with it).
        settings_type: the pydantic type of the config table.
        sla: the promise for one request at a door, unless the config or the request says other.
        batch_range: smallest and largest batch of its models, unless the config says other.
        heavy: the flow's own steps between calls take more than about a millisecond, so the
            doors drive it on a worker thread.
        preloaded: modules that its steps import late, and that worker processes which take whole
            items have from the start; none of them starts a thread.

    Attributes:
        audited: set by a door that will ask for the :meth:`evidence` of each answer.
        settled: gives what is done once all that was taken in up to now is durable; a door waits
            for it before it answers. ``None``: answers wait for nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    action: ClassVar[str] = "infer"
    request: ClassVar[type[BaseModel] | None] = None
    response: ClassVar[type[BaseModel]]
    settings_type: ClassVar[type[Settings]] = Settings
    sla: ClassVar[Sla] = Sla()
    batch_range: tuple[int, int] | None = None
    heavy: ClassVar[bool] = False
    preloaded: ClassVar[tuple[str, ...]] = ()
    audited: bool = False
    settled: Callable[[], Pending] | None = None

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings if settings is not None else self.settings_type()

    # -- what it needs ---------------------------------------------------------------------
    @abstractmethod
    def models(self) -> Sequence[Model]:
        """The models its flows call, loaded from a model store."""

    @abstractmethod
    def example(self) -> Req:
        """A valid request: used for warm-up, the API docs and the conformance kit."""

    # -- models that change while it serves --------------------------------------------------
    def next_models(self) -> Sequence[Model]:
        """Models that the flows are to call next and the engine does not have yet.

        A door that follows the store asks about once a second, on a thread of its own beside the
        flows. It adds them to the engine, which replaces models of their names, then calls
        :meth:`models_loaded`; where they cannot be added nothing is called. So give a model the
        name of one that no flow asks any more, and ask it by that name only afterwards.

        Raises:
            PlinthError: they cannot be read; it is logged, and what serves goes on.
        """
        return ()

    def models_loaded(self) -> None:
        """The engine has the models that :meth:`next_models` gave last."""
        return

    def background(self) -> Flow[None] | None:
        """Work that nobody waits for; ``None``: there is none now.

        A door that follows the store asks several times a second, on the thread of
        :meth:`next_models`, and runs it without a deadline: when the device has time for it.
        """
        return None

    def background_done(self, timing: Timing) -> None:
        """The flow of :meth:`background` has ended, and this is where its time went."""
        return

    # -- what it does ----------------------------------------------------------------------
    @abstractmethod
    def infer(self, requests: Sequence[Req]) -> Flow[list[Res | InputError]]:
        """Answer a list of requests, in order, one result or InputError each.

        A result is the response, or :class:`WithArtefacts` where ``write`` needs more.

        A generator: yield :class:`plinth.engine.Call`, be sent tensors; yield
        :class:`plinth.engine.Compute` for a step of seconds. No I/O. A bad request never takes its
        neighbours along.
        """

    def answers(self, requests: Sequence[Req]) -> Flow[list[Res | Written | InputError]] | None:
        """As :meth:`infer`, for a door that wants bytes: many answers can be written at once.

        What is not :class:`Written` the door writes itself, by :meth:`encode`. ``None``: it
        writes all of them, and drives :meth:`infer`.
        """
        return None

    # -- record doors: HTTP and Kafka --------------------------------------------------------
    def record_types(self) -> Sequence[type[BaseModel]]:
        """The kinds of records that :meth:`parse` takes, ``request`` first.

        A declared mapping of somebody else's messages is checked against them before it is used.
        """
        return (self.request,) if self.request is not None else ()

    def parse(self, raw: bytes) -> Req:
        """Read one JSON record.

        Raises:
            InputError: with the field, what was expected and what to do.
        """
        if self.request is None:
            raise InputError(f"{self.name} takes folders, not records", reason="unsupported")
        try:
            record = self.request.model_validate_json(raw)
        except ValidationError as error:
            raise invalid(error) from None
        try:  # pydantic also reads NaN, Infinity and 1e999, which RFC 8259 and a model do not know
            found = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise InputError(
                f"the record is not JSON: {error.msg} at byte {error.pos}",
                hint="send one JSON object",
                reason="malformed_json",
            ) from None
        refuse_double_keys(raw, found)
        return record  # type: ignore[return-value]

    def parse_at(self, raw: bytes, received: float | None) -> Req:
        """Read one JSON record of a log, as :meth:`parse`, knowing when the log received it.

        A vertical that refuses records by their time does so here and by ``received`` alone, so
        that reading the log again decides the same. :meth:`parse` may ask a clock.

        Args:
            raw: the record.
            received: seconds since 1970-01-01T00:00Z, as the log says; ``None``: it does not.

        Raises:
            InputError: as :meth:`parse`.
        """
        return self.parse(raw)

    def parse_each(
        self, raws: Sequence[bytes], received: Sequence[float | None]
    ) -> list[Req | InputError]:
        """Read many records of a log, each just as :meth:`parse_at` does, or why it cannot be.

        Args:
            raws: the records.
            received: when the log received each.
        """
        found: list[Req | InputError] = []
        for raw, at in zip(raws, received, strict=True):
            try:
                found.append(self.parse_at(raw, at))
            except InputError as error:
                found.append(error)
        return found

    def encode(self, result: Res) -> bytes:
        """Write the response of one answer as JSON."""
        return response_of(result).model_dump_json().encode()

    def why_other(self, before: bytes, now: bytes) -> list[str]:
        """Why two answers to one record differ, made at two times from the same state.

        Args:
            before, now: as :meth:`encode` writes them, not the same bytes.

        Returns:
            Sentences, the most telling one first; without data of the record.
        """
        then, again = orjson.loads(before), orjson.loads(now)
        names = [name for name in {**then, **again} if then.get(name) != again.get(name)]
        return [f"{name} differs" for name in names] or ["the same fields, written otherwise"]

    def key(self, request: Req) -> str | None:
        """The key that keeps related records in order (the Kafka record key), if any."""
        return None

    def queries(self) -> Sequence[Query]:
        """Questions that JSON doors offer beside the records.

        What they need is kept from the first call on, so that doors without them pay nothing.
        """
        return ()

    def evidence(self, request: Req, result: Res) -> dict[str, Any]:
        """What an answer was made from, as far as it does not say so itself: JSON-ready.

        An audited door asks for it after :meth:`infer`, and keeps it beside the answer: features,
        thresholds, versions. What would identify a person or a card does not belong here.
        """
        return {}

    def heard(self, told: Mapping[str, Any], reply: Callable[[bytes], None] | None) -> None:
        """Take an answer that another process gave into what :meth:`queries` tell of.

        A server with pages calls it between the steps of its flows, with what the audit of stream
        workers has; a vertical that does not override it hears nothing.

        Args:
            told: a record of the audit: ``answer`` and ``evidence``, or ``refused``.
            reply: writes a record to where the answered one came from, so that whoever answered
                reads it; may take seconds, and raises a PlinthError when it is not written. None:
                nobody would read it.

        Raises:
            InputError: it says nothing that the queries tell of.
        """
        raise InputError(f"{self.name} hears nothing of others", reason="unsupported")

    # -- folder doors: batch and upload ------------------------------------------------------
    def discover(self, folder: Path) -> Iterator[Item]:
        """Find the items below a folder without reading more than it must."""
        raise InputError(f"{self.name} takes records, not folders", reason="unsupported")

    def survey(self, folder: Path) -> Iterator[Item | LeftOut]:
        """As :meth:`discover`, as early as can be, with every file that is no item.

        The doors call it. An item may be told before all its files were seen; it is then told
        again and replaces what was told too early.
        """
        yield from self.discover(folder)

    def surveying(self, folder: Path) -> Flow[list[Item | LeftOut]]:
        """:meth:`survey` as a flow, for doors that take a folder whole; see :meth:`loading`."""
        yield from ()
        return list(self.survey(folder))

    def load(self, item: Item) -> Req:
        """Read one item found by :meth:`discover`.

        Raises:
            InputError: names the file, what was expected and what to do.
        """
        raise InputError(f"{self.name} takes records, not folders", reason="unsupported")

    def hand_over(self, item: Item) -> Any:
        """What :meth:`survey` found out of an item that another process is to load; picklable.

        It saves that process from finding it out again, and is forgotten here.
        """
        return None

    def take_over(self, item: Item, known: Any) -> None:
        """Know of an item what another process handed over, before it is loaded here."""
        return

    def write(self, result: Res, folder: Path) -> list[Path]:
        """Write what belongs to an answer (report, masks, pictures); returns the files."""
        path = folder / "report.json"
        path.write_bytes(self.encode(result))
        return [path]

    def loading(self, item: Item) -> Flow[Req]:
        """:meth:`load` as a flow, which the doors drive.

        Override it where reading takes long, and yield it as a :class:`plinth.engine.Compute`: it
        then holds up nobody who shares the process.
        """
        yield from ()
        return self.load(item)

    def writing(self, result: Res, folder: Path) -> Flow[list[Path]]:
        """:meth:`write` as a flow, which the doors drive; see :meth:`loading`."""
        yield from ()
        return self.write(result, folder)

    def tally(self) -> Tally:
        """What ``plinth backtest`` compares two settings by; by default counts."""
        return Tally()

    def reconfigure(self, settings: Settings) -> None:
        """Take over the live tables of new settings, between two batches; all else stays.

        Args:
            settings: checked; what is not in ``live_tables`` is as it was.

        Raises:
            ConfigError: they cannot be taken over; nothing has changed then.
        """
        raise ConfigError(f"{self.name} takes over no settings while it runs")

    # -- state -------------------------------------------------------------------------------
    def observe(self, requests: Sequence[Req]) -> None:
        """Take requests into the state without scoring them (replay after a restart)."""
        return

    def see_partitions(self, mine: int, total: int) -> None:
        """Told by a log's door whenever its share changes: it reads ``mine`` of ``total``.

        State over anything but the record key is then incomplete where ``mine < total``: say so
        in the answers.
        """
        return

    def together(self, request: Req) -> Sequence[str | None]:
        """What a request has in common with others that must lie in the same partition.

        A log's door holds records against it, and calls :meth:`see_growth` when two that share a
        name lie in different partitions.

        Returns:
            One name for each kind of entity, in the same order for every request; ``None``
            where it has none. Empty: nothing needs to meet, or nobody says that it does.
        """
        return ()

    def see_growth(self, at: float | None) -> None:
        """Told by a log's door, after :meth:`see_partitions`, when keys were seen to move.

        That is when the log got more partitions, or when records lay apart that must meet
        (:meth:`together`). A key may lie in another partition since then. Where several workers
        share the log, the state may then lack what came with the key before: say so in the answers
        for as long as something older than ``at`` could have counted.

        Args:
            at: seconds since 1970-01-01T00:00Z; ``None``: never seen, or this worker reads all.
        """
        return

    def see_start(self, at: float | None) -> None:
        """Told by a log's door where the state lacks what the log received before ``at``.

        The log no longer had it, or it was more than may be read again. Say so in the answers for
        as long as something older could have counted.

        Args:
            at: seconds since 1970-01-01T00:00Z; ``None``: the state has all.
        """
        return

    def snapshot(self) -> bytes | None:
        """The state as bytes, or ``None`` for a stateless vertical."""
        return None

    def restore(self, state: bytes) -> None:
        """Replace the state by one from :meth:`snapshot`; raises InputError if unreadable."""
        return

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work inside the block on a state that nobody keeps; then it is as it was before."""
        before = self.snapshot()
        try:
            yield
        finally:
            if before is not None:
                self.restore(before)

    def keep_state_in(self, store: StateStore) -> None:
        """Keep the state in a store from now on, and begin with what its last checkpoint has.

        A store without a checkpoint begins with the state as it is. Memory then holds what was used
        lately and what no checkpoint has yet. The door makes checkpoints:
        :meth:`begin_checkpoint`, :meth:`write_checkpoint` until it is done, flows in between, and
        :meth:`end_checkpoint`. Where the store logs, set :attr:`settled`.

        Raises:
            ConfigError: this vertical cannot (it does not override this): its state is kept by
                :meth:`snapshot`.
            InputError: what is in the store is no state of this vertical.
            StateError: it is damaged.
        """
        raise ConfigError(
            f"{self.name} keeps its state in memory alone",
            hint="leave stream.state_store = 'snapshot'",
        )

    def unsaved(self) -> float:
        """What no durable checkpoint has yet, as a share of what may be in memory."""
        return 0.0

    def begin_checkpoint(self) -> None:
        """The state as it is now, less what the last checkpoint has, belongs to the next one."""
        return

    def write_checkpoint(self, seconds: float) -> bool:
        """Put parts into the store for about so long; true when all of the checkpoint is put."""
        return True

    def end_checkpoint(self, *, durable: bool) -> None:
        """The checkpoint is durable; or it was given up, and its parts belong to the next one."""
        return

    def close(self) -> None:
        """Release what the vertical holds: called once, after the last answer."""
        return


def invalid(error: ValidationError) -> InputError:
    """A pydantic error as one InputError, naming the first field; never echoes the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    more = error.error_count() - 1
    malformed = first["type"] == "json_invalid"
    where = "" if malformed or not path else f"{path}: "
    return InputError(
        f"{where}{first['msg']}" + (f" (and {more} more)" if more else ""),
        field=None if malformed else path or None,
        hint="send one JSON object" if malformed else "see the schema in the API docs",
        reason="malformed_json" if malformed else first["type"],
    )
