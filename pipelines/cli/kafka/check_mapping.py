"""``plinth check-mapping``: a mapping tried on messages, as tables for people."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.engine import ConfigError
from plinth.pipelines.assembly import load_vertical
from plinth.pipelines.config.settings import Config
from plinth.pipelines.console import FAILED, OK, say, show_json, show_table
from plinth.pipelines.formats.check import Findings, check_messages
from plinth.pipelines.formats.mapping import DeclaredMapping, load_mapping
from plinth.pipelines.lines import MAX_LINE, numbered, opened

_STAMPED = re.compile(rb"(?:CreateTime|LogAppendTime):([0-9]{1,15})\t")
"""How Kafka's console consumer writes a record's time before it (``print.timestamp=true``)."""
SHOWN = 20
"""Problems, and paths that no field takes, in their tables."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command.

    Args:
        samples: files of messages; none: the input topic.
        mapping: in place of the stream's.
        out: where the records are written.
        count: messages to read from the topic.
        as_json: print JSON, no tables.
    """

    samples: Sequence[Path]
    mapping: Path | None
    out: Path | None
    count: int
    as_json: bool


def run_check_mapping(config: Config, name: str, options: Options) -> int:
    """Try a mapping; returns 1 if a message becomes no record.

    Raises:
        ConfigError: no mapping, a wrong one, or no messages.
        RegistryAway: the schema registry does not answer.
    """
    path = options.mapping or (config.stream.mapping if config.stream else None)
    if path is None:
        raise ConfigError(
            "there is no mapping to check",
            hint="--mapping FILE, or stream.mapping in the config; docs/own-messages.md has one "
            "to begin with",
        )
    vertical = load_vertical(config, name)
    mapping = load_mapping(path, vertical)
    findings = Findings()
    messages = _from_files(options.samples, mapping) if options.samples else _topic(config, options)
    with contextlib.ExitStack() as stack:
        write = _writer(stack, options.out)
        for record in check_messages(mapping, vertical, messages, findings):
            write(record)
    if not findings.kinds:
        raise ConfigError("there are no messages to check", hint="one JSON object a line")
    if options.as_json:
        show_json(findings.as_dict())
    else:
        _show(findings)
    if options.out is not None:
        say(f"{findings.records.total():,} records in {options.out}")
    return FAILED if findings.wrong else OK


Sample = tuple[str, bytes, float | None]


def _from_files(samples: Sequence[Path], mapping: DeclaredMapping) -> Iterator[Sample]:
    for path in samples:
        with opened(path) as file:
            if mapping.registry is not None:
                yield str(path), file.read(MAX_LINE), None
            else:
                for where, line in numbered(path, file):
                    head = _STAMPED.match(line)
                    received = int(head[1]) / 1e3 if head else None
                    yield where, line[head.end() :] if head else line, received


def _topic(config: Config, options: Options) -> Iterator[Sample]:
    if config.stream is None:
        raise ConfigError(
            "there are no messages to check",
            hint="name a file of them, or a config with a table [stream]: its topic is read then",
        )
    from plinth.pipelines.stream.history.rebuild import newest

    for record in newest(config.stream, options.count):
        received = record.timestamp / 1e3 if record.timestamp > 0 else None
        yield f"{record.topic}[{record.partition}]@{record.offset}", record.value or b"", received


def _writer(stack: contextlib.ExitStack, out: Path | None) -> Any:
    if out is None:
        return len
    try:
        plain = stack.enter_context(out.open("xb"))
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    stack.push(lambda kind, *_: out.unlink(missing_ok=True) if kind else None)
    packed = out.suffix == ".gz"
    file: Any = stack.enter_context(gzip.GzipFile(fileobj=plain)) if packed else plain
    return lambda record: file.write(record + b"\n")


def _show(findings: Findings) -> None:
    rows: list[tuple[Any, ...]] = [
        (kind, f"{count:,}", f"{findings.records[kind]:,}")
        for kind, count in findings.kinds.items()
    ]
    show_table("Messages", ("message", "messages", "records"), rows)
    columns = ("field", "from", "example", "becomes", "filled", "wrong")
    for kind in dict.fromkeys(kind for kind, _ in findings.fields):
        fields = [
            (name, one.source, one.before, one.after, f"{one.filled:,}", one.wrong or "")
            for (its, name), one in findings.fields.items()
            if its == kind
        ]
        show_table(f"Fields of {kind}", columns, fields)
    if findings.not_taken:
        left = findings.not_taken.most_common(SHOWN)
        rows = [(kind, path, f"{count:,}") for (kind, path), count in left]
        show_table("Taken by no field", ("message", "path", "messages"), rows)
    if findings.problems:
        worst = sorted(findings.problems.values(), key=lambda one: -one.count)[:SHOWN]
        rows = [(one.message, f"{one.count:,}", one.first, one.text, one.hint) for one in worst]
        show_table("Wrong", ("message", "count", "first", "what", "what to do"), rows)
    say(
        f"{findings.records.total():,} of {findings.kinds.total():,} messages become records, "
        f"{findings.skipped:,} are skipped, {findings.wrong:,} are wrong"
    )
