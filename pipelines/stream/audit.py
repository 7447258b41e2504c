"""A record of every decision, each chained to the one before it by its hash.

One chain for each partition of the input. Records are written in the transaction of their answers;
the end of a chain stands beside the group's offset in the same transaction, so chain, answers and
offsets cannot come apart.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import orjson

from plinth import __version__
from plinth.engine import InputError
from plinth.pipelines.keys import hash_key
from plinth.pipelines.stream.chunks import Message, Outputs, Partition
from plinth.verticals.card_numbers import (
    MIN_DIGITS,
    SEPARATORS,
    folded,
    groups_of_cards,
    number_at,
    runs_of_digits,
)
from plinth.verticals.contract import Evidence

VERSION = 1
ZERO = "0" * 64
_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"}')
_TAIL_BYTES = len(',"hash":""}') + 64
_OF_A_RUN = bytes(ord("0") if code in b"0123456789" + SEPARATORS else code for code in range(256))
"""Digits and what stands between groups of them become zeros, so that runs are found by a plain
search, in a fortieth of the time of an expression."""
_MANY = b"0" * MIN_DIGITS
_ZEROS = re.compile(rb"0+")
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)


class Link(NamedTuple):
    """The end of a chain: number of its last record, and that record's hash."""

    number: int = -1
    digest: str = ZERO

    def note(self) -> str:
        """As it is kept beside an offset of the group."""
        return f"{self.number}:{self.digest}"

    @classmethod
    def read(cls, note: str) -> Link:
        """From the note beside an offset; the beginning where there is none."""
        number, _, digest = note.rpartition(" ")[2].partition(":")
        return cls(int(number), digest) if number.isdecimal() and len(digest) == 64 else cls()


@dataclass(slots=True)
class _Chain:
    """A chain as it is written on.

    Args:
        place: of the input.
        head: how each of its records begins, up to its number.
        number, digest: of its last record.
    """

    place: Partition
    head: bytes
    number: int
    digest: bytes


_PLACE = attrgetter("record.partition", "record.offset")
_HEAD = b'{"version":%d,"chain":%%b,"number":' % VERSION
_RECORD = b'%b%d,"previous":"%b","offset":%d,"received":%d,%b%b'
_SIGNED = b'%b,"hash":"%b"}'
_ANSWERED = b'"answer":%b,"evidence":{%b,%b}'


def key_of(variable: str | None) -> bytes | None:
    """The key of the chain, from the environment; ``None``: it has none.

    Raises:
        ConfigError: the variable holds no key.
    """
    if variable is None:
        return None
    return hash_key(variable, "stream.audit_key_env names the variable that does")


def digest_of(body: bytes, key: bytes | None) -> str:
    """SHA-256 of a record without its hash and last brace; with a key, HMAC-SHA-256."""
    told = hashlib.sha256(body) if key is None else hmac.new(key, body, "sha256")
    told.update(b"}")
    return told.hexdigest()


class AuditTrail:
    """Makes the audit records of a worker's outputs.

    Args:
        vertical: its name.
        key: makes the hashes such that nobody without it can write the chain anew.
        max_bytes: a decision of which a record would have more becomes a dead letter.
    """

    def __init__(self, vertical: str, key: bytes | None, max_bytes: int = 100_000_000) -> None:
        self._software = orjson.dumps(f"{vertical} {__version__}")
        self._key, self._max_bytes = key, max_bytes
        self._noted: dict[tuple[str, int], Link] = {}
        self._chains: dict[tuple[str, int], _Chain] = {}

    def resume(self, notes: Mapping[Partition, str]) -> None:
        """Go on behind what is committed, as the notes beside the group's offsets say."""
        self._noted = {place: Link.read(note) for place, note in notes.items()}
        self._chains = {}

    def add(self, outputs: Outputs) -> None:
        """Make the records of a chunk, and note where each chain ends behind it."""
        now = round(time.time() * 1e3)
        same = b'"decided":%d,"software":%b,' % (now, self._software)
        chains, key, audit = self._chains, self._key, outputs.audit
        for message in sorted(outputs.messages, key=_PLACE):
            record = message.record
            chain = chains.get((record.topic, record.partition))
            if chain is None:
                chain = self._begin(Partition(record.topic, record.partition))
            chain.number += 1
            content = _content(message)
            if len(content) > self._max_bytes:
                _refuse(message, len(content), self._max_bytes)
                content = _content(message)
            body = _RECORD % (
                *(chain.head, chain.number, chain.digest, record.offset),
                *(record.timestamp, same, content),
            )
            chain.digest = digest = digest_of(body, key).encode()
            audit.append((chain.place, _SIGNED % (body, digest)))
        ends = self._noted | {one: Link(c.number, c.digest.decode()) for one, c in chains.items()}
        outputs.notes = {one: ends[one].note() for one in outputs.chunk.ends if one in ends}

    def _begin(self, place: Partition) -> _Chain:
        """Go on with the chain of a partition."""
        head = _HEAD % orjson.dumps(f"{place.topic}[{place.partition}]")
        end = self._noted.get(place, Link())
        chain = self._chains[place] = _Chain(place, head, end.number, end.digest.encode())
        return chain


def _refuse(message: Message, size: int, limit: int) -> None:
    """Make a dead letter of an answer of which no record can be kept."""
    message.value, message.evidence = b"", None
    message.error = InputError(
        f"the audit record of the answer has {size} bytes, at most {limit} are taken",
        reason="too_large",
        hint="raise stream.max_record_bytes and the topics' max.message.bytes, or send less",
    )


def _content(message: Message) -> bytes:
    """What a record tells of its answer, without anything that looks like a card number.

    Members of a JSON object, without its braces.
    """
    error, evidence = message.error, message.evidence
    if error is not None:
        refused = {"reason": error.reason, "field": error.field}
        return _cleaned(orjson.dumps({"refused": refused}))[1:-1]
    if isinstance(evidence, Evidence):
        texts, numbers, outside = evidence
        if not outside or (outside.isascii() and _MANY not in outside.translate(_OF_A_RUN)):
            return _ANSWERED % (message.value, texts, numbers)
        told = _cleaned(b'{"answer":%b,"evidence":{%b}}' % (message.value, texts))
        return b"%b,%b}" % (told[1:-2], numbers)
    return _looked_through(message.value, evidence or {})[1:-1]


def _looked_through(value: bytes, evidence: Mapping[str, Any]) -> bytes:
    texts: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, one in evidence.items():
        measured = type(one) is dict and _are_measures(one)
        (numbers if measured else texts)[name] = one
    told = _cleaned(b'{"answer":%b,"evidence":%b}' % (value, orjson.dumps(texts)))
    if not numbers:
        return told
    more = orjson.dumps(numbers)[1:] + b"}"
    return told[:-2] + (b"," if texts else b"") + more


def _are_measures(values: dict[Any, Any]) -> bool:
    """Whether all are numbers with a fraction, which no card has, and their names are no card's."""
    return set(map(type, values.values())) == {float} and _are_words(tuple(values))


@lru_cache(maxsize=256)
def _are_words(names: tuple[str, ...]) -> bool:
    told = orjson.dumps(names)
    return _cleaned(told) == told


def _cleaned(body: bytes) -> bytes:
    """The record without anything in it that looks like a card number."""
    if not body.isascii():
        text = body.decode()
        return "".join(_told(text, folded(text))).encode()
    return b"".join(_told(body, body))


def _told(body: Any, plain: bytes) -> list[Any]:
    """Parts of a record, in order, with stars for what looks like a card number.

    Args:
        body: the record, bytes or a text.
        plain: a byte for each of its characters.
    """
    runs = plain.translate(_OF_A_RUN)
    if _MANY not in runs:
        return [body]
    if b"\\" in plain:  # digits and quotation marks of escapes are none of the text's
        plain = _ESCAPE.sub(lambda found: b"\\" * len(found[0]), plain)
        runs = plain.translate(_OF_A_RUN)
    parts: list[Any] = []
    told = 0
    for first, end, quoted in _cards(plain, runs):
        stars = "*" * (end - first) if quoted else f'"{"*" * _digits(plain[first:end])}"'
        parts += body[told:first], stars if isinstance(body, str) else stars.encode()
        told = end
    return [*parts, body[told:]]


def _cards(plain: bytes, runs: bytes) -> Iterator[tuple[int, int, bool]]:
    """From where to where a card number stands, and whether in a text."""
    counted = quotes = 0
    while (start := runs.find(_MANY, counted)) >= 0:
        quotes += plain.count(b'"', counted, start)
        counted = _end(_ZEROS, runs, start)
        if plain.startswith(b":0.", start) and not quotes % 2:
            continue  # a number below one, such as a score, and it alone
        for run in runs_of_digits(plain, start, counted):
            first = run.start()
            if quotes % 2:
                yield from ((*span, True) for span in groups_of_cards(plain, run))
            elif number_at(plain, first) is not None:
                yield first - plain.startswith(b"-", first - 1), run.end(), False


def _digits(number: bytes) -> int:
    """Before the point."""
    return len(number.removeprefix(b"-").partition(b".")[0])


def _end(pattern: re.Pattern[bytes], text: bytes, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


@dataclass(slots=True)
class Checked:
    """What reading a trail came to.

    Args:
        records: read.
        ends: of each chain.
        begins: number of each chain's first record; not 0 where older ones are not there.
        faults: what is wrong, at most 20.
        wrong: how many faults there are.
    """

    records: int = 0
    ends: dict[str, Link] = field(default_factory=dict)
    begins: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    wrong: int = 0

    def fault(self, text: str) -> None:
        """Note a fault."""
        self.wrong += 1
        if len(self.faults) < 20:
            self.faults.append(text)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "records": self.records,
            "wrong": self.wrong,
            "faults": self.faults,
            "chains": {
                name: {"begins": self.begins[name], "ends": end.number, "hash": end.digest}
                for name, end in self.ends.items()
            },
        }


def check_trail(
    records: Iterable[tuple[str, bytes]],
    key: bytes | None,
    known: Mapping[str, Link] | None = None,
) -> Checked:
    """See that no record was removed, changed or moved.

    Args:
        records: each with its place, such as a line.
        key: of the chain.
        known: ends of chains noted before; each must still be there as it was.
    """
    found = Checked()
    left = dict(known or {})
    for where, raw in records:
        found.records += 1
        read = _read(raw)
        if read is None:
            found.fault(f"{where}: is no audit record")
            continue
        chain, link, previous = read
        if digest_of(raw[:-_TAIL_BYTES], key) != link.digest:
            found.fault(f"{where}: record {link.number} of {chain} was changed")
        end = found.ends.get(chain)
        if end is None:
            found.begins[chain] = link.number
        if why := _break(end, link, previous):
            found.fault(f"{where}: record {link.number} of {chain} {why}")
        found.ends[chain] = link
        noted = left.get(chain)
        if noted is not None and noted.number == link.number:
            del left[chain]
            if noted.digest != link.digest:
                found.fault(f"{where}: record {link.number} of {chain} is not the one noted before")
    for chain, link in left.items():
        found.fault(f"record {link.number} of {chain}, noted before, is not there")
    return found


def _break(end: Link | None, link: Link, previous: str) -> str | None:
    """What is wrong with a record behind the end of its chain."""
    if end is None:
        return "claims one before it" if link.number == 0 and previous != ZERO else None
    if link.number > end.number + 1:
        return f"follows {end.number}: records were removed"
    if link.number <= end.number:
        return f"follows {end.number}: it was moved or repeated, or the chain begun again"
    return None if previous == end.digest else "does not follow the one before"


def _read(raw: bytes) -> tuple[str, Link, str] | None:
    """Chain, number and hash of a record, and the hash of the one before."""
    tail = _TAIL.fullmatch(raw[-_TAIL_BYTES:])
    if tail is None:
        return None
    try:
        told = json.loads(raw)
        chain, number, previous = told["chain"], told["number"], told["previous"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(chain, str) or type(number) is not int or not isinstance(previous, str):
        return None
    return chain, Link(number, tail[1].decode()), previous
