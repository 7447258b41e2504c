"""Do learned costs stay true over long runs? In virtual time: no model runs.

The cost model is seeded at powers of two and then sees batches of few sizes for a while, then
of other sizes, with the machine's speed changing between; durations have an upper tail, now and
then a very long one, or a lower tail. Told is by how much the prediction (median) of a size is off,
as a factor, when a phase begins and when it ends.

    python benchmarks/cost_model.py
"""

import math
import random
import statistics
from collections.abc import Callable

from head import parser_of, print_json, print_rows

from plinth.engine import LatencyModel

SEEDED = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (1, 2, 3, 8, 17, 33, 64, 100, 128)
SHAPES: dict[str, Callable[[int], float]] = {
    "1 ms + 0.1 ms a row": lambda rows: 1e-3 + 1e-4 * rows,
    "nearly constant": lambda rows: 2e-3 + 1e-6 * rows,
    "1 ms for each 16 rows begun": lambda rows: 1e-3 * math.ceil(rows / 16),
}
TAILS: dict[str, Callable[[random.Random], float]] = {
    "none": lambda _: 0.0,
    "upper": lambda chance: chance.expovariate(5),
    "upper, 3 % three times": lambda chance: chance.expovariate(10) + 2 * (chance.random() < 0.03),
    "lower": lambda chance: -0.4 * chance.random() ** 3,
}
PHASES = 12


def factor(predicted: float, true: float) -> float:
    """By how much one is off, whichever is larger."""
    return max(predicted / true, true / predicted)


def phases(
    seed: int, cost: Callable[[int], float], tail: Callable[[random.Random], float]
) -> tuple[list[float], list[float]]:
    """How far off predictions are when phases begin, but for the first, and when they end."""
    chance, model, speed = random.Random(seed), LatencyModel(), 1.0
    for rows in SEEDED:
        model.seed("net", rows, cost(rows) * chance.uniform(0.9, 1.2))
    begun: list[float] = []
    ended: list[float] = []
    for phase in range(PHASES):
        sizes = [chance.choice(SIZES) for _ in range(chance.choice((1, 2, 3)))]
        if phase:
            begun.append(max(factor(model.predict("net", n, 0.5), cost(n) * speed) for n in sizes))
        if chance.random() < 0.4:
            speed *= chance.choice((0.5, 0.8, 1.3, 2.0))
        for _ in range(chance.choice((50, 500, 5_000))):
            rows = chance.choice(sizes)
            model.observe("net", rows, cost(rows) * speed * (1 + tail(chance)))
        ended.append(max(factor(model.predict("net", n, 0.5), cost(n) * speed) for n in sizes))
    return begun, ended


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="runs of each row")
    options = parser.parse_args()
    rows = []
    for shape, cost in SHAPES.items():
        for tail, skew in TAILS.items():
            runs = [phases(seed, cost, skew) for seed in range(options.seeds)]
            begun = [off for first, _ in runs for off in first]
            ended = [off for _, last in runs for off in last]
            figures = statistics.median(begun), max(begun), statistics.median(ended), max(ended)
            rows.append((shape, tail, *(round(figure, 2) for figure in figures)))
    headings = ("cost", "tail", "begins: median", "worst", "ends: median", "worst at the end")
    if options.json:
        print_json([dict(zip(headings, row, strict=True)) for row in rows])
    else:
        print_rows(headings, rows)


if __name__ == "__main__":
    main()
