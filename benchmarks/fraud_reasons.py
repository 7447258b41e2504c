"""How near the reasons of alerts are to exact Shapley values, on the model that comes with Plinth.

    python benchmarks/fraud_reasons.py [--alerts 300] [--json]

Simulated payments of another seed than the training's; of their alerts some by chance. The exact
values take 2 to the power of the groups forwards of each alert, those served 2 * groups + 1.
"""

from __future__ import annotations

import os
import time
from math import factorial

from head import parser_of, print_json

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import ModelStore
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.program import STANDARD
from plinth.verticals.finance.reasons import MASKED, Groups
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.training.history import simulated
from plinth.verticals.finance.training.simulator import Population

PEOPLE = Population(customers=1_500, terminals=3_000, days=75)
FIRST = 40
"""Day from which on all windows are full."""


def exact(model: nn.Module, rows: Tensor, groups: Groups) -> npt.NDArray[np.float64]:
    """Shapley values by their definition, (n, groups), of the log-odds."""
    count = len(groups.reasons)
    odds = np.empty((1 << count, len(rows)))
    for subset in range(1 << count):
        names = {n for g in range(count) if subset >> g & 1 for n in groups.members[g]}
        told = torch.tensor([name in names for name in STANDARD.model_names])
        score = model(torch.where(told, rows, MASKED))[:, 0].double()
        odds[subset] = torch.logit(score, eps=1e-7).numpy()
    found = np.zeros((len(rows), count))
    for group in range(count):
        for subset in range(1 << count):
            if not subset >> group & 1:
                size = subset.bit_count()
                share = factorial(size) * factorial(count - size - 1) / factorial(count)
                found[:, group] += share * (odds[subset | 1 << group] - odds[subset])
    return found


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--alerts", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stored = ModelStore(STORE).load("fraud")
    model, groups = stored.module.eval(), Groups(Columns.all(STANDARD))
    data = simulated(PEOPLE, 11, lambda done: None)
    rows = torch.from_numpy(data.rows[data.day >= FIRST])
    with torch.inference_mode():
        parts = rows.split(8_192)  # type: ignore[no-untyped-call]
        scores = torch.cat([model(part)[:, 0] for part in parts])
        alerts = np.flatnonzero(scores.numpy() >= stored.spec.metrics["review_threshold"])
        dice = np.random.default_rng(0)
        chosen = rows[dice.choice(alerts, min(given.alerts, len(alerts)), replace=False)]
        begun = time.process_time()
        served = groups.contributions(model(groups.masked_rows(chosen))[:, 0]).numpy()
        between = time.process_time()
        true = exact(model, chosen, groups)
        ended = time.process_time()
    told = [[reason.code for reason in groups.main(one)] for one in served.tolist()]
    want = [[reason.code for reason in groups.main(one)] for one in true.tolist()]
    pairs = list(zip(told, want, strict=True))
    print_json(
        {
            "alerts": len(chosen),
            "strongest_the_same": float(np.mean([a[:1] == b[:1] for a, b in pairs])),
            "all_the_same": float(np.mean([set(a[:4]) == set(b[:4]) for a, b in pairs])),
            "log_odds_off_median": float(np.median(np.abs(served - true))),
            "log_odds_off_p95": float(np.quantile(np.abs(served - true), 0.95)),
            "cpu_us_of_an_alert": round((between - begun) / len(chosen) * 1e6),
            "cpu_us_exact": round((ended - between) / len(chosen) * 1e6),
        }
    )


if __name__ == "__main__":
    main()
