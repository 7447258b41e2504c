"""``plinth benchmark``: how fast is it, and what is the highest rate that holds the promise?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: plinth benchmark finance --seconds 5\n\n"
    "Example: plinth benchmark finance --scenario server --rate 500 --sla-ms 20\n\n"
    "Example: plinth benchmark http://127.0.0.1:8000/v1/finance/score --sla-ms 50 --plot rates.png"
    "\n\n"
    "Example: plinth benchmark model:fraud --scenario offline --json\n\n"
    "Exit codes: 0 the promise holds, at --rate or at some rate, and every scenario is valid · "
    "1 it does not, or one is not · 2 a setting or argument is wrong."
)


IN_PROCESS, HTTP = "In process", "Over HTTP"


def benchmark(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A vertical or model:NAME\\[@VERSION], measured in this process by LoadGen; or "
            "the URL of an endpoint of any HTTP server.",
        ),
    ],
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=IN_PROCESS,
            help="single_stream (latency of lone requests), offline (throughput), "
            "server (rate under a deadline). Repeat it for several.",
            show_default="all three",
        ),
    ] = None,
    sla_ms: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="The promise, ms from when a request is due to its whole answer.",
            show_default="the vertical's own",
        ),
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=0.9999, help="Share of requests it must hold for.", show_default="0.99"
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Measure this rate only, requests per second.",
            show_default="search for the highest that holds",
        ),
    ] = None,
    start_rate: Annotated[
        float, typer.Option(min=0.001, help="Where the search begins; it doubles from there.")
    ] = 50.0,
    max_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Where it ends.", show_default="none")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.05,
            help="Length of one run; longer at low rates, until there are enough requests.",
        ),
    ] = 10.0,
    repeats: Annotated[
        int, typer.Option(min=1, max=100, help="Most runs at one rate until it is clear.")
    ] = 3,
    confirm: Annotated[
        int, typer.Option(min=0, max=100, help="Runs with new arrivals that confirm the answer.")
    ] = 2,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="With which a rate must be shown to hold.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and samples.")] = 0,
    body: Annotated[
        list[Path] | None,
        typer.Option(
            help="What to send: a file, one request a line if it is .jsonl; or a folder, for a "
            "vertical that reads folders. Repeat it for several, sent in turn.",
            show_default="the example of the vertical, or of the server's API docs",
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=HTTP, help="'Name: value'; its value is not recorded."),
    ] = None,
    content_type: Annotated[
        str, typer.Option(rich_help_panel=HTTP, help="Of the bodies.")
    ] = "application/json",
    method: Annotated[str, typer.Option(rich_help_panel=HTTP, help="The HTTP method.")] = "POST",
    connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=50_000,
            rich_help_panel=HTTP,
            help="Kept open, one request at a time on each.",
            show_default="2 x rate x SLA, from 16 to 768",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, max=256, rich_help_panel=HTTP, help="Client processes, when one is too slow."
        ),
    ] = 1,
    timeout: Annotated[
        float,
        typer.Option(min=0.001, rich_help_panel=HTTP, help="Seconds until a request is given up."),
    ] = 10.0,
    warm_up: Annotated[
        float,
        typer.Option(
            min=0.0, rich_help_panel=HTTP, help="Seconds of load before each run, not counted."
        ),
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency over rate into this file (PNG, SVG, PDF).")
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=IN_PROCESS, help="Folder for LoadGen's logs of each scenario."
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML file; default ./plinth.toml if there."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=IN_PROCESS, help="As in the config.", show_default="that of the config"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=IN_PROCESS, help="As in the config.", show_default="that of the config"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure latency and throughput, and find the highest rate that holds the promise.

    In process, MLPerf's LoadGen asks the engine directly; the figures are LoadGen-based, no
    MLPerf scores. Over HTTP, requests come as a Poisson process whether or not the server is
    ready, and each latency runs from when its request was due, so a stall counts for every
    request that fell into it. What is refused or lost is not in time.

    A rate holds when its runs together show, with the given confidence, that the promised share
    of the requests is in time. The search doubles the rate until it does not hold, halves the
    gap down to 5 %, and runs the best again. The machine and its load are recorded.
    """
    from plinth.pipelines.bench.run import Options, run

    options = Options(
        target=target,
        scenarios=tuple(scenario or ()),
        sla_ms=sla_ms,
        quantile=quantile,
        rate=rate,
        start_rate=start_rate,
        max_rate=max_rate,
        seconds=seconds,
        repeats=repeats,
        confirm=confirm,
        confidence=confidence,
        seed=seed,
        bodies=tuple(body or ()),
        headers=tuple(header or ()),
        content_type=content_type,
        method=method,
        connections=connections,
        processes=processes,
        timeout=timeout,
        warm_up=warm_up,
        plot=plot,
        logs=logs,
        config_file=config_file,
        device=device,
        precision=precision,
    )
    raise typer.Exit(run(options, as_json))
