"""The reasons of alerts: whether they are exact, how near an estimate comes, and what they cost.

    python benchmarks/fraud_reasons.py [--alerts 300] [--rounds 5]
        [--backend onnxruntime] [--json]

Simulated payments of another seed than the training's; of their alerts some by chance. What is
served is held against Shapley values by their definition. The cost is CPU time of parsed payments
through the vertical and the engine, in chunks of 128, one thread, at several shares of alerts;
exact reasons, estimated ones and none take turns.
"""

from __future__ import annotations

import os
import time
from math import factorial
from typing import Any

from head import parser_of, print_json

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import Engine, ModelStore
from plinth.verticals.finance import FraudScoring
from plinth.verticals.finance.decisions.reasons import MASKED, Coalitions, Groups, log_odds
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.program import STANDARD
from plinth.verticals.finance.schema import Decision
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.training.history import simulated
from plinth.verticals.finance.training.simulator import Population, simulate, transactions_json

PEOPLE = Population(customers=1_500, terminals=3_000, days=75)
FIRST = 40
"""Day from which on all windows are full."""
SHARES = (0.001, 0.01, 0.1, 1.0)
CHUNK = 128


def by_definition(model: nn.Module, rows: Tensor, groups: Groups) -> npt.NDArray[np.float64]:
    """Shapley values of the log-odds, (n, groups), one set of groups after the other."""
    count = len(groups.reasons)
    odds = np.empty((1 << count, len(rows)))
    for subset in range(1 << count):
        names = {n for g in range(count) if subset >> g & 1 for n in groups.members[g]}
        told = torch.tensor([name in names for name in STANDARD.model_names])
        odds[subset] = log_odds(model(torch.where(told, rows, MASKED))[:, 0]).numpy()
    found = np.zeros((len(rows), count))
    for group in range(count):
        for subset in range(1 << count):
            if not subset >> group & 1:
                size = subset.bit_count()
                share = factorial(size) * factorial(count - size - 1) / factorial(count)
                found[:, group] += share * (odds[subset | 1 << group] - odds[subset])
    return found


def compared(count: int) -> dict[str, Any]:
    """Reasons as they are served, exact and estimated, beside those by definition."""
    stored = ModelStore(STORE).load("fraud")
    model, groups = stored.module.eval(), Groups(Columns.all(STANDARD))
    data = simulated(PEOPLE, 11, lambda done: None)
    rows = torch.from_numpy(data.rows[data.day >= FIRST])
    with torch.inference_mode():
        parts = rows.split(8_192)  # type: ignore[no-untyped-call]
        scores = torch.cat([model(part)[:, 0] for part in parts])
        alerts = np.flatnonzero(scores.numpy() >= stored.spec.metrics["review_threshold"])
        dice = np.random.default_rng(0)
        chosen = rows[dice.choice(alerts, min(count, len(alerts)), replace=False)]
        true = by_definition(model, chosen, groups)

        def served(sets: Coalitions) -> npt.NDArray[np.float64]:
            asked = [sets.masked_rows(part) for part in chosen.split(sets.at_once)]  # type: ignore[no-untyped-call]
            found = [sets.contributions(model(part)[:, 0]) for part in asked]
            return torch.cat(found).numpy()

        ways = {"exact": served(groups.exact), "estimated": served(groups.pairs)}
    return {"alerts": len(chosen)} | {
        name: {
            "strongest_the_same": _share(groups, found, true, 1),
            "all_the_same": _share(groups, found, true, 4),
            "log_odds_off_median": float(np.median(np.abs(found - true))),
            "log_odds_off_p95": float(np.quantile(np.abs(found - true), 0.95)),
            "log_odds_off_most": float(np.abs(found - true).max()),
        }
        for name, found in ways.items()
    }


def _share(
    groups: Groups, found: npt.NDArray[np.float64], true: npt.NDArray[np.float64], first: int
) -> float:
    """Of how many alerts the first reasons are the same, whatever their order."""
    both = zip(found.tolist(), true.tolist(), strict=True)
    told = [[{r.code for r in groups.main(one)[:first]} for one in pair] for pair in both]
    return float(np.mean([one == other for one, other in told]))


def costs(rounds: int, backend: str) -> dict[str, Any]:
    """CPU microseconds of a payment by share of alerts: median, least and most of the rounds."""
    raws = list(transactions_json(simulate(PEOPLE, seed=12)))
    vertical = FraudScoring()
    history = len(raws) - CHUNK * 8 * (len(SHARES) * 3 * rounds + 1)
    for start in range(0, history, 4_096):
        past = raws[start : min(start + 4_096, history)]
        vertical.observe([vertical.parse(raw) for raw in past])
    chunks = [
        [vertical.parse(raw) for raw in raws[start : start + CHUNK]]
        for start in range(history, len(raws), CHUNK)
    ]
    groups = vertical.versions.serving.reasons
    exact, pairs = groups.exact, groups.pairs
    spent: dict[tuple[float, str], list[float]] = {}
    with Engine(threads=1, backend=backend) as engine:
        for model in vertical.models():
            engine.add(model, batch_range=(1, CHUNK))
        first, rest = chunks[:8], iter(chunks[8:])
        answers = [one for chunk in first for one in engine.run(vertical.infer(chunk)).value]
        scores = [one.score for one in answers if isinstance(one, Decision)]
        for share in SHARES * rounds:
            level = float(np.quantile(np.array(scores), 1 - share))
            for way, sets, review in (
                ("none", exact, 1.1),
                ("exact", exact, level),
                ("estimated", pairs, level),
            ):
                serving = vertical.versions.serving
                serving.reasons.exact = sets
                serving.variants = tuple(v._replace(review=review) for v in serving.variants)
                begun = time.process_time()
                for _ in range(8):
                    engine.run(vertical.infer(next(rest)))
                used = (time.process_time() - begun) / (8 * CHUNK) * 1e6
                spent.setdefault((share, way), []).append(used)
    return {
        f"{share:.1%} alerts, {way}": [round(float(q), 1) for q in np.quantile(us, (0.5, 0, 1))]
        for (share, way), us in spent.items()
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--alerts", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="onnxruntime")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spent = costs(given.rounds, given.backend)
    print_json({"reasons": compared(given.alerts), "cpu_us_of_a_payment": spent})


if __name__ == "__main__":
    main()
