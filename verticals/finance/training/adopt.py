"""A version of given weights: those of a compressed variant, or a version's own, on newer payments.

Nothing is trained. The newest week whose labels are due is the test; the model is calibrated and
gets its thresholds on the week before. Neither may hold payments that the weights were trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plinth.engine import ConfigError, ModelError, ModelSpec, ModelStore
from plinth.engine.compression.training import Compressed
from plinth.verticals.finance.features.columns import Columns, definitions
from plinth.verticals.finance.features.timeline import ALWAYS, NEVER
from plinth.verticals.finance.succession.champion import NAME, WINDOW
from plinth.verticals.finance.training.derived import (
    Stored,
    facts_of,
    judge,
    scorer,
    settle,
    week_of,
)
from plinth.verticals.finance.training.history import FIRST_RECORDED, WEEK, Data
from plinth.verticals.finance.training.quality import check_thresholds
from plinth.verticals.finance.training.retrain import keep_champion

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adoption:
    """Which weights become a version.

    Args:
        variant: of ``fraud``; ``None``: the weights of the version itself.
        base: the version that has them; ``None``: the newest.
        version: to write.
        source: where it comes from, for the manifest.
        label_days: after so many a payment without a label is genuine.
        alert_budget: cards per day that people can look at; sets the review threshold.
        decline_cost: base currency lost by refusing a genuine payment.
    """

    variant: str | None
    base: str | None
    version: str
    source: str
    label_days: int = WEEK
    alert_budget: int = 100
    decline_cost: float = 50.0

    def __post_init__(self) -> None:
        check_thresholds(self.alert_budget, self.decline_cost)


def adopt(data: Data, store: Path, wanted: Adoption) -> list[ModelSpec]:
    """Store weights as a version of their own; what answers stays what it is.

    The cheaper variant of the version goes along, measured on the same weeks.

    Raises:
        ConfigError: the history is too short, was trained on, or a week of it has no fraud.
        ModelError: there is no such variant, it has no weights, or the version is there already.
    """
    models = ModelStore(store)
    base = models.verify(NAME, wanted.base)
    parts = [(base, wanted.variant)]
    if base.cheaper:
        own = base.version if base.version in models.versions(base.cheaper) else None
        parts.append((models.verify(base.cheaper, own), None))
    known = [models.facts(spec.name, spec.version) for spec, _ in parts]
    first = data.days - 2 - wanted.label_days - 2 * WEEK + 1
    windows = [_window(facts) for facts in known]
    _check(data, first, max(until for _, until in windows))

    columns = Columns.of(data.features, known[0], f"{NAME} {base.version}")
    seen = {name: definitions(data.features)[name] for name in columns.names}
    data = replace(data, rows=columns.seen(data.rows))
    week = week_of(data, first, known_from=first - WEEK)
    test = week_of(data, first + WEEK, known_from=first - WEEK)
    recent = data.between(first, 2 * WEEK)
    used = data.table["time"][data.between(first, WEEK)]
    made = []
    for (spec, variant), (began, _) in zip(parts, windows, strict=True):
        stored = _stored(models, spec, variant)
        settled = settle(stored, data, week, wanted.alert_budget, wanted.decline_cost)
        metrics = judge(settled, data, test, wanted.alert_budget)
        told = {
            "version": wanted.version,
            "source": f"{wanted.source}; weights of {spec.name} {spec.version}",
            "metrics": {key: round(value, 6) for key, value in metrics.items()},
        }
        window = {"from": min(began, int(used[0])), "to": int(used[-1])}
        facts = facts_of(settled.stored, data, recent, window, seen)
        made.append((spec.model_copy(update=told), settled.stored, facts))
    keep_champion(store)
    for spec, network, facts in reversed(made):  # the cheaper one first: it is asked for by name
        models.save(spec, network, facts=facts)
    return [spec for spec, _, _ in made]


def _stored(models: ModelStore, spec: ModelSpec, variant: str | None) -> Stored:
    found = models.network(spec.name, spec.version, variant)
    return found if isinstance(found, Compressed) else scorer(found)


def _window(facts: Mapping[str, Any]) -> tuple[int, int]:
    """From when to when payments were that a version was made from; nothing where it is not told.

    Raises:
        ModelError: it says no times.
    """
    window = facts.get(WINDOW)
    if window is None:
        log.warning(
            "the store does not say which payments the weights were trained on: if these are among "
            "them, thresholds and quality are too good"
        )
        return ALWAYS, NEVER
    match window:
        case {"from": int(began), "to": int(until)}:
            return began, until
    raise ModelError(f"{WINDOW}: expected times in milliseconds", hint="train it again")


def _check(data: Data, first: int, until: int) -> None:
    """See that two weeks are there that the weights were not trained on.

    Raises:
        ConfigError: they are not.
    """
    if first < FIRST_RECORDED:
        raise ConfigError(
            f"there are {data.days} days of payments, {data.days + FIRST_RECORDED - first} are "
            "needed",
            hint=f"{FIRST_RECORDED} fill the windows of the features; bring more",
        )
    if data.start(first) <= until:
        day = f"{datetime.fromtimestamp(until / 1e3, UTC):%Y-%m-%d}"
        raise ConfigError(
            f"the weights were made from payments up to {day}; two weeks after it are needed, "
            "whose labels are due",
            hint="bring newer payments; plinth finance retrain needs none and packs what it trains",
        )
