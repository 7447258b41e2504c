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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import orjson

from plinth import __version__
from plinth.pipelines.keys import hash_key
from plinth.pipelines.stream.chunks import Message, Outputs, Partition
from plinth.verticals.card_numbers import MAX_DIGITS, MIN_DIGITS, is_card_number
from plinth.verticals.contract import Evidence

VERSION = 1
ZERO = "0" * 64
_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"}')
_TAIL_BYTES = len(',"hash":""}') + 64
_SEPARATORS = b"-._/: "
_OF_A_RUN = bytes(ord("0") if code in b"0123456789" + _SEPARATORS else code for code in range(256))
"""Digits and what stands between groups of them become zeros, so that runs are found by a plain
search, in a fortieth of the time of an expression."""
_MANY = b"0" * MIN_DIGITS
_ZEROS = re.compile(rb"0+")
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_NUMBER = re.compile(rb"(?<![.eE+])(?<![eE]-)([2-6][0-9]{13,18})(?:\.0+)?(?![0-9.eE])")
"""A number that may be a card's, as floats are written too; times in microseconds begin with 1."""
_RUN = re.compile(rb"[0-9]+(?:[-._/: ]{1,2}[0-9]+)*")
_GROUP = re.compile(rb"[0-9]+")
_SHORTEST_GROUP = 3
"""Digits of a group of a card number; those of dates and hours are shorter."""
DIGEST = 32
"""So many digits in hexadecimal are no card number."""
_HEX = b"0123456789abcdef"


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
    """

    def __init__(self, vertical: str, key: bytes | None) -> None:
        self._software = orjson.dumps(f"{vertical} {__version__}")
        self._key = key
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
            body = _RECORD % (
                *(chain.head, chain.number, chain.digest, record.offset),
                *(record.timestamp, same, _content(message)),
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
        if not outside or _MANY not in outside.translate(_OF_A_RUN):
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
    runs = body.translate(_OF_A_RUN)
    if _MANY not in runs:
        return body
    plain = body
    if b"\\" in body:  # digits and quotation marks of escapes are none of the text's
        plain = _ESCAPE.sub(lambda found: b"\\" * len(found[0]), body)
        runs = plain.translate(_OF_A_RUN)
    parts: list[bytes] = []
    told = counted = quotes = 0
    while (start := runs.find(_MANY, counted)) >= 0:
        quotes += plain.count(b'"', counted, start)
        counted = _end(_ZEROS, runs, start)
        if plain.startswith(b":0.", start) and not quotes % 2:
            continue  # a number below one, such as a score, and it alone
        for run in _RUN.finditer(plain, start, counted):
            first = run.start()
            if run.end() - first < MIN_DIGITS:
                continue
            if quotes % 2:
                clean = _starred(plain, run)
            elif (number := _NUMBER.match(plain, first)) and _is_card(number[1]):
                clean = b'"' + b"*" * len(number[1]) + b'"'
                first -= plain.startswith(b"-", first - 1)
            else:
                continue
            parts += body[told:first], clean
            told = run.end()
    return b"".join([*parts, body[told:]])


def _end(pattern: re.Pattern[bytes], text: bytes, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


def _is_card(digits: bytes) -> bool:
    return is_card_number(digits.decode())


def _starred(text: bytes, run: re.Match[bytes]) -> bytes:
    """A run of digits in groups, with stars for the groups that are a card number."""
    if _in_digest(text, run.start(), run.end()):
        return run[0]
    groups = [group.span() for group in _GROUP.finditer(run[0])]
    told, at = bytearray(run[0]), 0
    while at < len(groups):
        end = _card_from(run[0], groups, at)
        if end > at:
            first, last = groups[at][0], groups[end - 1][1]
            told[first:last] = b"*" * (last - first)
        at = max(end, at + 1)
    return bytes(told)


def _card_from(run: bytes, groups: list[tuple[int, int]], at: int) -> int:
    """Behind which group a card number ends that begins with group ``at``; ``at``: none does."""
    digits = b""
    for number, (first, last) in enumerate(groups[at : at + MAX_DIGITS], at + 1):
        digits += run[first:last]
        if last - first < _SHORTEST_GROUP or len(digits) > MAX_DIGITS:
            return at
        if len(digits) >= MIN_DIGITS and _is_card(digits):
            return number
    return at


def _in_digest(body: bytes, first: int, end: int) -> bool:
    """Whether digits are part of a digest in hexadecimal."""
    before, behind = body[max(0, first - DIGEST) : first], body[end : end + DIGEST]
    around = len(before) - len(before.rstrip(_HEX)) + len(behind) - len(behind.lstrip(_HEX))
    return end - first + around >= DIGEST


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
