"""``plinth keys``: API keys by their hashes, in a file that servers read again when it changes."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Annotated

import typer

from plinth.pipelines.console import say, show_json, show_table

keys = typer.Typer(
    help="Make, list and revoke the API keys of a server.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

FileOption = Annotated[
    Path | None, typer.Option("--file", help="File of keys.", show_default="serve.keys")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")]


@keys.command(epilog="Example: plinth keys add alice --only finance --per-second 50")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    role: Annotated[
        str, typer.Option(help="read: state and metrics; score: work too; admin: models too.")
    ] = "score",
    only: Annotated[
        list[str] | None, typer.Option(help="A vertical or model it reaches; repeat it.")
    ] = None,
    per_second: Annotated[float | None, typer.Option(help="Requests, on average.")] = None,
    burst: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="How long it is valid.")] = None,
    file: FileOption = None,
    config: ConfigOption = None,
) -> None:
    """Make a key. It is printed once, on stdout, and kept nowhere: the file has its hash."""
    from plinth.pipelines.identity import key_file

    expires = None
    if days is not None:
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        expires = now + datetime.timedelta(days=days)
    fields = {"role": role, "per_second": per_second, "burst": burst, "expires": expires}
    path = _path(file, config)
    made = key_file.add(path, name, {**fields, "only": tuple(only or ())})
    say(f"{path} knows {name} from now on; this is the key, which is not shown again:")
    sys.stdout.write(f"{made}\n")


@keys.command("list", epilog="Example: plinth keys list --json")
def list_keys(
    file: FileOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """List names, roles and rates; never keys."""
    from plinth.pipelines.identity import key_file

    path = _path(file, config)
    found = {
        name: table.model_dump(mode="json", exclude={"sha256"})
        for name, table in key_file.read(path).keys.items()
    }
    if as_json:
        show_json(found)
        return
    rows = [
        (
            name,
            told["role"],
            ", ".join(told["only"]) or "all",
            told["per_second"] or "any",
            told["made"] or "",
            told["expires"] or "never",
        )
        for name, told in found.items()
    ]
    columns = ("name", "role", "reaches", "per second", "made", "expires")
    show_table(f"Keys in {path}", columns, rows)


@keys.command(epilog="Example: plinth keys revoke alice")
def revoke(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: FileOption = None,
    config: ConfigOption = None,
) -> None:
    """Forget a key; servers refuse it within a second or two."""
    from plinth.pipelines.identity import key_file

    path = _path(file, config)
    key_file.revoke(path, name)
    say(f"{path} does not know {name} any more")


def _path(file: Path | None, config: Path | None) -> Path:
    from plinth.engine import ConfigError
    from plinth.pipelines.config.settings import load

    if file is not None:
        return file
    loaded = load(config)
    if loaded.serve.keys is None:
        raise ConfigError(
            "no file of keys is named", hint="set serve.keys in the config file, or give --file"
        )
    return loaded.beside(loaded.serve.keys)
