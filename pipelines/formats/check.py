"""What a mapping makes of sample messages, before anything is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from plinth.engine import InputError
from plinth.pipelines.formats.fields import FieldMapping, found_at
from plinth.pipelines.formats.mapping import DeclaredMapping, Message
from plinth.verticals.card_numbers import without_card_numbers
from plinth.verticals.contract import Vertical

RECEIVED = "received_time"
"""The field of a record that says when a door received it, for training."""
LONGEST = 40
"""Characters of an example that are shown."""


@dataclass(slots=True)
class FieldFound:
    """What became of one field over all messages of a kind.

    Args:
        source: where it comes from.
        before: the first value found there, as it is shown.
        after: what it became.
        filled: messages that had it.
        wrong: messages in which it could not be read.
    """

    source: str
    before: str = ""
    after: str = ""
    filled: int = 0
    wrong: int = 0


@dataclass(slots=True)
class Problem:
    """One kind of error: how often, and where first."""

    message: str
    text: str
    hint: str | None
    first: str
    count: int = 1


@dataclass(slots=True)
class Findings:
    """What a sample came to.

    Args:
        kinds: messages by name of their mapping.
        records: of these, what the vertical takes.
        skipped: messages that are no records.
        fields: by message and field.
        problems: by what they say.
        not_taken: paths that no field reads, by message and path.
        made: records that the vertical takes, as JSON, in order, where they are kept.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    records: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    fields: dict[tuple[str, str], FieldFound] = field(default_factory=dict)
    problems: dict[tuple[str, str], Problem] = field(default_factory=dict)
    not_taken: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def wrong(self) -> int:
        """Messages that become no record."""
        return self.kinds.total() - self.records.total() - self.skipped

    def note(self, kind: str, error: InputError, where: str) -> None:
        """Count an error."""
        known = self.problems.get((kind, error.message))
        if known is not None:
            known.count += 1
        else:
            self.problems[kind, error.message] = Problem(kind, error.message, error.hint, where)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "messages": {
                name: {"messages": count, "records": self.records[name]}
                for name, count in self.kinds.items()
            },
            "skipped": self.skipped,
            "wrong": self.wrong,
            "fields": [
                {"message": kind, "field": name, "from": one.source, "example": one.before,
                 "becomes": one.after, "filled": one.filled, "wrong": one.wrong}
                for (kind, name), one in self.fields.items()
            ],
            "problems": [
                {"message": one.message, "text": one.text, "hint": one.hint, "first": one.first,
                 "count": one.count}
                for one in self.problems.values()
            ],
            "not_taken": [
                {"message": kind, "path": path, "count": count}
                for (kind, path), count in self.not_taken.most_common()
            ],
        }  # fmt: skip


def check_messages(
    mapping: DeclaredMapping,
    vertical: Vertical[Any, Any],
    messages: Iterable[tuple[str, bytes, float | None]],
    findings: Findings,
) -> Iterator[bytes]:
    """Map messages one by one, and let the vertical read what they become.

    Args:
        mapping: to try.
        vertical: that is to read the records.
        messages: each with its place, such as a line, and when it was received, in seconds since
            1970, where that is known.
        findings: gets what is found.

    Yields:
        The records that the vertical takes, as JSON; with ``received_time``, where records have
        that, nothing maps it and it is known.

    Raises:
        RegistryAway: the schema registry does not answer.
    """
    timed = any(RECEIVED in kind.model_fields for kind in vertical.record_types())
    for where, raw, received in messages:
        kind = "(none)"
        try:
            source = mapping.decode(raw)
            message = mapping.kind_of(source)
            kind = message.name
            if message.declared.skip:
                findings.skipped += 1
            else:
                _look_at_fields(message, source.value, findings)
                record = mapping.record(raw)
                assert record is not None
                request = vertical.parse_at(record, received)
                findings.records[kind] += 1
                yield record if received is None or not timed else _received(record, received)
                refused = _refused(vertical, request)
                if refused is not None:
                    refused = InputError(
                        f"refused as a record: {refused.message}", hint=refused.hint
                    )
                    findings.note(kind, refused, where)
        except InputError as error:
            findings.note(kind, error, where)
        findings.kinds[kind] += 1


def _received(record: bytes, at: float) -> bytes:
    time = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return orjson.dumps({RECEIVED: time.replace("+00:00", "Z")} | orjson.loads(record))


def _refused(vertical: Vertical[Any, Any], request: Any) -> InputError | None:
    """What the vertical answers where it needs no model for that: the record is wrong."""
    flow = vertical.infer([request])
    try:
        next(flow)
    except StopIteration as end:
        result = end.value[0]
        return result if isinstance(result, InputError) else None
    finally:
        flow.close()
    return None


def _look_at_fields(message: Message, source: Any, findings: Findings) -> None:
    for name, value in message.each(source):
        declared = message.declared.fields[name]
        found = findings.fields.setdefault((message.name, name), FieldFound(declared.source))
        if isinstance(value, InputError):
            found.wrong += 1
            found.before = found.before or _before(declared, message.declared.root, source)
        elif value is not None:
            found.filled += 1
            if not found.after:
                found.before = _before(declared, message.declared.root, source)
                found.after = _shown(value)
    if message.declared.unknown_fields == "ignore":
        rest = map(without_card_numbers, message.not_taken(source))
        findings.not_taken.update((message.name, path) for path in rest)


def _before(declared: FieldMapping, root: tuple[str | int, ...], source: Any) -> str:
    found = [found_at(source, root + path) for path in declared.places]
    return ", ".join(_shown(one) for one in found if one is not None)


def _shown(value: Any) -> str:
    """A value for people, with its type where that matters, and without what may be private."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    told = value if isinstance(value, int | float) else str(value)
    if without_card_numbers(told) != told:
        return "a card number"
    text = str(value)
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return f'"{text}"' if isinstance(value, str) else text if _plain(value) else "bytes"


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | bool | Decimal | datetime)
