"""Train the nodule network on synthetic patches.

``nice python -m plinth.verticals.medical.training.train --out verticals/medical/store``

Everything it sees is drawn by ``training.patches``; its quality is measured on
held-out patches and on held-out chest phantoms, and written into the manifest. No patient was
involved, so nothing follows for patients.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from plinth.engine import ModelStore
from plinth.engine.compression.registry import Recipe
from plinth.engine.compression.training import Compressed, compress
from plinth.verticals.medical.nodules.network import NoduleUNet, nodule_spec, windowed
from plinth.verticals.medical.training.patches import patch
from plinth.verticals.medical.training.quality import on_patches, on_phantoms

PATCH = (24, 40, 40)
COMMON_VOXELS, MAX_WEIGHT = 400, 12
DESCRIPTION = (
    "Nodule candidates in chest CT. Trained on synthetic patches only and measured on synthetic "
    "phantoms only; never validated on patients. Research use only, not for diagnosis."
)

COMMAND = "python -m plinth.verticals.medical.training.train"


def batch(random: np.random.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windowed patches (rows, 1, z, y, x), their masks and weights (rows, z, y, x), float32."""
    pairs = [patch(random, PATCH) for _ in range(rows)]
    volumes = torch.stack([windowed(torch.from_numpy(hu))[None] for hu, _ in pairs])
    masks = torch.stack([torch.from_numpy(mask).float() for _, mask in pairs])
    weights = torch.stack([torch.from_numpy(weight(mask)) for _, mask in pairs])
    return volumes, masks, weights


def weight(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Weight of each voxel (z, y, x): 1, and more inside a nodule the smaller it is.

    Unweighted, a nodule of 4 mm counts for a hundredth of one of 20 mm, and is not learnt.
    """
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel()).astype(np.float32)
    shares = np.clip((COMMON_VOXELS / np.maximum(sizes, 1)) ** (2 / 3), 1, MAX_WEIGHT)
    shares[0] = 1
    return cast(npt.NDArray[np.float32], shares[pieces])


def loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross entropy plus weighted soft Dice of the nodule class over the batch."""
    difference = logits[:, 1] - logits[:, 0]
    entropy = F.binary_cross_entropy_with_logits(
        difference, masks, weights, pos_weight=torch.tensor(2.0)
    )
    share = torch.sigmoid(difference)
    both = (weights * share * masks).sum()
    total = (weights * share).sum() + (weights * masks).sum()
    return entropy + 1 - (2 * both + 1) / (total + 1)


def train(seed: int, steps: int, rows: int) -> NoduleUNet:
    """A trained network with its batch norm folded.

    Args:
        seed: of the weights and of every patch.
        steps: optimiser steps.
        rows: patches per step.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    net = NoduleUNet(norm=True).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 8e-3, total_steps=steps, pct_start=0.1
    )
    smooth, begun = 1.0, time.monotonic()
    for step in range(1, steps + 1):
        volumes, masks, weights = batch(random, rows)
        value = loss(net(volumes), masks, weights)
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        smooth += 0.02 * (value.item() - smooth)
        if step % 50 == 0:
            print(f"step {step}: loss {smooth:.3f}, {time.monotonic() - begun:.0f} s", flush=True)
    return net.folded()


def packed(net: NoduleUNet, seed: int, rows: int = 96) -> Compressed:
    """The network with weights of about 3.4 bits: a ninth of its bytes, as it is shipped.

    Args:
        net: trained, its batch norm folded.
        seed: of the patches that show how the inputs of its layers go together.
        rows: how many they are.
    """
    volumes, _, _ = batch(np.random.default_rng((seed, rows)), rows)
    steps = {"quantization_aware": {"bits": "even", "step": 0.4, "feedback": True}}
    recipe = Recipe(steps, epochs=0, batch=8)
    return compress(
        net, {"volume": volumes}, recipe, lambda run, given: {"logits": run(given["volume"])}
    )


def main() -> None:
    """Train, pack, measure, save."""
    parser = argparse.ArgumentParser(description="Train the nodule network on synthetic patches.")
    parser.add_argument("--out", type=Path, required=True, help="model store to save to")
    parser.add_argument("--version", default="1.1.0")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--rows", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    small = packed(train(given.seed, given.steps, given.rows), given.seed)
    source = (
        f"python -m {__spec__.name} --seed {given.seed} --steps {given.steps} --rows {given.rows}"
    )
    store_measured(small, given.out, given.version, source)


def store_measured(small: Compressed, out: Path, version: str, source: str) -> None:
    """Measure a network and write it, with what was found, into a model store."""
    with tempfile.TemporaryDirectory() as folder:
        trial = ModelStore(Path(folder))
        trial.save(nodule_spec(version, {}, DESCRIPTION, source), small)
        metrics = {
            **on_patches(cast(NoduleUNet, small.module)),
            **on_phantoms(trial.root, version),
        }
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    spec = nodule_spec(version, metrics, DESCRIPTION, source)
    print(ModelStore(out).save(spec, small))


if __name__ == "__main__":
    main()
