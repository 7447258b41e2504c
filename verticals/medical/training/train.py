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


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description="Train the nodule network on synthetic patches.")
    parser.add_argument("--out", type=Path, required=True, help="model store to save to")
    parser.add_argument("--version", default="1.0.0")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--rows", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    net = train(given.seed, given.steps, given.rows)
    source = (
        f"python -m {__spec__.name} --seed {given.seed} --steps {given.steps} --rows {given.rows}"
    )
    with tempfile.TemporaryDirectory() as folder:
        trial = ModelStore(Path(folder))
        trial.save(nodule_spec(given.version, {}, DESCRIPTION, source), net)
        metrics = {**on_patches(net), **on_phantoms(trial.root, given.version)}
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")
    spec = nodule_spec(given.version, metrics, DESCRIPTION, source)
    print(ModelStore(given.out).save(spec, net))


if __name__ == "__main__":
    main()
