"""``plinth finance backtest``: what rules would have stopped on a history, before they go live."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.engine import ConfigError, InputError, Sla
from plinth.pipelines.assembly import running
from plinth.pipelines.config.settings import Config
from plinth.pipelines.console import say, show_json, show_table
from plinth.pipelines.lines import Refusals, numbered, opened
from plinth.pipelines.live.tables import settings_of
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.schema import is_label
from plinth.verticals.finance.tally import RuleTally, Stopped

_CHUNK = 256
_LIMITS = ("hard_amount", "max_card_count_5m", "max_device_cards_24h")


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried on what.

    Args:
        rules: TOML file of rules.
        history: files of records, in the order in which they came.
        label_days: a payment this old without a label is genuine.
    """

    rules: Path
    history: Sequence[Path]
    label_days: float


def run_rule_backtest(config: Config, trial: Trial, as_json: bool) -> None:
    """Answer a history with rules in place of those in force; tell what each would have stopped.

    Args:
        config: all other settings.
        trial: the rules and the history.
        as_json: print JSON, no table.

    Raises:
        ConfigError: the rules are wrong (names file, rule and field), or a file cannot be read.
    """
    vertical = FraudScoring(_settings(config, trial.rules))
    tally = RuleTally(vertical.rules, vertical.variants[0].review, trial.label_days)
    vertical.watch = tally.see
    refusals = Refusals()
    with running(config, {vertical.name: vertical}) as engine:
        for lines in _chunks(trial.history):
            read = [(where, _read(vertical, raw)) for where, raw in lines]
            taken = [(where, one) for where, one in read if not isinstance(one, InputError)]
            requests = [one for _, one in taken]
            results = engine.run(vertical.infer(requests), Sla()).value if requests else []
            for where, one in read:
                if isinstance(one, InputError):
                    refusals.note(where, one)
            for (where, request), result in zip(taken, results, strict=True):
                if isinstance(result, InputError):
                    refusals.note(where, result)
                elif is_label(request):
                    tally.note(request)
    known = tally.known()
    if not known["payments"]:
        raise ConfigError(
            "\n".join(["the history holds no payment", *refusals.told()]),
            hint="one JSON object a line",
        )
    _show(vertical, tally, {**known, "refused": refusals.counts.total()}, as_json)
    for line in refusals.told():
        say(line)
    if refusals.counts["unknown_payment"]:
        say(
            "labels that come before their payments are not used, and those payments count as "
            "genuine: bring the history in the order in which it came"
        )


def _settings(config: Config, rules: Path) -> FraudSettings:
    table = config.vertical("finance")
    kept = {name: value for name, value in table.settings.items() if name not in _LIMITS}
    tried = table.model_copy(update={"settings": {**kept, "rules": str(rules.resolve())}})
    verticals = {**config.verticals, "finance": tried}
    settings, _ = settings_of(
        config.model_copy(update={"verticals": verticals}), "finance", FraudSettings
    )
    assert isinstance(settings, FraudSettings)
    return settings


def _chunks(history: Sequence[Path]) -> Iterator[list[tuple[str, bytes]]]:
    for path in history:
        with opened(path) as file:
            lines = numbered(path, file)
            while chunk := list(itertools.islice(lines, _CHUNK)):
                yield chunk


def _read(vertical: FraudScoring, raw: bytes) -> Any:
    try:
        return vertical.parse_at(raw, None)
    except InputError as error:
        return error


def _show(vertical: FraudScoring, tally: RuleTally, known: dict[str, float], as_json: bool) -> None:
    figures = tally.figures()
    rules = {rule.code: rule for rule in vertical.rules.rules}
    if as_json:
        told = {name: _clean(one) for name, one in figures.items()}
        for code, rule in rules.items():
            told[code] |= {"action": rule.action, "shadow": rule.shadow, "when": rule.when}
        about = {"rules_version": vertical.rules.version, "model": vertical.variants[0].version}
        show_json({**about, "history": known, "stopped": told})
        return
    stopped, frauds = [], []
    for name, one in figures.items():
        found = rules.get(name)
        action = "" if found is None else found.action + (" (shadow)" if found.shadow else "")
        counts = f"{one.payments:,}", f"{one.payments_per_day:,.1f}", f"{one.amount:,.2f}"
        stopped.append((name, action, *counts, f"{one.alone:,}"))
        shares = _share(one.precision), _share(one.recall), _share(one.recall_of_amount)
        amount = f"{one.amount_of_frauds:,.2f}"
        frauds.append((name, f"{one.frauds:,}", amount, f"{one.genuine:,}", *shares))
    counted = "", "action", "stopped", "a day", "amount", "by nothing else"
    show_table("What would have been stopped", counted, stopped)
    known_of = "", "frauds", "amount", "genuine", "precision", "recall", "of amount"
    show_table("Of what is known", known_of, frauds)
    say(
        f"{known['payments']:,} payments over {known['days']:.1f} days, {known['frauds']:,} known "
        f"frauds of {known['amount_of_frauds']:,.2f}, {known['refused']:,} records refused"
    )


def _clean(one: Stopped) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in one._asdict().items()
    }


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"
