"""Train, calibrate, measure and store the fraud models, on simulated or recorded payments.

``python -m plinth.verticals.finance.training.train --seed 0 --trees --version 1.2.0``

Protocol (Fraud Detection Handbook, chapter 5): 7 days of training, 7 days in which labels are
not known yet, 7 days of test; four such folds a week apart. Cards
known as defrauded leave the test days. The stored model trains on 21 days, is calibrated and
gets its thresholds on the week after the delay, and is tested on the week after that.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Sheet
from torch import Tensor, nn
from torch.nn import functional

from plinth.engine import ConfigError, ModelSpec, ModelStore, PlinthError, TensorSpec
from plinth.verticals.finance.features.columns import definitions
from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.features.program import STANDARD, Program, compiled
from plinth.verticals.finance.model import BLOCK, FraudEnsemble, FraudScorer, fraud_lite, fraud_mlp
from plinth.verticals.finance.training.boosting import at_hand, with_trees
from plinth.verticals.finance.training.derived import (
    Quality,
    Stored,
    facts_of,
    judge,
    pack,
    score,
    scorer,
    settle,
    week_of,
)
from plinth.verticals.finance.training.history import (
    FIRST_RECORDED,
    WEEK,
    Data,
    Rows,
    recorded,
    simulated,
)
from plinth.verticals.finance.training.quality import check_thresholds, measure
from plinth.verticals.finance.training.simulator import Population

COMMAND = "python -m plinth.verticals.finance.training.train"

Read = Callable[[Callable[[int], None]], Data]
"""Gives the payments; is passed what it tells its progress to."""
FOLDS = 4
SIMULATED = Population(days=160)
FIRST_SIMULATED = 115
CHUNK = 1 << 16
MOST_STEPS = 50
"""Of Newton's method; about ten are taken."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train.

    Args:
        first_day: first training day of the first fold; the days before fill the windows.
        final_days: training days of the stored model.
        epochs: passes over a fold's 7 days.
        alert_budget: cards per day that people can look at; sets the review threshold.
        decline_cost: EUR lost by refusing a genuine payment; sets the decline threshold.
        trees: boosted ones beside the network.
    """

    first_day: int = FIRST_SIMULATED
    final_days: int = 3 * WEEK
    epochs: int = 12
    alert_budget: int = 100
    decline_cost: float = 50.0
    trees: bool = False

    def __post_init__(self) -> None:
        check_thresholds(self.alert_budget, self.decline_cost)

    @property
    def days(self) -> int:
        """How many days of payments are needed."""
        return self.first_day + max(self.final_days + 3 * WEEK, (FOLDS + 2) * WEEK)

    def ending(self, data: Data) -> Plan:
        """The same up to the newest days whose labels are due; the last day may be cut off."""
        return replace(
            self, first_day=max(self.first_day, data.days - 1 - WEEK - self.days + self.first_day)
        )

    def check(self, data: Data) -> None:
        """See that there is enough to train and to measure on.

        Raises:
            ConfigError: too few days, or a week without any fraud.
        """
        if data.days < self.days:
            raise ConfigError(
                f"there are {data.days} days of payments, {self.days} are needed",
                hint="bring more, or set an earlier --first-day",
            )
        for first in range(self.first_day, self.days, WEEK):
            if not data.table["fraud"][data.between(first, WEEK)].any():
                raise ConfigError(
                    f"days {first} to {first + WEEK - 1} have no fraud labels",
                    hint="every week from --first-day on needs some",
                )


@dataclass(frozen=True, slots=True)
class Recipe:
    """One kind of model and how it is fitted; with ``trees`` boosted ones stand beside it.

    A ``convex`` one is solved for, the others are descended to at a ``rate``. ``beside_trees``
    is the config of a network that need not tell alone what the trees tell too.
    """

    name: str
    make: Callable[..., FraudScorer]
    config: dict[str, Any]
    description: str
    rate: float = 0.0
    cheaper: str | None = None
    beside_trees: dict[str, Any] | None = None
    trees: bool = False
    convex: bool = False


RECIPES = (
    Recipe(
        "fraud",
        fraud_mlp,
        {"width": 128, "blocks": 2, "dropout": 0.3},
        "Gated residual network over real-time card, terminal and customer features",
        rate=2e-3,
        cheaper="fraud-lite",
        beside_trees={"width": 64, "blocks": 1, "dropout": 0.1},
    ),
    Recipe(
        "fraud-lite",
        fraud_lite,
        {"limit": 40.0},
        "Logistic regression over the same features: the cheaper variant of fraud",
        convex=True,
    ),
)


def fit(
    recipe: Recipe,
    data: Data,
    chosen: Rows,
    *,
    epochs: int,
    seed: int,
    advance: Callable[[int], None],
) -> FraudScorer:
    """Fit a model on some rows; the same seed gives the same model.

    Args:
        recipe: what to fit.
        data: where the rows are.
        chosen: row numbers to train on.
        epochs: passes over them.
        seed: of initial weights, order and dropout.
        advance: told after each epoch.
    """
    torch.manual_seed(seed)
    model = recipe.make(features=data.rows.shape[1], **recipe.config)
    rows = torch.from_numpy(data.rows[chosen])
    truth = torch.from_numpy(data.table["fraud"][chosen]).float()[:, None]
    model.standardise.fit(rows)
    if recipe.convex:
        _solve(model, rows, truth)
        advance(epochs)
    else:
        _descend(model, rows, truth, epochs, recipe.rate, advance)
    model.eval()
    if not recipe.trees:
        return model
    return with_trees(model, data.rows[chosen], data.table["fraud"][chosen], seed)


def _descend(
    model: FraudScorer,
    rows: Tensor,
    truth: Tensor,
    epochs: int,
    rate: float,
    advance: Callable[[int], None],
) -> None:
    """Some passes over the rows in random order, in batches, the rate rising and falling once."""
    size = 512
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    steps = epochs * -(-len(rows) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(rows)).split(size):  # type: ignore[no-untyped-call]
            loss = functional.binary_cross_entropy_with_logits(
                model.logits(rows[part]), truth[part]
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        advance(1)


def _solve(model: FraudScorer, rows: Tensor, truth: Tensor) -> None:
    """The one best logistic regression: the loss is convex in its weights, so no seed matters.

    Newton's method in float64, each step halved until the loss falls; the ridge is that of
    scikit-learn's LogisticRegression with C=1. Memory is bounded: rows go by in parts.
    """
    linear = model.body
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected one linear layer, not {type(linear).__name__}")
    inputs = model.standardise(rows)
    parts = list(zip(inputs.split(CHUNK), truth.double().split(CHUNK), strict=True))  # type: ignore[no-untyped-call]

    def design(part: Tensor) -> Tensor:
        return functional.pad(part.double(), (0, 1), value=1.0)

    def loss(weights: Tensor) -> Tensor:
        found = (ridge * weights.square()).sum() / 2
        for part, true in parts:
            odds = design(part) @ weights
            found = found + (functional.softplus(odds) - true * odds).sum()
        return found

    size = linear.in_features + 1
    ridge = torch.ones(size, 1, dtype=torch.float64)
    ridge[-1] = 0
    weights = torch.zeros(size, 1, dtype=torch.float64)
    weights[-1] = torch.logit(truth.double().mean(), eps=1e-6)
    now = loss(weights)
    for _ in range(MOST_STEPS):
        gradient, curvature = ridge * weights, torch.diag(ridge[:, 0] + 1e-9)
        for part, true in parts:
            given = design(part)
            chance = torch.sigmoid(given @ weights)
            gradient = gradient + given.T @ (chance - true)
            curvature = curvature + given.T @ (given * (chance * (1 - chance)))
        step = torch.linalg.solve(curvature, gradient)
        if float((gradient * step).sum()) < 1e-6:
            break
        while (after := loss(weights - step)) > now and float(step.abs().max()) > 1e-12:
            step = step / 2
        weights, now = weights - step, after
    linear.weight.data.copy_(weights[:-1].T)
    linear.bias.data.copy_(weights[-1])


def recipes(trees: bool) -> tuple[Recipe, ...]:
    """What is trained: the model, with trees or without, and its cheaper variant."""
    return tuple(
        replace(one, trees=True, config=one.beside_trees)
        if trees and one.beside_trees is not None
        else one
        for one in RECIPES
    )


def trained(
    recipe: Recipe,
    data: Data,
    chosen: Rows,
    *,
    epochs: int,
    seed: int,
    advance: Callable[[int], None],
) -> Stored:
    """Fit a model as :func:`fit` does; a network is packed, as it is served."""
    model = fit(recipe, data, chosen, epochs=epochs, seed=seed, advance=advance)
    return model if recipe.convex else pack(model, data, chosen)


def folds(
    recipe: Recipe, data: Data, plan: Plan, seed: int, advance: Callable[[int], None]
) -> Quality:
    """Mean and standard deviation over the folds."""
    found: list[Quality] = []
    for number in range(FOLDS):
        first = plan.first_day + number * WEEK
        test = week_of(data, first + 2 * WEEK, known_from=first)
        stored = trained(
            recipe,
            data,
            data.between(first, WEEK),
            epochs=plan.epochs,
            seed=seed + number,
            advance=advance,
        )
        scores = score(scorer(stored), data, test)
        found.append(measure(scores, data, test, plan.alert_budget))
    values = {name: [quality[name] for quality in found] for name in found[0]}
    means = {f"fold_{name}_mean": float(np.mean(of)) for name, of in values.items()}
    return means | {f"fold_{name}_sd": float(np.std(of, ddof=1)) for name, of in values.items()}


def final(
    recipe: Recipe, data: Data, plan: Plan, seed: int, advance: Callable[[int], None]
) -> tuple[Stored, Quality, dict[str, Any]]:
    """The model to store, its thresholds and quality on a week of its own, and its facts."""
    first, days = plan.first_day, plan.final_days
    epochs = max(plan.epochs * 2 // 3, 1)
    week = week_of(data, first + days + WEEK, known_from=first)
    test = week_of(data, first + days + 2 * WEEK, known_from=first)
    chosen = data.between(first, days)
    stored = trained(recipe, data, chosen, epochs=epochs, seed=seed, advance=advance)
    settled = settle(stored, data, week, plan.alert_budget, plan.decline_cost)
    used = data.table["time"][data.between(first, days + 2 * WEEK)]
    window = {"from": int(used[0]), "to": int(used[-1])}
    recent = data.between(first + days + WEEK, 2 * WEEK)
    facts = facts_of(settled.stored, data, recent, window, definitions(data.features))
    return settled.stored, judge(settled, data, test, plan.alert_budget), facts


def specification(
    recipe: Recipe,
    version: str,
    source: str,
    metrics: Quality,
    features: Program = STANDARD,
    model: FraudScorer | None = None,
) -> ModelSpec:
    """What the manifest says; ``model`` where it has trees beside the network."""
    config, kind = dict(recipe.config), "fraud-mlp" if recipe.make is fraud_mlp else "fraud-lite"
    about = recipe.description
    if isinstance(model, FraudEnsemble):
        about += ", and boosted trees"
        kind, config = "fraud-ensemble", config | model.trees.shape
    return ModelSpec(
        name=recipe.name,
        version=version,
        architecture=kind,
        config={"features": features.model, **config},
        inputs=(TensorSpec(name="features", shape=(features.model,), dtype="float32"),),
        outputs=(TensorSpec(name="probability_and_variant", shape=(2,), dtype="float32"),),
        description=about,
        licence="Apache-2.0",
        source=source,
        metrics={name: round(value, 6) for name, value in metrics.items()},
        cheaper=recipe.cheaper,
        block=BLOCK,
    )


def run(
    plan: Plan,
    read: Read,
    out: Path,
    *,
    seed: int,
    version: str,
    source: str,
    console: Console,
    newest: bool = False,
) -> list[ModelSpec]:
    """Train and store all models; returns their specs.

    Args:
        plan: how to train.
        read: gives the payments.
        out: folder of the model store.
        seed: of weights, order and dropout.
        version: of the models to write.
        source: where they come from, for the manifest.
        console: shows progress.
        newest: use the newest days instead of the first ones that the plan allows.

    Raises:
        ConfigError: the version is in the store already, or the payments do not suffice.
        InputError: a record cannot be read.
    """
    for recipe in RECIPES:
        if (out / recipe.name / version).exists():
            raise ConfigError(
                f"{recipe.name} {version} is in {out} already",
                hint="versions never change: choose a new one with --version",
            )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    specs = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("features", total=None)
        data = read(partial(progress.advance, bar))
        plan = plan.ending(data) if newest else plan
        plan.check(data)
        for recipe in recipes(plan.trees):
            total = plan.epochs * FOLDS + max(plan.epochs * 2 // 3, 1)
            bar = progress.add_task(recipe.name, total=total)
            metrics = folds(recipe, data, plan, seed, partial(progress.advance, bar))
            stored, quality, facts = final(recipe, data, plan, seed, partial(progress.advance, bar))
            spec = specification(
                recipe, version, source, metrics | quality, data.features, scorer(stored)
            )
            ModelStore(out).save(spec, stored, facts=facts)
            specs.append(spec)
    return specs


def sheet(specs: list[ModelSpec]) -> Sheet:
    """The measured quality as a table."""
    table = Sheet("measure", *(spec.name for spec in specs))
    for name in specs[0].metrics:
        table.add_row(name, *(f"{spec.metrics[name]:.4f}" for spec in specs))
    return table


def rates_of(words: list[str]) -> dict[str, float]:
    """Currencies and rates from words such as ``USD=0.9``.

    Raises:
        ConfigError: a word says something else.
    """
    rates = {}
    for word in words or ["EUR=1"]:
        currency, _, value = word.partition("=")
        try:
            rates[currency] = float(value)
        except ValueError:
            rates[currency] = 0.0
        if not 1e-6 <= rates[currency] <= 100:
            raise ConfigError(f"--rate {word}: expected a currency and a number from 1e-6 to 100")
    return rates


def declared_in(path: Path) -> Program:
    """The features that a file declares.

    Raises:
        ConfigError: names the file, the feature and the field.
    """
    try:
        return compiled(Declaration.model_validate(tomllib.loads(path.read_text("utf-8"))))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}", hint="see https://toml.io for the syntax") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--records",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="transactions and labels, JSON lines or .gz; default: simulated ones",
    )
    parser.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="CUR=VALUE",
        help="a currency in the records and what one unit is worth; default EUR=1",
    )
    parser.add_argument(
        "--first-day",
        type=int,
        help="of training; default: the latest that leaves the newest day with known labels to the "
        "test; 115 of simulated days",
    )
    parser.add_argument(
        "--features", type=Path, help="TOML file that declares them; default: the standard ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "store")
    parser.add_argument("--version", default="1.0.0", help="of the models to write")
    parser.add_argument("--epochs", type=int, default=12, help="per fold")
    parser.add_argument("--alert-budget", type=int, default=100, help="cards per day")
    parser.add_argument("--decline-cost", type=float, default=50.0, help="base currency, a mistake")
    parser.add_argument(
        "--trees",
        action=argparse.BooleanOptionalAction,
        help="boosted trees beside the network; default: where LightGBM is installed",
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    first = FIRST_RECORDED if given.records else FIRST_SIMULATED
    plan = Plan(
        first_day=first if given.first_day is None else given.first_day,
        epochs=given.epochs,
        alert_budget=given.alert_budget,
        decline_cost=given.decline_cost,
        trees=at_hand() if given.trees is None else given.trees,
    )
    console, trees = Console(), "--trees" if plan.trees else "--no-trees"
    try:
        features = STANDARD if given.features is None else declared_in(given.features)
        read: Read = partial(simulated, SIMULATED, given.seed, features=features)
        kind = "simulated"
        if given.records:
            rates = rates_of(given.rate)
            read, kind = partial(recorded, given.records, rates, features=features), "recorded"
        specs = run(
            plan,
            read,
            given.out,
            seed=given.seed,
            version=given.version,
            source=f"{COMMAND} --seed {given.seed} {trees}; {kind} payments",
            console=console,
            newest=bool(given.records) and given.first_day is None,
        )
    except PlinthError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(sheet(specs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
