"""The command ``plinth``. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.distribution import install_hint, version
from plinth.pipelines.cli.backends import EPILOG as BACKENDS_EPILOG
from plinth.pipelines.cli.backends import backends
from plinth.pipelines.cli.benchmark import EPILOG as BENCHMARK_EPILOG
from plinth.pipelines.cli.benchmark import benchmark
from plinth.pipelines.cli.convert import EPILOG as CONVERT_EPILOG
from plinth.pipelines.cli.convert import convert
from plinth.pipelines.cli.doctor import EPILOG as DOCTOR_EPILOG
from plinth.pipelines.cli.doctor import doctor
from plinth.pipelines.cli.doors.archive import archive
from plinth.pipelines.cli.doors.cluster import cluster
from plinth.pipelines.cli.doors.deidentify import EPILOG as DEIDENTIFY_EPILOG
from plinth.pipelines.cli.doors.deidentify import deidentify
from plinth.pipelines.cli.doors.keys import keys
from plinth.pipelines.cli.doors.metrics import metrics
from plinth.pipelines.cli.doors.plan import EPILOG as PLAN_EPILOG
from plinth.pipelines.cli.doors.plan import plan
from plinth.pipelines.cli.finance.commands import finance
from plinth.pipelines.cli.init import EPILOG as INIT_EPILOG
from plinth.pipelines.cli.init import init
from plinth.pipelines.cli.kafka.audit import audit
from plinth.pipelines.cli.models import models
from plinth.pipelines.cli.new_vertical import EPILOG as NEW_VERTICAL_EPILOG
from plinth.pipelines.cli.new_vertical import new_vertical
from plinth.pipelines.cli.serve_model import EPILOG as SERVE_MODEL_EPILOG
from plinth.pipelines.cli.serve_model import serve_model
from plinth.pipelines.cli.variants.compress import EPILOG as COMPRESS_EPILOG
from plinth.pipelines.cli.variants.compress import compress
from plinth.pipelines.cli.variants.optimize import EPILOG as OPTIMIZE_EPILOG
from plinth.pipelines.cli.variants.optimize import optimize
from plinth.pipelines.console import (
    FAILED,
    USAGE,
    out,
    say,
    show_error,
    show_json,
    show_table,
    start_logging,
)

if TYPE_CHECKING:
    from plinth.pipelines.config.settings import Config

EPILOG = (
    "Exit codes: 0 all well (a server or stream told to stop has drained) · 1 something failed · "
    "2 a setting or argument is wrong · 130, 143 Ctrl-C, SIGTERM before the end. "
    "One config file serves every command: ./plinth.toml, --config or PLINTH_CONFIG."
)
app = typer.Typer(
    name="plinth",
    help="One inference engine under pluggable verticals.\n\n"
    "Start here: [bold]plinth demo[/], [bold]plinth list[/], [bold]plinth serve[/].",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models, name="models")
app.add_typer(archive, name="archive")
app.add_typer(cluster, name="cluster")
app.add_typer(audit, name="audit")
app.add_typer(keys, name="keys")
app.add_typer(finance, name="finance")
app.add_typer(metrics, name="metrics")
app.command(epilog=BENCHMARK_EPILOG)(benchmark)
app.command(epilog=OPTIMIZE_EPILOG)(optimize)
app.command(epilog=COMPRESS_EPILOG)(compress)
app.command(epilog=BACKENDS_EPILOG)(backends)
app.command(epilog=CONVERT_EPILOG)(convert)
app.command(epilog=DEIDENTIFY_EPILOG)(deidentify)
app.command(epilog=DOCTOR_EPILOG)(doctor)
app.command(epilog=INIT_EPILOG)(init)
app.command("new-vertical", epilog=NEW_VERTICAL_EPILOG)(new_vertical)
app.command(epilog=PLAN_EPILOG)(plan)
app.command("serve-model", epilog=SERVE_MODEL_EPILOG)(serve_model)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; default ./plinth.toml if there.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto, or a name: plinth check shows it.", show_default="auto")
]
PrecisionOption = Annotated[
    str | None, typer.Option(help="A preset, such as auto, fp32 or bf16.", show_default="auto")
]
VerticalsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[VERTICAL]...", help="Which verticals; default: those in the file, else all."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"plinth {version()}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and end."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json", envvar="PLINTH_LOG_JSON", help="Log one JSON object a line, on stderr."
        ),
    ] = False,
) -> None:
    """Options of every command."""
    start_logging(debug, log_json)


@app.command("list", epilog="Example: plinth list --json | jq '.[].name'")
def list_verticals(as_json: JsonOption = False) -> None:
    """List the installed verticals and the doors each one opens."""
    from plinth.verticals import registry

    found = [_listing(listing) for listing in registry.describe()]
    if as_json:
        show_json(found)
    else:
        rows = [(f["name"], f["error"] or f["summary"], ", ".join(f["doors"])) for f in found]
        show_table("Verticals", ("name", "what it does", "doors"), rows)


def _listing(listing: Any) -> dict[str, Any]:
    from plinth.pipelines.assembly import doors
    from plinth.verticals import registry

    return {
        "name": listing.name,
        "summary": listing.summary,
        "distribution": listing.distribution,
        "version": listing.version,
        "doors": [] if listing.error else doors(registry.find(listing.name)),
        "error": listing.error,
    }


@app.command(epilog="Example: plinth check finance --config plinth.toml")
def check(
    names: VerticalsArgument = None,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the config and say what would run: device, precision, verticals, models."""
    from plinth.pipelines.assembly import plan

    found = plan(_load(config_file), names or [])
    if as_json:
        show_json(found)
        return
    show_table("Engine", ("setting", "value"), found["engine"].items())
    models = [
        (name, *(m[key] for key in ("version", "backend", "precision", "largest_batch")))
        for name, m in found["models"].items()
    ]
    show_table("Models", ("name", "version", "backend", "precision", "largest batch"), models)
    rows = [
        (name, ", ".join(v["doors"]), ", ".join(v["models"]), v["sla"]["deadline_ms"] or "none")
        for name, v in found["verticals"].items()
    ]
    show_table("Verticals", ("name", "doors", "models", "deadline ms"), rows)
    say(f"{found['config'] or 'no config file, defaults'}: all is well")


@app.command(epilog="Example: plinth serve finance --port 9000 --device cpu")
def serve(
    names: VerticalsArgument = None,
    config_file: ConfigOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let others ask without a key.")
    ] = False,
    web: Annotated[bool, typer.Option("--web", help="Pages for people, under /ui.")] = False,
) -> None:
    """Serve verticals over HTTP until Ctrl-C or SIGTERM, then drain. API docs are at /docs."""
    config = _load(
        config_file,
        **{
            "serve.host": host,
            "serve.port": port,
            "serve.insecure": insecure or None,
            "serve.web": web or None,
            "engine.device": device,
            "engine.precision": precision,
        },
    )
    from plinth.pipelines.assembly import load_verticals, running
    from plinth.pipelines.http import server as door
    from plinth.pipelines.state.snapshots import kept_states

    config.check_access()
    bound = door.bind(config.serve.host, config.serve.port)
    verticals = load_verticals(config, names or [])
    with (
        kept_states(config.serve.state_dir, verticals) as states,
        running(config, verticals, follow=True) as engine,
    ):
        server = door.Server(door.create_app(verticals, engine, config, states), config, bound)
        url = server.url
        server.run(
            lambda: say(
                f"serving {', '.join(verticals)} on {url} (API docs: {url}/docs)"
                + (f", pages on {server.pages_url}" if server.pages_url else "")
                + (f", gRPC on {server.grpc_address}" if server.grpc_address else "")
                + (f", metrics on {server.admin_url}" if server.admin_url else "")
            )
        )
    say("drained, good bye")


@app.command(epilog="Example: plinth stream finance --input-topic tx --output-topic scores")
def stream(
    name: Annotated[str, typer.Argument(metavar="VERTICAL", help="Who reads the records.")],
    config_file: ConfigOption = None,
    bootstrap_servers: Annotated[str | None, typer.Option(help="host:port, comma between.")] = None,
    input_topic: Annotated[str | None, typer.Option(help="Topic of records.")] = None,
    output_topic: Annotated[str | None, typer.Option(help="Topic of answers.")] = None,
    group: Annotated[str | None, typer.Option(help="Consumer group.")] = None,
    max_events: Annotated[int | None, typer.Option(help="End after so many records.")] = None,
    idle_exit_s: Annotated[
        float | None, typer.Option(help="End after so many idle seconds.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve Prometheus metrics, lag included, there."),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Make this past decision again from the log, and compare."),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a Kafka topic until Ctrl-C or SIGTERM; answers and offsets commit together."""
    from plinth.pipelines.cli.runs import run_rebuild, run_stream

    config = _load(
        config_file,
        **{
            "stream.bootstrap_servers": bootstrap_servers,
            "stream.input_topic": input_topic,
            "stream.output_topic": output_topic,
            "stream.group": group,
            "stream.max_events": max_events,
            "stream.idle_exit_s": idle_exit_s,
            "engine.device": device,
            "engine.precision": precision,
        },
    )
    if replay is not None:
        raise typer.Exit(run_rebuild(config, name, replay))
    raise typer.Exit(run_stream(config, name, metrics, as_json))


@app.command("check-mapping", epilog="Example: plinth check-mapping finance sample.jsonl")
def check_mapping(
    name: Annotated[str, typer.Argument(metavar="VERTICAL", help="Who reads the records.")],
    samples: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="Messages: JSON, one a line (.gz is read), or one of Avro or Protobuf a file. "
            "Without: the newest of the input topic.",
        ),
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="TOML file.", show_default="stream.mapping")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the records, as training and backtest read them."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Messages to read from the topic.")] = 1_000,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a declared mapping makes of your messages: each field, and what is wrong."""
    from plinth.pipelines.cli.kafka.check_mapping import Options, run_check_mapping

    options = Options(samples or [], mapping, out, count, as_json)
    raise typer.Exit(run_check_mapping(_load(config_file), name, options))


@app.command(epilog="Example: plinth batch medical ./studies --out ./results")
def batch(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VERTICAL] [FOLDER]",
            help="Who reads which folder; one word is the folder. Defaults: batch.vertical, else "
            "the only vertical that reads folders; batch.input.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    config_file: ConfigOption = None,
    workers: Annotated[int | None, typer.Option(help="Items inferred at the same time.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that take items whole; 0: threads of this one.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Skip what is done.", show_default="resume"),
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Run failed items again.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A network of your own, for a vertical that takes one (medical)."),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Analyse every item below a folder; run it again to go on where it was stopped.

    Outputs are in OUT/<item>/, the journal in OUT/journal.jsonl, failures in OUT/failed.jsonl.
    """
    from plinth.pipelines.folders.early import begin
    from plinth.pipelines.interpreter import one_heap

    one_heap()
    # Before all that is imported here: what forks worker processes imports the same beside it.
    early = begin(what[0] if what and len(what) > 1 else None) if processes else None
    from plinth.pipelines.cli.runs import batch_words, only_folder_vertical, run_batch

    vertical, folder = batch_words(what or [])
    if model is not None and vertical is None:
        vertical = only_folder_vertical()
    config = _load(
        config_file,
        **{
            "batch.input": folder,
            "batch.output": out,
            "batch.vertical": vertical,
            "batch.workers": workers,
            "batch.processes": processes,
            "batch.resume": resume,
            "batch.retry_failed": retry_failed,
            f"verticals.{vertical}.network.model": model,
            "engine.device": device,
            "engine.precision": precision,
        },
    )
    raise typer.Exit(run_batch(config, as_json, early))


@app.command(
    epilog="Example: plinth backtest finance history.jsonl --set rules=new-rules.toml --set "
    "review_threshold=0.05"
)
def backtest(
    name: Annotated[str, typer.Argument(metavar="VERTICAL", help="Who reads the records.")],
    history: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Records, one JSON object a line, in the order in which they came; .gz is read.",
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the vertical to try; may be repeated."
        ),
    ] = None,
    then_config: Annotated[
        Path | None, typer.Option("--then", help="A whole config file to try.")
    ] = None,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What would other settings have decided? Answers a history twice and compares."""
    from plinth.pipelines.cli.backtest import run_backtest, settings_to_try

    now = _load(config_file)
    then = _load(then_config or config_file, **settings_to_try(name, changes or []))
    raise typer.Exit(run_backtest(now, then, name, history, as_json))


@app.command(epilog="Example: plinth demo --out ./demo-out --events 20000")
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")] = Path(
        "demo-out"
    ),
    events: Annotated[int, typer.Option(min=1, help="Transactions to stream.")] = 20_000,
    rate: Annotated[float, typer.Option(min=1, help="Transactions a second.")] = 1_000.0,
) -> None:
    """Show it all in under three minutes: a Kafka stream of payments, then a CT study."""
    from plinth.pipelines.cli.demo import run

    raise typer.Exit(run(out, events, rate))


def _load(config_file: Path | None, **overrides: Any) -> Config:
    from plinth.pipelines.config.settings import load

    return load(config_file, overrides=overrides)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run, and show any error as one panel instead of a traceback.

    Args:
        arguments: of the command line; those of the process by default.

    Raises:
        SystemExit: always, with the exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    try:
        app(given, prog_name="plinth")
    except Exception as error:  # noqa: BLE001 - the last resort, every error is shown
        if debug:
            traceback.print_exc()
        raise SystemExit(_explain(error, debug)) from None


def _explain(error: Exception, debug: bool) -> int:
    from plinth.engine.errors import ConfigError, PlinthError

    if isinstance(error, PlinthError):
        show_error(error.message, error.hint)
        return USAGE if isinstance(error, ConfigError) else FAILED
    if isinstance(error, ModuleNotFoundError):
        show_error(
            f"the module {error.name!r} is not installed",
            install_hint(error.name or ""),
        )
        return USAGE
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(at.filename).name}:{at.lineno}"
    hint = None if debug else "this is a fault in the software; --debug shows all of it"
    show_error(f"unexpected {type(error).__name__} in {where}", hint)  # its text may be private
    return FAILED


if __name__ == "__main__":
    main()
