"""Model families on every backend, CPU time against eager torch on the same rows.

    python benchmarks/families.py [--rounds 9] [--families bert resnet] [--write] [--json]

Configs are small, so that the table takes minutes. One thread; backends take turns in each round;
a figure is the median of eager's CPU time over that backend's in the same round, at 1 / 8 rows.
Beside it stands the largest difference from eager, relative to the largest output.
``--results FILE`` keeps the lines: the same command goes on where its ``--minutes`` ended.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compute import facts, others, write
from head import parser_of, print_json
from torch import Tensor

from plinth.engine.backends import prepare
from plinth.engine.backends.base import Executable, cpu_threads
from plinth.engine.devices.device import pick
from plinth.engine.errors import PlinthError
from plinth.engine.models.families import Family, families
from plinth.engine.models.signature import apart
from plinth.engine.models.store import Model

BACKENDS = ("eager", "onnxruntime", "openvino")
ROWS = (1, 8)
FREE = 64
_TEXT = {"vocabulary": 8000, "width": 256, "depth": 4, "heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _TEXT | {"inner": 1024},
    "distilbert": _TEXT | {"depth": 2, "inner": 1024},
    "gpt2": _TEXT,
    "llama": _TEXT | {"key_heads": 2, "inner": 704},
    "vit": {"size": 64, "patch": 8, "width": 256, "depth": 4, "heads": 4, "inner": 1024},
    "resnet": {"stem": 32, "widths": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "mobilenet": {},
    "convnext": {"widths": [48, 96, 192, 384], "depths": [1, 1, 3, 1]},
    "unet3d": {"widths": [8, 16, 32]},
    "resnet3d": {"widths": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
    "recurrent": {},
    "gated-mlp": {},
    "ft-transformer": {},
}


def rows_of(model: Model, count: int) -> dict[str, Tensor]:
    """Rows of one size; masks show every step."""
    rows = model.spec.example(count, free=FREE)
    return {
        name: torch.ones_like(tensor) if "mask" in name else tensor for name, tensor in rows.items()
    }


def spent(executable: Executable, rows: Mapping[str, Tensor]) -> float:
    """CPU seconds of one run, of as many as fill a hundredth."""
    runs, begun = 0, time.process_time()
    while (took := time.process_time() - begun) < 0.01 or not runs:
        executable.run(rows)
        runs += 1
    return took / runs


def measured(family: Family, rounds: int) -> list[dict[str, Any]]:
    """A line for each backend and number of rows."""
    model = family.model(CONFIGS[family.name])
    size = sum(tensor.numel() for tensor in model.module.parameters())
    ready: dict[str, Executable] = {}
    lines: list[dict[str, Any]] = []
    for backend in BACKENDS:
        try:
            rows = rows_of(model, 2)
            ready[backend] = prepare(model, pick("cpu"), "fp32", backend, 1, example=rows)
        except PlinthError as error:
            facts = {"family": family.name, "parameters": size, "backend": backend}
            lines.append(facts | {"reason": error.message})
    for count in ROWS:
        rows = rows_of(model, count)
        want = model.run(rows)
        off = {
            name: max(apart(runs.run(rows)[key], tensor) for key, tensor in want.items())
            for name, runs in ready.items()
        }
        times = [{name: spent(runs, rows) for name, runs in ready.items()} for _ in range(rounds)]
        lines += [
            {
                "family": family.name,
                "parameters": size,
                "rows": count,
                "backend": name,
                "cpu_ms": 1e3 * median(turn[name] for turn in times),
                "ratio": median(turn["eager"] / turn[name] for turn in times),
                "difference": off[name],
            }
            for name in ready
        ]
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    heads = "| family | parameters | eager, ms | ONNX Runtime | OpenVINO | difference |"
    out = [heads, "|" + "---|" * 6]
    for family in dict.fromkeys(line["family"] for line in lines):
        own = [line for line in lines if line["family"] == family]
        ran = {name: [e for e in own if e["backend"] == name and "rows" in e] for name in BACKENDS}
        cells = [" / ".join(f"{e['cpu_ms']:.3g}" for e in ran["eager"])]
        for name in BACKENDS[1:]:
            refused = next((e["reason"] for e in own if e["backend"] == name and "reason" in e), "")
            cells.append(" / ".join(f"{e['ratio']:.2f}" for e in ran[name]) or refused)
        off = max(e["difference"] for runs in ran.values() for e in runs)
        size = own[0]["parameters"] / 1e6
        out.append(f"| {family} | {size:.2f} M | {' | '.join(cells)} | {off:.0e} |")
    return "\n".join(out)


def run(given: Namespace) -> list[dict[str, Any]]:
    """Family by family; after each what there is is kept, so that a stop loses nothing."""
    until, load = time.monotonic() + 60 * given.minutes, others()
    lines: list[dict[str, Any]] = []
    if given.results and given.results.is_file():
        lines = json.loads(given.results.read_text())
    have = {line["family"] for line in lines}
    for family in families():
        if family.name not in given.families or family.name in have:
            continue
        if time.monotonic() > until:
            print(f"no time was left for {family.name}", file=sys.stderr)
            continue
        lines += measured(family, given.rounds)
        if given.results:
            given.results.parent.mkdir(parents=True, exist_ok=True)
            given.results.write_text(json.dumps(lines))
        if given.write:
            write(f"{facts(load)}\n\n{table(lines)}", "families")
    return lines


def main() -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--families", nargs="+", default=[family.name for family in families()])
    parser.add_argument("--minutes", type=float, default=6.0, help="no family begins later")
    parser.add_argument("--results", type=Path, help="JSON of lines that this run adds its own to")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    given = parser.parse_args()
    with cpu_threads(1):
        lines = run(given)
    if given.json:
        print_json(lines)
    else:
        print(table(lines))


if __name__ == "__main__":
    main()
