"""Are urgent calls in time while other models return to memory?

    python benchmarks/model_returns.py [--backend onnxruntime] [--seconds 20] [--json]

An urgent model is asked 100 times a second, due in 25 ms. Beside it models whose weights do not
all fit are asked in turn, one every 250 ms, due in 2 s, so that nearly each has to come back first.
One lane, one thread. Prints the urgent calls in time, their latencies, and what the others took.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from head import parser_of, print_found

from plinth.engine import Call, Engine, ModelStore, Refused, Sla
from plinth.engine.models.families import find

EVERY, DUE = 0.010, 25.0
OTHERS_EVERY, OTHERS_DUE = 0.250, 2000.0


def models(root: Path, count: int, width: int) -> ModelStore:
    """A store of ``urgent``, and of so many larger ones."""
    store, family = ModelStore(root), find("gated-mlp")
    wanted = [("urgent", 32), *((f"m{n}", width) for n in range(count))]
    for seed, (name, wide) in enumerate(wanted):
        torch.manual_seed(seed)
        made = family.model({"features": 64, "width": wide, "depth": 4}, name=name)
        store.save(made.spec, made.module)
    return store


def asked(
    engine: Engine, name: Callable[[int], str], due: float, every: float, over: threading.Event
) -> list[float | None]:
    """Ask at even times until the end: seconds of each answer, None for a refusal."""
    rows, times, futures = torch.ones(1, 64), dict[int, float](), list[Future[Any]]()

    def note(number: int, sent: float, _: Future[Any]) -> None:
        times[number] = time.perf_counter() - sent

    begun = time.perf_counter()
    while not over.wait(max(0.0, begun + len(futures) * every - time.perf_counter())):
        number, sent = len(futures), time.perf_counter()
        future = engine.submit(Call(name(number), rows), Sla(deadline_ms=due))
        future.add_done_callback(partial(note, number, sent))
        futures.append(future)
    found = list[float | None]()
    for number, future in enumerate(futures):
        error = future.exception(60)
        if error is not None and not isinstance(error, Refused):
            raise error
        found.append(None if error else times[number])
    return found


def told(times: list[float | None], due: float) -> dict[str, float]:
    """Share in time, refused, and quantiles in milliseconds."""
    seen = sorted(each for each in times if each is not None)
    at = {f"p{q}_ms": round(seen[int(len(seen) * q / 100)] * 1e3, 2) for q in (50, 99)}
    in_time = sum(each * 1e3 <= due for each in seen) / len(times)
    refused = sum(each is None for each in times)
    return {"asked": len(times), "in_time": round(in_time, 4), "refused": refused, **at}


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--fit", type=float, default=2.4, help="of the models, at once")
    parser.add_argument("--width", type=int, default=768)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        store = models(Path(root), given.models, given.width)
        loaded = [store.load(f"m{n}") for n in range(given.models)]
        one = sum(t.nbytes for t in loaded[0].module.state_dict().values())
        budget = int(max(given.fit, 3.3 if given.backend != "eager" else 0.0) * one)
        options = {"backend": given.backend, "threads": 1, "evict_idle": True}
        with Engine(memory_budget=budget, **options) as engine:
            for model in (store.load("urgent"), *loaded):
                engine.add(model, batch_range=(1, 4))
            over, others = threading.Event(), list[float | None]()
            beside = threading.Thread(
                target=lambda: others.extend(
                    asked(
                        engine,
                        lambda n: f"m{n % given.models}",
                        OTHERS_DUE,
                        OTHERS_EVERY,
                        over,
                    )
                )
            )
            timer = threading.Timer(given.seconds, over.set)
            beside.start()
            timer.start()
            urgent = asked(engine, lambda _: "urgent", DUE, EVERY, over)
            beside.join()
            facts = engine.status()["models"]
    found = {
        "backend": given.backend,
        "megabytes_each": round(one / 1e6, 1),
        "returns": sum(each.get("returns", 0) for each in facts.values()),
        "urgent": told(urgent, DUE),
        "others": told(others, OTHERS_DUE),
    }
    print_found(found, given.json)


if __name__ == "__main__":
    main()
