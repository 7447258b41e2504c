"""``plinth archive``: images in by C-STORE or DICOMweb, results back by STOW."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.console import out, say, show_json, show_table

if TYPE_CHECKING:
    from plinth.pipelines.archive.settings import Archive
    from plinth.verticals import Vertical

archive = typer.Typer(
    help="From an archive to an archive: studies come in by C-STORE (a scanner or a PACS sends) or "
    "DICOMweb (we fetch), the rules of one TOML file choose series and analysis, and SEG, SR and "
    "RT Structure Sets go back by STOW. Research use only.\n\n"
    "Start: [bold]plinth archive example > archive.toml[/], change the addresses, "
    "[bold]plinth archive try archive.toml STUDY[/] shows what the rules choose, "
    "[bold]plinth archive run archive.toml[/].",
    epilog="The queue is on disk: an outage of the archive or a kill loses nothing and sends "
    "nothing twice. Needs: pip install 'plinth-engine[archive]'.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
File = Annotated[Path, typer.Argument(metavar="ARCHIVE.TOML", help="Addresses and rules.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file of the engine; ./plinth.toml.")
]


@archive.command(epilog="Example: plinth archive example > archive.toml")
def example() -> None:
    """Print a whole file to begin with, each line explained."""
    from plinth.pipelines.archive.settings import EXAMPLE

    out.print(EXAMPLE, end="", markup=False, highlight=False, soft_wrap=True)


@archive.command(epilog="Example: plinth archive run archive.toml --metrics 127.0.0.1:9100")
def run(
    file: File,
    config: ConfigOption = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve Prometheus metrics there.")
    ] = None,
) -> None:
    """Listen, fetch, analyse and send until Ctrl-C or SIGTERM; then end what is in work."""
    from plinth.pipelines.interpreter import frozen, one_heap

    one_heap()
    from plinth.pipelines.archive.queue import Queue
    from plinth.pipelines.archive.service import Service
    from plinth.pipelines.archive.settings import read
    from plinth.pipelines.assembly import running
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.process import Signals, metrics_at

    settings = read(file)
    verticals = _verticals(settings)
    queue = Queue(settings.folder, settings.max_bytes)
    try:
        with (
            running(load(config), verticals) as engine,
            frozen(),
            metrics_at(metrics) as url,
        ):
            service = Service(settings, verticals, engine, queue)
            with Signals(service.stop).handled():
                service.run(lambda: _said(settings, service.port, url))
    finally:
        queue.close()
    say("ended, nothing is lost")


def _said(settings: Archive, port: int | None, metrics: str | None) -> None:
    if settings.listen is not None:
        who = ", ".join(settings.listen.callers)
        say(f"listening as {settings.listen.title} on {settings.listen.host}:{port} to {who}")
    if settings.poll is not None:
        say(f"fetching from {settings.poll.url} every {settings.poll.every_seconds:g} s")
    to = str(settings.folder)
    if settings.send is not None:
        to = settings.send.url
    elif settings.store is not None:
        to = f"{settings.store.title} at {settings.store.host}:{settings.store.port} by C-STORE"
    say(f"results go to {to}")
    if metrics is not None:
        say(f"metrics: {metrics}")


@archive.command(epilog="Example: plinth archive status archive.toml --json")
def status(file: File, as_json: JsonOption = False) -> None:
    """What came in, what is analysed, what is sent and what is not, and why."""
    from plinth.pipelines.archive.queue import connected, status_of
    from plinth.pipelines.archive.settings import read

    db = connected(read(file).folder, read_only=True)
    try:
        found = status_of(db)
    finally:
        db.close()
    if as_json:
        show_json(found)
        return
    rows = [("images", "", found["images"]), ("bytes", "", found["bytes"])]
    for what in ("studies", "analyses", "files"):
        rows += [(what, state, count) for state, count in sorted(found[what].items())]
    show_table("Archive", ("what", "state", "count"), rows)
    if found["told"]:
        keys = ("study", "analysis", "item", "reason", "message")
        show_table("Not done", keys, [[one[key] for key in keys] for one in found["told"]])


@archive.command(epilog="Example: plinth archive retry archive.toml")
def retry(file: File) -> None:
    """Try again what failed or was refused; not while 'run' goes on."""
    from plinth.pipelines.archive.queue import Queue
    from plinth.pipelines.archive.settings import read

    settings = read(file)
    queue = Queue(settings.folder, settings.max_bytes)
    try:
        say(f"{queue.retry()} will be tried again by plinth archive run")
    finally:
        queue.close()


@archive.command("try", epilog="Example: plinth archive try archive.toml ./studies")
def try_rules(
    file: File,
    folder: Annotated[Path, typer.Argument(help="A folder with studies.")],
    as_json: JsonOption = False,
) -> None:
    """Which series of a folder the rules choose, and for each other rule why not."""
    from plinth.engine import InputError, PlinthError
    from plinth.pipelines.archive.rules import facts_of, why_not
    from plinth.pipelines.archive.service import found_in
    from plinth.pipelines.archive.settings import read

    settings = read(file)
    rows: list[dict[str, Any]] = []
    for name, vertical in _verticals(settings).items():
        try:
            items, left = found_in(vertical, folder)
        except PlinthError as error:
            rows.append({"analysis": name, "series": "", "images": 0, "chosen": False,
                         "why": error.message})  # fmt: skip
            continue
        for item in items:
            reasons: list[str | None]
            try:
                facts = facts_of(item.paths[0], len(item.paths))
                reasons = [why_not(r, facts) for r in settings.rules if r.analysis == name]
            except InputError as error:
                reasons = [error.message]
            fits = any(reason is None for reason in reasons)
            why = "" if fits else "; ".join(filter(None, reasons)) or "no rule asks for it"
            rows.append({"analysis": name, "series": item.id, "images": len(item.paths),
                         "chosen": fits, "why": why})  # fmt: skip
        rows += [
            {"analysis": name, "series": "", "images": one.files, "chosen": False,
             "why": one.message}
            for one in left
        ]  # fmt: skip
    if as_json:
        show_json(rows)
        return
    keys = ("analysis", "series", "images", "chosen", "why")
    shown = [[row[key] for key in keys[:3]] + ["yes" if row["chosen"] else "no", row["why"]]
             for row in rows]  # fmt: skip
    show_table(f"{sum(row['chosen'] for row in rows)} chosen", keys, shown)


def _verticals(settings: Archive) -> dict[str, Vertical[Any, Any]]:
    """A vertical for each analysis.

    Raises:
        ConfigError: it is not installed, reads no folders, or its settings are wrong.
    """
    from plinth.engine import ConfigError
    from plinth.pipelines.assembly import is_folder_vertical
    from plinth.verticals import registry

    found = {}
    for name, table in settings.analyses.items():
        try:
            found[name] = registry.load(table.vertical, table.model_extra or {})
        except ConfigError as error:
            raise ConfigError(f"analyses.{name}: {error.message}", hint=error.hint) from None
        if not is_folder_vertical(found[name]):
            raise ConfigError(f"analyses.{name}: {table.vertical} reads records, not folders")
    return found
