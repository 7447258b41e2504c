"""``plinth metrics``: rules and alerts for Prometheus, and a dashboard for Grafana."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plinth.pipelines.console import show_json

if TYPE_CHECKING:
    from plinth.pipelines.config.settings import Config
    from plinth.pipelines.observability.rules import Promise

metrics = typer.Typer(
    help="Write rules for Prometheus and a dashboard for Grafana.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@metrics.command(epilog="Example: plinth metrics rules finance > plinth-rules.yml")
def rules(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VERTICAL]...", help="Which verticals; default: those in the file, else all."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    job: Annotated[str, typer.Option(help="Name of the scrape job.")] = "plinth",
) -> None:
    """Write recording rules and alerts for the promises of the config; JSON, which is YAML too."""
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.observability.rules import rules as written

    show_json(written(promises_of(load(config), names or []), job))


@metrics.command(epilog="Example: plinth metrics dashboard > plinth.json")
def dashboard() -> None:
    """Write a dashboard, to be imported into Grafana."""
    from plinth.pipelines.observability.dashboard import dashboard as written

    show_json(written())


def promises_of(config: Config, names: list[str]) -> list[Promise]:
    """What the verticals promise: of each record route, and of each model.

    Raises:
        ConfigError: a vertical is not installed, or its settings are wrong.
    """
    from plinth.pipelines.assembly import load_verticals, models_of, sla_of
    from plinth.pipelines.observability.rules import of_model, of_route, of_shared_model

    found: list[Promise] = []
    models: dict[str, set[tuple[float | None, float]]] = {}
    for name, vertical in load_verticals(config, names).items():
        sla = sla_of(vertical, config)
        seconds = None if sla.deadline_ms is None else sla.deadline_ms / 1e3
        if seconds is not None and vertical.request is not None:
            route = f"/v1/{name}/{vertical.action}"
            found.append(of_route(name, route, seconds, sla.quantile))
        for model in models_of(vertical, config):
            models.setdefault(model.spec.name, set()).add((seconds, sla.quantile))
    for shared, promises in models.items():
        kept = [objective for seconds, objective in promises if seconds is not None]
        [(seconds, objective), *others] = promises
        if others and kept:
            found.append(of_shared_model(shared, max(kept)))
        elif seconds is not None:
            found.append(of_model(shared, seconds, objective))
    return found
