"""Batching policies side by side in virtual time.

    python benchmarks/batching_policies.py [--seed 7] [--duration 60] [--json]

A batch of n costs 20 ms + 1 ms x n, at most 128; answers are due within 200 ms; Poisson
arrivals. Answers in time per second, same arrivals for every policy.
"""

from __future__ import annotations

from collections.abc import Callable

from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

from plinth.engine.scheduler.simulate import (
    Arrivals,
    Outcome,
    Setting,
    clairvoyant,
    elastic,
    poisson,
    queueing,
)

RATES = (400, 600, 800, 865, 1000, 1250, 1500)
TUNED = tuple(step / 100 for step in range(2, 13, 2))


def tuned(setting: Setting, arrivals: Arrivals) -> Outcome:
    """The best queue timeout that hand-tuning on these very arrivals finds."""
    tries = (queueing(setting, arrivals, timeout=seconds) for seconds in TUNED)
    return max(tries, key=lambda outcome: outcome.in_sla)


POLICIES: dict[str, Callable[[Setting, Arrivals], Outcome]] = {
    "fixed window 10 ms, no shedding": lambda s, a: queueing(s, a, window=0.010),
    "bounded queue (128)": lambda s, a: queueing(s, a, bound=128),
    "queue timeout = SLA": lambda s, a: queueing(s, a, timeout=s.deadline),
    "queue timeout, tuned per rate": tuned,
    "greedy: largest batch for the first deadline": lambda s, a: queueing(s, a, greedy=True),
    "Plinth": elastic,
    "clairvoyant ceiling": clairvoyant,
}


def main() -> None:
    """Run all policies and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--duration", type=float, default=60.0)
    options = parser.parse_args()
    setting = Setting(duration=options.duration)
    rows = {
        name: [
            policy(setting, poisson(rate, setting.duration, options.seed)).goodput for rate in RATES
        ]
        for name, policy in POLICIES.items()
    }
    if options.json:
        print_json({"rates": RATES, "goodput": rows})
        return
    table = Table(title=f"answers in time per second (device: {setting.capacity:.0f}/s)")
    for head in ("policy", *(f"{rate}/s" for rate in RATES)):
        table.add_column(head)
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.0f}" for value in values))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
