"""What a call costs on each kind of lane: this process, a worker process, an actor of a cluster.

    python benchmarks/lane_calls.py [--calls 300] [--json]

One engine for each kind, asked in turns by one caller that waits for each answer: a row of 4
numbers and a row of 2.5 million (10 MB), which a model of one multiplication doubles. The cluster
is a head on this machine, so that nothing crosses a network.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plinth.engine import Call, Engine, Sla  # noqa: E402
from tests.engine.cluster_nodes import cluster  # noqa: E402
from tests.engine.lane_models import net  # noqa: E402

KINDS = ("cpu", "process:cpu", "ray:cpu")
SIZES = {"16 bytes": 4, "10 MB": 2_500_000}
PATIENT = Sla(deadline_ms=60_000)


def measured(calls: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a call by size and kind of lane: median, and the 10th and 90th percentile."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="plb"))
        nodes = stack.enter_context(cluster(Path(folder)))
        engines = {}
        for kind in KINDS:
            engine = Engine(devices=[kind], threads=1, cluster=nodes.settings())
            for name, size in SIZES.items():
                model = net(name.replace(" ", "-").lower(), shape=(size,))
                engine.add(model, batch_range=(1, 1), sla=PATIENT)
            engines[kind] = stack.enter_context(engine)
        for name, size in SIZES.items():
            row = torch.rand(1, size)
            call = Call(name.replace(" ", "-").lower(), row)
            took: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for number in range(calls if size < 1000 else max(calls // 10, 10)):
                for kind, engine in engines.items():
                    begun = time.perf_counter()
                    value = engine.submit(call, PATIENT).result(60).value
                    if number >= 5:
                        took[kind].append((time.perf_counter() - begun) * 1e3)
                    assert isinstance(value, torch.Tensor)
                    assert torch.equal(value, 2 * row)
            found[name] = {kind: _spread(each) for kind, each in took.items()}
    return found


def _spread(took: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(took, n=10)
    return {"median": statistics.median(took), "p10": tenths[0], "p90": tenths[-1]}


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--calls", type=int, default=300)
    given = parser.parse_args()
    result: dict[str, Any] = measured(given.calls)
    if given.json:
        print_json(result)
        return
    for name, kinds in result.items():
        for kind, ms in kinds.items():
            sys.stdout.write(
                f"{name:9} {kind:12} {ms['median']:8.2f} ms ({ms['p10']:.2f} to {ms['p90']:.2f})\n"
            )


if __name__ == "__main__":
    main()
