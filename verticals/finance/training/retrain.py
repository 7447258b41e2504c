"""The next version of the models, from the newest payments whose labels are due.

The window ends at the newest usable day: the last but one of the history (the last may be cut off)
less the days that labels take. A fifth of the cards is held out of it, for calibration, thresholds
and the reference of drift. What the versions are worth is measured by the same procedure done
earlier: trained up to then on the labels that were known when the test begins, days in which labels
are not known yet, a week of test that ends at the newest usable day.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plinth.engine import ConfigError, ModelSpec, ModelStore
from plinth.verticals.finance.features.columns import definitions
from plinth.verticals.finance.succession.champion import NAME, Champion
from plinth.verticals.finance.training.derived import (
    Quality,
    Settled,
    facts_of,
    score,
    scorer,
    settle,
)
from plinth.verticals.finance.training.history import FIRST_RECORDED, WEEK, Data, Rows
from plinth.verticals.finance.training.quality import check_thresholds, measure
from plinth.verticals.finance.training.train import Recipe, recipes, specification, trained

HELD_OUT = 5
"""One card in so many is held out of training."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train the next version.

    Args:
        days: of the window.
        label_days: after so many a payment without a label is genuine.
        epochs: passes over the window.
        alert_budget: cards per day that people can look at; sets the review threshold.
        decline_cost: base currency lost by refusing a genuine payment.
        seed: of weights, order and dropout.
        trees: boosted ones beside the network.
    """

    days: int = 3 * WEEK
    label_days: int = WEEK
    epochs: int = 8
    alert_budget: int = 100
    decline_cost: float = 50.0
    seed: int = 0
    trees: bool = False

    def __post_init__(self) -> None:
        check_thresholds(self.alert_budget, self.decline_cost)

    @property
    def shift(self) -> int:
        """Days by which the measured window ends earlier: those that labels take, and the test."""
        return self.label_days + WEEK

    def last(self, data: Data) -> int:
        """The newest usable day.

        Raises:
            ConfigError: the history is too short.
        """
        last = data.days - 2 - self.label_days
        first = last - self.shift - self.days + 1
        if first < FIRST_RECORDED:
            raise ConfigError(
                f"there are {data.days} days of payments, "
                f"{data.days + FIRST_RECORDED - first} are needed",
                hint=f"{FIRST_RECORDED} fill the windows of the features; bring more",
            )
        return last


class Trained(NamedTuple):
    """A calibrated model with its thresholds, and the rows that were held out."""

    settled: Settled
    held: Rows


def window_of(data: Data, plan: Plan) -> dict[str, Any]:
    """What a version trained now would be trained on; equal for equal payments and labels."""
    last = plan.last(data)
    rows = data.between(last - plan.days + 1, plan.days)
    if not len(rows):
        raise ConfigError(
            f"no payment lies in the {plan.days} days up to day {last} of the history, which has "
            f"{data.days:,} days",
            hint="is the event_time of its first or last payment right?",
        )
    times = data.table["time"][rows]
    return {
        "from": int(times[0]),
        "to": int(times[-1]),
        "payments": len(rows),
        "frauds": int(data.table["fraud"][rows].sum()),
        "digest": _digest(data, rows),
        "features": definitions(data.features),
        "plan": {name: getattr(plan, name) for name in plan.__dataclass_fields__},
    }


def _digest(data: Data, rows: Rows) -> str:
    """Of the payments and labels of some rows, as models see them."""
    made = hashlib.sha256(data.rows[rows].tobytes())
    for name in ("time", "amount", "fraud"):
        made.update(data.table[name][rows].tobytes())
    return made.hexdigest()


def retrain(
    data: Data,
    plan: Plan,
    store: Path,
    *,
    version: str,
    source: str,
    advance: Callable[[int], None],
) -> list[ModelSpec]:
    """Train, measure and store a version of each model; what answers stays what it is.

    Args:
        data: the history.
        plan: how to train.
        store: folder of the model store.
        version: to write.
        source: where it comes from, for the manifest.
        advance: told after each epoch.

    Raises:
        ConfigError: the history is too short, or the window or the test week has no fraud.
        ModelError: the version is there already.
    """
    last, window = plan.last(data), window_of(data, plan)
    made = []
    for recipe in recipes(plan.trees):
        quality = _measured(recipe, data, plan, last, advance)
        settled, held = _train(recipe, data, plan, last, advance)
        thresholds = {"review_threshold": settled.review, "decline_threshold": settled.decline}
        found = quality | thresholds
        network = scorer(settled.stored)
        spec = specification(recipe, version, source, found, data.features, network)
        facts = facts_of(settled.stored, data, held, window, definitions(data.features))
        made.append((spec, settled.stored, facts))
    keep_champion(store)
    for spec, stored, facts in reversed(made):  # the cheaper one first: it is asked for by name
        ModelStore(store).save(spec, stored, facts=facts)
    return [spec for spec, _, _ in made]


def keep_champion(store: Path) -> None:
    """Where nobody chose what answers it is the newest: let it stay, whatever is stored next."""
    champion, known = Champion(store), ModelStore(store).versions(NAME)
    if known and champion.version() is None:
        champion.promote(known[-1], by="training", champion=None)


def _train(
    recipe: Recipe, data: Data, plan: Plan, last: int, advance: Callable[[int], None]
) -> Trained:
    """A model of the window that ends at a day."""
    rows = data.between(last - plan.days + 1, plan.days)
    out = data.table["customer"][rows] % HELD_OUT == 0
    chosen, held = rows[~out], rows[out]
    for part in (chosen, held):
        if not len(part):
            raise ConfigError(
                f"the {len(rows):,} payments of the {plan.days} days up to day {last} of the "
                f"history are of too few cards: one in {HELD_OUT} is held out of training",
                hint="bring the payments of all cards",
            )
        fraud = data.table["fraud"][part]
        if fraud.any() and fraud.all():
            raise ConfigError(
                f"all {len(part):,} payments of the {plan.days} days up to day {last} of the "
                "history, or of a fifth of their cards, are frauds: genuine ones are needed",
                hint="bring all payments, not those with labels alone",
            )
        if not fraud.any():
            raise ConfigError(
                f"the {plan.days} days up to day {last} of the history have too few fraud labels "
                f"that came within {plan.label_days} days",
                hint="bring the labels, a longer window (--days), or say how many days they take "
                "(--label-days)",
            )
    stored = trained(recipe, data, chosen, epochs=plan.epochs, seed=plan.seed, advance=advance)
    budget = max(1, round(plan.alert_budget / HELD_OUT))
    return Trained(settle(stored, data, held, budget, plan.decline_cost), held)


def _measured(
    recipe: Recipe, data: Data, plan: Plan, last: int, advance: Callable[[int], None]
) -> Quality:
    """What the procedure gives in the week up to the last day, done with what was known before.

    Args:
        last: the newest usable day.
    """
    first, end = last - WEEK + 1, last - plan.shift
    before = data.as_known(data.start(first))
    settled, _ = _train(recipe, before, plan, end, advance)
    test = data.test(first, known_from=end - plan.days + 1)
    fraud = data.table["fraud"][test]
    if not 0 < int(fraud.sum()) < len(fraud):
        raise ConfigError(
            f"the week from day {first} of the history on has {int(fraud.sum()):,} frauds in "
            f"{len(fraud):,} payments with cards not known as defrauded before; both kinds are "
            "needed",
            hint="do labels come? see plinth_finance_missing_label_share",
        )
    scores = score(scorer(settled.stored), data, test)
    return {
        **measure(scores, data, test, plan.alert_budget),
        "alert_share": float(np.mean(scores >= settled.review)),
        "review_recall": float(np.mean(scores[fraud] >= settled.review)),
        "decline_recall": float(np.mean(scores[fraud] >= settled.decline)),
    }
