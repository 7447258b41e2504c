"""``plinth audit``: the chained records of a stream's decisions, read and verified."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.console import FAILED, say, show_json, show_table

if TYPE_CHECKING:
    from plinth.pipelines.stream.audit import Link
    from plinth.pipelines.stream.settings import StreamConfig

audit = typer.Typer(
    help="Records of every decision of a stream (stream.audit_topic): export, verify.",
    no_args_is_help=True,
)
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; default ./plinth.toml if there.")
]


@audit.command(epilog="Example: plinth audit verify audit.jsonl --heads heads.json")
def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...", help="As exported, in order; without: the topic is read."
        ),
    ] = None,
    heads: Annotated[
        Path | None,
        typer.Option(
            help="Where the ends of the chains were noted: each must still be there. All well: "
            "the new ends are noted there."
        ),
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(help="Variable with the key.", show_default="stream.audit_key_env"),
    ] = None,
    config_file: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find every record that was removed, changed, moved or repeated; exit code 1 then."""
    from plinth.engine import ConfigError
    from plinth.pipelines.stream.audit import check_trail, key_of

    config = None if files and key_env else _stream(config_file, needed=not files)
    variable = key_env or (config.audit_key_env if config else None)
    known = _heads(heads)
    records = _lines(files) if files else _topic(config)
    found = check_trail(records, key_of(variable), known)
    if as_json:
        show_json(found.as_dict())
    else:
        rows = [
            (name, f"{found.begins[name]:,}", f"{end.number:,}", end.digest)
            for name, end in found.ends.items()
        ]
        show_table("Chains", ("chain", "begins", "ends", "hash of its end"), rows)
        for fault in found.faults:
            say(fault)
    if not found.records:
        raise ConfigError("there are no audit records", hint="is stream.audit_topic the right one?")
    say(f"{found.records:,} records, {found.wrong:,} faults")
    if found.wrong:
        raise typer.Exit(FAILED)
    if heads is not None:
        _note(heads, {**known, **found.ends})


@audit.command(epilog="Example: plinth audit export audit.jsonl")
def export(
    out: Annotated[Path, typer.Argument(help="File to write, one record a line.")],
    config_file: ConfigOption = None,
) -> None:
    """Write the audit topic to a file, each chain in its order."""
    from plinth.engine import ConfigError

    count = 0
    try:
        with out.open("xb") as file:
            for _, raw in _topic(_stream(config_file, needed=True)):
                file.write(raw + b"\n")
                count += 1
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from None
    say(f"{count:,} records in {out}")


def _stream(config_file: Path | None, *, needed: bool) -> StreamConfig | None:
    from plinth.engine import ConfigError
    from plinth.pipelines.config.settings import load

    config = load(config_file).stream
    if needed and (config is None or config.audit_topic is None):
        raise ConfigError(
            "there is no audit topic to read",
            hint="set stream.audit_topic, or name a file of exported records",
        )
    return config


def _topic(config: StreamConfig | None) -> Iterator[tuple[str, bytes]]:
    from plinth.pipelines.stream.history.rebuild import committed_records

    assert config is not None
    assert config.audit_topic is not None
    for record in committed_records(config, config.audit_topic):
        yield f"{record.topic}[{record.partition}]@{record.offset}", record.value or b""


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    from plinth.pipelines.lines import numbered, opened

    for path in files:
        with opened(path) as file:
            yield from numbered(path, file)


def _heads(path: Path | None) -> dict[str, Link]:
    from plinth.engine import ConfigError
    from plinth.pipelines.lines import json_of, whole
    from plinth.pipelines.stream.audit import Link

    if path is None:
        return {}
    try:
        told: dict[str, Any] = json_of(whole(path))
        return {name: Link(int(one["number"]), str(one["hash"])) for name, one in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} does not hold the ends of chains", hint="name a file that verify wrote"
        ) from None


def _note(path: Path, ends: dict[str, Link]) -> None:
    from plinth.engine import ConfigError

    told = {name: {"number": end.number, "hash": end.digest} for name, end in ends.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(told, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
