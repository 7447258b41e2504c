"""Model families on every backend, CPU time against eager torch on the same rows.

    python benchmarks/families.py [--rows 1 8] [--rounds 9] [--families bert resnet] [--json]

Configs are small, so that the table takes minutes. One thread; backends take turns in each round;
a figure is the median of eager's CPU time over that backend's in the same round. Beside it stands
the largest difference from eager, relative to the largest output.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from head import parser_of, print_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plinth.engine.backends import prepare
from plinth.engine.backends.base import Executable, cpu_threads
from plinth.engine.devices.device import pick
from plinth.engine.errors import PlinthError
from plinth.engine.models.families import Family, families
from plinth.engine.models.signature import apart
from plinth.engine.models.store import Model

BACKENDS = ("eager", "onnxruntime", "openvino")
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


def measured(family: Family, counts: list[int], rounds: int) -> list[dict[str, Any]]:
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
    for count in counts:
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


def main() -> None:
    """Measure and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--families", nargs="+", default=[family.name for family in families()])
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with cpu_threads(1):
        for family in families():
            if family.name in options.families:
                lines += measured(family, options.rows, options.rounds)
    if options.json:
        print_json(lines)
        return
    table = Table(title="CPU time of eager over that of the backend; difference from eager")
    heads = ("family", "parameters", "rows", "eager ms", *BACKENDS[1:])
    for head in heads:
        table.add_column(head)
    for family in dict.fromkeys(line["family"] for line in lines):
        for count in options.rows:
            own = {
                x["backend"]: x for x in lines if x["family"] == family and x.get("rows") == count
            }
            eager = own["eager"]
            cells = [
                f"{own[b]['ratio']:.2f} ({own[b]['difference']:.0e})" if b in own else "-"
                for b in BACKENDS[1:]
            ]
            name = f"{eager['parameters'] / 1e6:.2f} M"
            table.add_row(family, name, str(count), f"{eager['cpu_ms']:.2f}", *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
