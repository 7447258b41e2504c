"""``plinth plan``: how many lanes does it take?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: plinth plan --rate 2000 --deadline 150 --background '300 studies/night' "
    "--costs costs.toml --lanes 1..16\n\n"
    "Exit codes: 0 some number of lanes holds · 1 none does · 2 an argument is wrong."
)


def plan(
    deadline: Annotated[float, typer.Option(min=0.01, help="Of a request, milliseconds.")],
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second, Poisson arrivals.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="CSV file of arrival times in seconds, in place of --rate.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Work without a deadline, such as '300 studies/night'.")
    ] = None,
    lanes: Annotated[str, typer.Option(help="Numbers of lanes to try, such as 4 or 1..16.")] = (
        "1..8"
    ),
    costs: Annotated[
        Path | None,
        typer.Option(
            help="What batches cost: a TOML table, or the JSON that an engine has measured.",
            show_default="engine.latency_file",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model's costs in the engine's file are the requests'.")
    ] = None,
    study_model: Annotated[
        str | None, typer.Option(help="Which model's are those of the background work.")
    ] = None,
    study_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows, or windows, of one background job.")
    ] = None,
    outside: Annotated[
        Path | None,
        typer.Option(
            help="What requests take beside their batches: the JSON of plinth benchmark URL --json."
        ),
    ] = None,
    quantile: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Share of requests to be in time.")
    ] = 0.99,
    night_hours: Annotated[float, typer.Option(min=0.1, max=24, help="Hours of a night.")] = 8.0,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Virtual time to try each number of lanes for.")
    ] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and delays.")] = 7,
    plot: Annotated[Path | None, typer.Option(help="Where to draw it, .png.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say how many lanes hold a load: the batcher that serves, in virtual time.

    Costs are those of the lanes alone; what a request takes beside them comes on top: --outside.
    """
    from plinth.engine.errors import ConfigError
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.console import FAILED, need_matplotlib, show_json
    from plinth.pipelines.plan import report
    from plinth.pipelines.plan.demand import (
        parse_lanes,
        parse_patient,
        read_costs,
        read_outside,
        read_trace,
    )
    from plinth.pipelines.plan.planner import Question
    from plinth.pipelines.plan.planner import plan as planned

    if (rate is None) == (trace is None):
        raise ConfigError("--rate and --trace: expected one of them", hint="give requests a second")
    if costs is None:
        settings = load(config)
        file = settings.engine.latency_file
        if file is None:
            raise ConfigError(
                "there is no table of costs", hint="give --costs, or set engine.latency_file"
            )
        costs = settings.beside(file)
    requests = {} if outside is None else {"outside": read_outside(outside)}
    patient = None if background is None else parse_patient(background, night_hours)
    table = read_costs(costs, model, study_model, study_rows)
    table = table.model_copy(update={"urgent": table.urgent.model_copy(update=requests)})
    if patient is not None and table.background is None:
        raise ConfigError(
            f"{costs} has no costs of background work",
            hint="add a table [background], or name its --study-model",
        )
    arrivals = None if trace is None else read_trace(trace)
    offered = rate if arrivals is None else len(arrivals) / float(arrivals[-1])
    question = Question(
        table, deadline / 1e3, offered or 0.0, quantile, arrivals, patient, seconds, seed
    )
    if plot is not None:
        need_matplotlib()
    found = planned(question, parse_lanes(lanes))
    if plot is not None:
        report.draw(plot, found, question)
    if as_json:
        show_json(found.as_dict())
    else:
        report.show(found, question)
    if found.needed is None:
        raise typer.Exit(FAILED)
