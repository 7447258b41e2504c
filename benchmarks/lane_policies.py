"""One queue over many lanes against a queue per lane, in virtual time.

    python benchmarks/lane_policies.py [--lanes 1,2,4,8,64,1000] [--loads 0.5,0.75,1,1.25,1.75]
        [--policies plinth,jsq,two,robin] [--rows 60000] [--seed 7] [--json]

A batch of n costs 20 ms + 1 ms x n on every lane, at most 128 rows; answers are due within
200 ms; Poisson arrivals at so many times what the lanes can do. Share of the fluid bound: answers
in time per second, over the most that any policy could give that knows all arrivals. A queue per
lane has the same batching and shedding. Below the table: what planning costs for each request.

With ``--optimum SECONDS`` two lanes are held against the most that any policy could answer of the
very arrivals of so many seconds (half a minute of CPU for 6 s), by load.
"""

from __future__ import annotations

from time import process_time

from head import parser_of, print_json
from rich.console import Console
from rich.table import Table

from plinth.engine.scheduler.optimum import best_of_two
from plinth.engine.scheduler.simulate import (
    Setting,
    Trace,
    fluid,
    poisson,
    pooled,
    round_robin,
    routed,
    shortest_queue,
    two_choices,
)

WARM = 0.4
"""Seconds left out at the beginning, while the lanes fill."""
CHOICES = {"jsq": shortest_queue, "two": two_choices, "robin": round_robin}
NAMES = {
    "plinth": "Plinth: one queue",
    "jsq": "join the shortest queue",
    "two": "power of two choices",
    "robin": "round robin",
}


def measured(policy: str, lanes: int, load: float, rows: int, seed: int) -> dict[str, float]:
    """One policy at one load: share of the bound, and CPU microseconds for each request."""
    rate = load * lanes * Setting().capacity
    setting = Setting(duration=max(2.0, rows / rate))
    arrivals = poisson(rate, setting.duration, seed)
    begun = process_time()
    traces: list[Trace]
    if policy == "plinth":
        traces = [pooled(setting, arrivals, [1.0] * lanes)]
    else:
        traces = routed(setting, arrivals, lanes, CHOICES[policy], seed)
    seconds = process_time() - begun
    goodput = sum(trace.goodput(WARM, setting.duration) for trace in traces)
    bound = fluid(setting, len(arrivals) / setting.duration, [1.0] * lanes)
    return {"share": goodput / bound, "microseconds": seconds / len(arrivals) * 1e6}


def optimum(load: float, seconds: float, seed: int) -> dict[str, float]:
    """Two lanes at one load: what was answered in time, and the most that could have been."""
    setting = Setting(duration=seconds)
    arrivals = poisson(load * 2 * setting.capacity, seconds, seed)
    made = pooled(setting, arrivals, [1.0, 1.0]).finish.items()
    kept = sum(at <= work.deadline + 1e-9 for work, at in made)
    best = best_of_two(setting, arrivals)
    return {"load": load, "offered": len(arrivals), "in_time": kept, "best": best}


def main() -> None:
    """Run all policies and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--lanes", default="1,2,4,8,64,1000")
    parser.add_argument("--loads", default="0.5,0.75,1,1.25,1.75")
    parser.add_argument("--policies", default="plinth,jsq,two,robin")
    parser.add_argument("--rows", type=int, default=60_000, help="requests of one run, at least")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--optimum", type=float, metavar="SECONDS", help="two lanes alone")
    options = parser.parse_args()
    loads = [float(each) for each in options.loads.split(",")]
    if options.optimum:
        held = [optimum(load, options.optimum, options.seed) for load in loads]
        if options.json:
            print_json({"optimum": held})
        for each in () if options.json else held:
            print(
                f"{each['load']:g}x: {each['offered']} offered, {each['in_time']} in time of at "
                f"most {each['best']}: {each['in_time'] / each['best']:.4f}"
            )
        return
    found = [
        {"policy": policy, "lanes": lanes, "load": load}
        | measured(policy, lanes, load, options.rows, options.seed)
        for lanes in map(int, options.lanes.split(","))
        for policy in options.policies.split(",")
        for load in loads
    ]
    if options.json:
        print_json({"runs": found})
        return
    for title, key, shape in (
        ("share of the fluid bound", "share", "{:.3f}"),
        ("CPU microseconds for each request", "microseconds", "{:.1f}"),
    ):
        table = Table(title=title)
        for head in ("lanes", "policy", *(f"{load:g}x" for load in loads)):
            table.add_column(head)
        for at in range(0, len(found), len(loads)):
            group = found[at : at + len(loads)]
            values = (shape.format(each[key]) for each in group)
            table.add_row(str(group[0]["lanes"]), NAMES[str(group[0]["policy"])], *values)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
