"""``plinth finance``: compare, promote and roll back versions of the fraud model."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.console import FAILED, say, show_json, show_table

if TYPE_CHECKING:
    from plinth.verticals.finance.settings import FraudSettings
    from plinth.verticals.finance.succession.champion import Champion

finance = typer.Typer(
    help="Versions of the fraud model: which one answers, and which comes next.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; default ./plinth.toml if there.")
]
HistoryArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE|FOLDER...",
        help="Transactions and labels, JSON lines or .gz, in any order; of a folder all.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]


@finance.command(epilog="Example: plinth finance compare --json")
def compare(config_file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The challenger beside the champion, as the process that serves them last wrote it down.

    Exit code 1: the written rule does not hold, or there is none.
    """
    champion = _champion(_settings(config_file))
    found = _report(champion)
    last = champion.decisions()[-10:]
    if as_json:
        show_json({**found, "decisions": last})
    else:
        show_table(
            f"{found['challenger']} beside {found['champion']}",
            ("measure", "value"),
            [(name, f"{value:,.6g}") for name, value in found["figures"].items()],
        )
        for line in found["unmet"]:
            say(f"not yet: {line}")
        if last:
            rows = [(one.get("time"), one["from"], one["to"], one["by"]) for one in last]
            show_table("Decisions", ("time", "from", "to", "by"), rows)
    if found["unmet"] or found["rule"] is None:
        raise typer.Exit(FAILED)


@finance.command(epilog="Example: plinth finance promote 2.0.0")
def promote(
    version: Annotated[str, typer.Argument(help="Of the model fraud in the store.")],
    config_file: ConfigOption = None,
) -> None:
    """Let a version answer; processes that follow the store take it up within seconds."""
    champion = _champion(_settings(config_file))
    now = champion.version() or _newest(champion)
    why = _why(champion, version)
    champion.promote(version, by="hand", champion=now, why=why)
    say(f"fraud: {now} -> {version}")


@finance.command(epilog="Example: plinth finance rollback")
def rollback(config_file: ConfigOption = None) -> None:
    """Let the version answer again that did before; the other one is no challenger any more."""
    before, now = _champion(_settings(config_file)).roll_back()
    say(f"fraud: {before} -> {now}")


@finance.command(epilog="Example: plinth finance retrain history/ --every 1h")
def retrain(
    history: HistoryArgument,
    every: Annotated[
        str | None, typer.Option(help="Again and again: 30m, 1h, 1d. Without: once.")
    ] = None,
    days: Annotated[int, typer.Option(min=7, help="Of the window.")] = 21,
    label_days: Annotated[int, typer.Option(min=0, help="That labels take.")] = 7,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the window.")] = 8,
    alert_budget: Annotated[int, typer.Option(min=1, help="Cards per day to look at.")] = 100,
    decline_cost: Annotated[float, typer.Option(help="Base currency, of a mistake.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    trees: Annotated[
        bool | None,
        typer.Option(
            "--trees/--no-trees",
            help="Boosted ones beside the network.",
            show_default="where LightGBM is installed",
        ),
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Train the next version on the newest days whose labels are due; what answers stays.

    The version goes into the store, where challenger = "newest" finds it.
    """
    from plinth.pipelines.cli.finance.retraining import seconds_of, train_on, train_once
    from plinth.verticals.finance.training.boosting import at_hand
    from plinth.verticals.finance.training.retrain import Plan

    seconds = None if every is None else seconds_of(every)
    grown = at_hand() if trees is None else trees
    plan = Plan(days, label_days, epochs, alert_budget, decline_cost, seed, grown)
    settings = _settings(config_file)
    if seconds is None:
        train_once(settings, history, plan)
    else:
        train_on(settings, history, plan, seconds, threading.Event())


@finance.command(epilog="Example: plinth finance rows history/ --out rows.npz")
def rows(
    history: HistoryArgument,
    out: Annotated[Path, typer.Option(help="The file to write, .npz.")],
    days: Annotated[int, typer.Option(min=1, help="The newest ones whose labels are due.")] = 21,
    label_days: Annotated[int, typer.Option(min=0, help="That labels take.")] = 7,
    config_file: ConfigOption = None,
) -> None:
    """Write the features of past payments and their labels, as plinth compress takes them."""
    from plinth.pipelines.cli.finance.adopting import write_rows

    write_rows(_settings(config_file), history, out, days, label_days)


@finance.command(epilog="Example: plinth finance adopt packed-70-pruned-int4 history/")
def adopt(
    weights: Annotated[
        str,
        typer.Argument(
            help="A variant that plinth compress made, or 'reference': the version's own weights."
        ),
    ],
    history: HistoryArgument,
    base: Annotated[
        str | None, typer.Option("--of", help="Version that has them; default: the newest.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="To write.", show_default="the time")] = None,
    label_days: Annotated[int, typer.Option(min=0, help="That labels take.")] = 7,
    alert_budget: Annotated[int, typer.Option(min=1, help="Cards per day to look at.")] = 100,
    decline_cost: Annotated[float, typer.Option(help="Base currency, of a mistake.")] = 50.0,
    config_file: ConfigOption = None,
) -> None:
    """Make weights a version of their own; what answers stays.

    Calibration, thresholds, quality and what drift is held against are found anew, on the newest
    two weeks whose labels are due. Nothing is trained.
    """
    from plinth.pipelines.cli.finance.adopting import adopt_weights
    from plinth.verticals.finance.training.adopt import Adoption

    variant = None if weights == "reference" else weights
    words = f"plinth finance adopt {weights}" + (f" --of {base}" if base else "")
    aims = label_days, alert_budget, decline_cost
    wanted = Adoption(variant, base, version or "", words, *aims)
    adopt_weights(_settings(config_file), history, wanted)


@finance.command(epilog="Example: plinth finance backtest rules.toml --history history.jsonl.gz")
def backtest(
    rules: Annotated[Path, typer.Argument(help="TOML file of rules to try.")],
    history: Annotated[
        list[Path],
        typer.Option(
            help="Transactions and labels, one a line, in the order in which they came; .gz is "
            "read. May be repeated."
        ),
    ],
    label_days: Annotated[
        float, typer.Option(min=0, max=366, help="After which a payment without one is genuine.")
    ] = 7.0,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What rules would have stopped: payments, money, precision, recall, rule by rule."""
    from plinth.pipelines.cli.finance.rule_backtest import Trial, run_rule_backtest
    from plinth.pipelines.config.settings import load

    run_rule_backtest(load(config_file), Trial(rules, history, label_days), as_json)


def _settings(config_file: Path | None) -> FraudSettings:
    from plinth.engine import ConfigError
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.live.tables import settings_of
    from plinth.verticals.finance.settings import FraudSettings

    settings, _ = settings_of(load(config_file), "finance", FraudSettings)
    assert isinstance(settings, FraudSettings)
    if settings.model_version is not None:
        raise ConfigError(
            f"verticals.finance.model_version pins the champion to {settings.model_version}",
            hint="take it out of the config, so that the store says which version answers",
        )
    return settings


def _champion(settings: FraudSettings) -> Champion:
    from plinth.verticals.finance.settings import STORE
    from plinth.verticals.finance.succession.champion import Champion

    return Champion(settings.store or STORE)


def _newest(champion: Champion) -> str:
    from plinth.engine import ModelStore
    from plinth.verticals.finance.succession.champion import NAME

    return ModelStore(champion.store).verify(NAME).version


def _report(champion: Champion) -> dict[str, Any]:
    from plinth.engine import ConfigError
    from plinth.verticals.finance.succession.champion import NAME
    from plinth.verticals.finance.versions import REPORT

    path = champion.store / NAME / REPORT
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {path}: no challenger has scored anything yet",
            hint='set challenger = "newest" in [verticals.finance]; plinth serve or plinth stream '
            "writes it about every ten seconds",
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return found


def _why(champion: Champion, version: str) -> Mapping[str, Any] | None:
    """What was known of a version when it was promoted by hand."""
    from plinth.engine import ConfigError

    try:
        found = _report(champion)
    except ConfigError:
        return None
    return {"figures": found["figures"]} if found.get("challenger") == version else None
