"""What the engine adds to a call: a bare run of a model, and the same through ``Engine.run``.

    python benchmarks/call_overhead.py [--model gru] [--rounds 9] [--cpu] [--json]

A small MLP or GRU on ONNX Runtime, one thread, one caller. Three ways in turns, so that what else
the machine does hits all alike: the executable called as it is; an engine whose callers run a
small call themselves; and one that sends every call over its lane. Each figure is the median of
the rounds, in microseconds of wall time, or with ``--cpu`` of CPU time of the whole process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from head import parser_of, print_json
from torch import Tensor, nn

from plinth.engine import Call, Engine, Flow, Model, ModelSpec, TensorSpec
from plinth.engine.runtime import engine as runtime

ROWS = (1, 16, 128)
CALLS = 300  # of one way in a round


class Recurrent(nn.Module):
    """A GRU over 20 steps, and a layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(32, 64, batch_first=True), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (n, 20, 32) to (n, 1)."""
        y: Tensor = self.head(self.gru(x)[0][:, -1])
        return y


def gru() -> Model:
    """Twenty steps of 32 features, a state of 64."""
    torch.manual_seed(0)
    spec = ModelSpec(
        name="gru",
        inputs=(TensorSpec(name="x", shape=(20, 32)),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
    )
    return Model(spec, Recurrent().eval())


def mlp() -> Model:
    """Of the size of a scoring model: 64 features, two layers of 256."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)
    ).eval()
    spec = ModelSpec(
        name="mlp",
        inputs=(TensorSpec(name="x", shape=(64,)),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
    )
    return Model(spec, module)


def flow(rows: Tensor, model: str = "mlp") -> Flow[Tensor]:
    """One call."""
    value = yield Call(model, rows)
    assert isinstance(value, Tensor)
    return value


def each(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Microseconds of one call."""
    begun = clock()
    for _ in range(CALLS):
        call()
    return (clock() - begun) / CALLS * 1e6


def measure(
    engine: Engine, model: Model, rows: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """The medians of the three ways."""
    x, name_of_model = model.spec.example(rows)["x"], model.spec.name
    executable = engine._models.get(name_of_model).executable
    usual = runtime.DIRECT_SECONDS
    times: dict[str, list[float]] = {"bare": [], "direct": [], "lane": []}
    for turn in range(rounds + 1):
        found = {"bare": each(lambda: executable.run({"x": x}), clock)}
        for name, most in (("direct", usual), ("lane", 0.0)):
            runtime.DIRECT_SECONDS = most
            found[name] = each(lambda: engine.run(flow(x, name_of_model)), clock)
        runtime.DIRECT_SECONDS = usual
        for name, taken in found.items():
            if turn:  # the first warms up
                times[name].append(taken)
    return {name: round(statistics.median(taken), 1) for name, taken in times.items()}


def main() -> None:
    """Run and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", choices=("mlp", "gru"), default="mlp")
    parser.add_argument("--cpu", action="store_true", help="CPU time of the process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if given.cpu else time.perf_counter
    model = mlp() if given.model == "mlp" else gru()
    with Engine(threads=1, backend="onnxruntime") as engine:
        engine.add(model)
        found = {rows: measure(engine, model, rows, given.rounds, clock) for rows in ROWS}
    if given.json:
        print_json({"microseconds": found})
        return
    print("rows     bare   direct     lane   bare/direct  bare/lane")
    for rows, us in found.items():
        shares = f"{us['bare'] / us['direct']:11.2f} {us['bare'] / us['lane']:10.2f}"
        print(f"{rows:4} {us['bare']:8.1f} {us['direct']:8.1f} {us['lane']:8.1f} {shares}")


if __name__ == "__main__":
    main()
