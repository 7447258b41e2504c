"""A volume through a network: Plinth's plan beside naive eager windows and MONAI's own inferer.

    python benchmarks/volumes.py NETWORK [--side 160] [--window 96] [--overlap 0.5] [--json]
    python benchmarks/volumes.py NETWORK --study T1_FOLDER --ways monai,plinth [--json]
    python benchmarks/volumes.py DEEPBET --study T1_FOLDER --own-window --window 128 [--json]

NETWORK is a MeshNet folder (exact windows at its halo), or any network that ``plinth batch
--model`` takes. Each way runs in a fresh process with one thread on the same volume: smooth
noise, ``--volume FILE.npy``, or the series in the folder ``--study`` as the network takes it. Told
are CPU seconds of the volume alone, the peak memory of the process above what it held after its
imports, what loading and measuring the network takes included, and Dice of the worst class against
the first of the ways: ``whole`` (one eager pass over the whole volume), ``naive`` (eager windows,
all logits held, then argmax), ``monai`` (``monai.inferers.sliding_window_inference``, then argmax),
``plinth`` (the engine with ``--backend``; with ``--own-window`` in the windows that the network's
own metadata asks for, as ``plinth batch`` runs it).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from head import fresh_process, parser_of, print_found

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))


def memory_mb(field: str) -> float:
    """A field of this process's status in MB; VmHWM is counted from :func:`forget_peak` on."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError(field)


def forget_peak() -> None:
    """Begin to count the peak of loaded memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def run_one(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """One way in this process."""
    import numpy as np
    import torch

    from plinth.verticals.medical.networks.load import load_network

    torch.set_num_threads(1)
    exporters = ["torch.onnx", "torch._dynamo", "onnxscript"]
    libraries = {"monai": ["monai.inferers"], "plinth": [given.backend, *exporters]}
    for library in libraries.get(way, []):
        if library not in ("auto", "eager", "inductor"):
            importlib.import_module(library)
    held = memory_mb("VmRSS")
    forget_peak()
    volume = torch.from_numpy(np.load(given.volume))[None]
    network = load_network(given.network, uncertainty=way != "plinth")
    if way == "plinth":
        labels, spent, plan = by_engine(network, volume, given)
    else:
        labels, spent, plan = by_torch(way, network.reference.module, volume, given)
    peak = memory_mb("VmHWM")
    np.save(given.out, labels.numpy())
    return {"cpu_s": round(spent, 2), "peak_mb": round(peak - held), "held_mb": round(held)} | plan


Ran = tuple[Any, float, dict[str, Any]]
"""Labels, CPU seconds, and the plan."""


def by_torch(way: str, module: Any, volume: Any, given: argparse.Namespace) -> Ran:
    """One pass, naive windows, or MONAI's inferer."""
    import torch

    window = [min(given.window, size) for size in volume.shape[1:]]
    begun = time.process_time()
    with torch.inference_mode():
        if way == "whole":
            logits = module(volume[None])[0]
        elif way == "monai":
            inferers: Any = importlib.import_module("monai.inferers")
            logits = inferers.sliding_window_inference(
                volume[None], window, 1, module, overlap=given.overlap, mode="gaussian"
            )[0]
        else:
            logits = naive(module, volume, window, given.overlap)
        labels = logits.argmax(0).to(torch.uint8)
    return labels, time.process_time() - begun, {"window": window}


def naive(module: Any, volume: Any, window: list[int], overlap: float) -> Any:
    """The mean of the logits of overlapping windows, all of them held."""
    import torch

    from plinth.engine.tiling import Tiling, WindowGrid

    a, b, c = volume.shape[1:]
    grid = WindowGrid(Tiling((window[0], window[1], window[2]), overlap), (a, b, c))
    total: Any = None
    count = torch.zeros(a, b, c)
    for n in range(len(grid)):
        out = module(grid.cut(volume, n, n + 1))[0]
        total = torch.zeros(len(out), a, b, c) if total is None else total
        at = tuple(slice(f, f + w) for f, w in zip(grid.corner(n), window, strict=True))
        total[(slice(None), *at)] += out
        count[at] += 1
    return total / count


def by_engine(network: Any, volume: Any, given: argparse.Namespace) -> Ran:
    """The engine, with windows as large as ``--memory-mb`` allows where the network has a halo."""
    from plinth.engine import Call, Engine
    from plinth.verticals.medical.networks.analysis import tiling_of, window_of
    from plinth.verticals.medical.networks.load import with_window
    from plinth.verticals.medical.networks.prepare import Axis, Prepared

    a, b, c = volume.shape[1:]
    whole = network.recipe.window.halo is not None
    own = network.recipe.window.size if given.own_window else None
    wanted = own or (given.window,) * 3
    size = (a, b, c) if whole else tuple(min(w, n) for w, n in zip(wanted, (a, b, c), strict=True))
    network = window_of(with_window(network, size), given.memory_mb)
    z, y, x = (Axis(n, m, m, 0.0, 1.0, (0, m)) for n, m in enumerate((a, b, c)))
    ready = Prepared(volume, (z, y, x), (a, b, c))
    tiling = tiling_of(ready, network.recipe, overlap=0.0 if own else given.overlap)
    with Engine(threads=1, backend=given.backend) as engine:
        engine.add(network.model, batch_range=(1, 1))
        begun = time.process_time()
        answer = engine.submit(Call(network.model.spec.name, volume, tiling=tiling)).result()
        spent = time.process_time() - begun
        backend = engine.status()["models"][network.model.spec.name]["backend"]
    return answer.value, spent, {"window": list(tiling.window), "backend": backend}


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Every way in a process of its own; what each took, and Dice against ``whole``."""
    import numpy as np

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = given.volume or Path(scratch) / "volume.npy"
        if given.study is not None:
            np.save(path, as_taken(given.study, given.network))
        elif given.volume is None:
            np.save(path, made_up(given.side))
        labels: dict[str, Any] = {}
        for way in given.ways.split(","):
            out = Path(scratch) / f"{way}.npy"
            options = ["--window", given.window, "--overlap", given.overlap]
            options += ["--backend", given.backend, "--memory-mb", given.memory_mb]
            options += ["--own-window"] * given.own_window
            words = [
                __file__,
                given.network,
                "--one",
                way,
                "--volume",
                path,
                "--out",
                out,
                *options,
            ]
            found[way] = fresh_process(*words)
            labels[way] = np.load(out)
            truth = next(iter(labels.values()))
            dice = (
                2
                * ((labels[way] == n) & (truth == n)).sum()
                / max(1, (labels[way] == n).sum() + (truth == n).sum())
                for n in np.unique(truth)
            )
            found[way]["worst_dice"] = round(float(min(dice)), 5)
    return found


def as_taken(study: Path, path: Path) -> Any:
    """A series as a network takes it, (a, b, c) float32."""
    import torch

    from plinth.verticals.medical.dicom.loader import load_volume
    from plinth.verticals.medical.networks.deepbet import narrowed
    from plinth.verticals.medical.networks.load import load_network
    from plinth.verticals.medical.networks.prepare import prepare

    volume, network = load_volume(study), load_network(path)
    recipe, finds = network.recipe, network.finds
    if finds is not None:
        rows = prepare(volume, finds.recipe).rows
        with torch.inference_mode():
            box = finds.reference.module(rows[None])[0].argmax(0).to(torch.uint8)
        recipe = narrowed(volume, finds.recipe, recipe, box.numpy())
    return prepare(volume, recipe).rows[0].numpy()


def made_up(side: int) -> Any:
    """Smooth blobs between 0 and 1, (side, side, side) float32."""
    import numpy as np
    from scipy import ndimage

    noise = np.random.default_rng(0).normal(size=(side, side, side)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, 4)
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.float32)


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("network", type=Path)
    parser.add_argument("--side", type=int, default=160, help="voxels of the made-up volume")
    parser.add_argument("--volume", type=Path, help="a .npy file (z, y, x) instead")
    parser.add_argument("--study", type=Path, help="a folder with one DICOM series instead")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--own-window", action="store_true", help="of the network, for plinth")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--memory-mb", type=int, default=300, help="for one window")
    parser.add_argument("--ways", default="whole,naive,monai,plinth")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run_one(given.one, given)))
        return
    told = compare(given)
    print_found(told, given.json)


if __name__ == "__main__":
    main()
