"""A text model on one worker process, and cut over two: rows a second, and memory of each process.

    python benchmarks/gang.py [--rounds 5] [--batches 6] [--json]

BERT-base with random weights (438 MB) from a store, texts of 128 tokens in batches of 8, one CPU
thread for each process. Each layout is an engine of its own; all stand beside each other and are
run by turns, one at a time. Memory is that of the processes of the lane when all have run: what is
their own (``RssAnon``; a worker without a model has 0.2 GB), and the pages of files that they have
read (``RssFile``: of the weights, beside 0.2 GB of libraries).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from head import parser_of, print_json, print_rows

from plinth.engine import Call, Engine, ModelStore, Sla
from plinth.engine.models.families import find

LAYOUTS = ("process:cpu", "gang:cpu:tensor=2", "gang:cpu:pipeline=2")
ROWS, TOKENS = 8, 128
PATIENT = Sla(deadline_ms=600_000)


def memory(pid: int) -> dict[str, int]:
    """MB of a process: its own, and of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return {key: int(facts[key].split()[0]) // 1000 for key in ("RssAnon", "RssFile")}


def started(layout: str, store: ModelStore) -> tuple[Engine, list[int]]:
    """An engine of one lane that holds the model, and the processes of its lane."""
    before = {child.pid for child in psutil.Process().children()}
    engine = Engine(devices=[layout], threads=1, hung_seconds=60.0).start()
    engine.add(store.load("bert"), batch_range=(1, ROWS), sla=PATIENT)
    return engine, [c.pid for c in psutil.Process().children() if c.pid not in before]


def measure(rounds: int, batches: int) -> dict[str, Any]:
    """Rows a second of each layout by turns, and what its processes hold."""
    family = find("bert")
    ids = torch.randint(0, 30522, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found: dict[str, Any] = {}
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, made = ModelStore(Path(folder)), family.model()
        store.save(made.spec, made.module)
        del made
        try:
            pids = {}
            for layout in LAYOUTS:
                engines[layout], pids[layout] = started(layout, store)
                found[layout] = {"rows_a_second": []}
            answers: dict[str, Any] = {}
            for layout in LAYOUTS * (1 + rounds):
                begun = perf_counter()
                asked = [engines[layout].submit(Call("bert", rows)) for _ in range(batches)]
                answers[layout] = [each.result(600).value for each in asked][-1]
                speed = batches * ROWS / (perf_counter() - begun)
                found[layout]["rows_a_second"].append(speed)
            for layout in LAYOUTS:
                del found[layout]["rows_a_second"][0]  # what it costs was not known
                (lane,) = engines[layout].status()["lanes"]
                found[layout]["weights"] = lane.get("weights_by_rank")
                found[layout]["memory"] = [memory(pid) for pid in pids[layout]]
                found[layout]["off"] = max(
                    float((answers[layout][key] - each).abs().max())
                    for key, each in answers[LAYOUTS[0]].items()
                )
        finally:
            for engine in engines.values():
                engine.close()
    return found


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6)
    given = parser.parse_args()
    found = measure(given.rounds, given.batches)
    if given.json:
        print_json(found)
        return
    lines = []
    for layout, facts in found.items():
        speeds = facts["rows_a_second"]
        weights = " + ".join(f"{each / 1e6:.0f}" for each in facts["weights"] or [])
        own = " + ".join(str(each["RssAnon"]) for each in facts["memory"])
        files = " + ".join(str(each["RssFile"]) for each in facts["memory"])
        spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
        lines.append([layout, round(median(speeds), 2), spread, weights, own, files, facts["off"]])
    print_rows(
        ["lane", "rows/s", "least to most", "weights, MB", "own, MB", "files, MB", "off"], lines
    )


if __name__ == "__main__":
    main()
