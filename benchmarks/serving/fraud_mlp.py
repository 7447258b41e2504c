"""The model every server of the comparison answers with: 64 features in, one score out.

    python benchmarks/serving/fraud_mlp.py build/serving/fraud-mlp.safetensors

A server finds the file through the environment variable ``FRAUD_MLP``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FEATURES = 64
HIDDEN = 256
SEED = 20261124


def network() -> nn.Sequential:
    """Three hidden layers with ReLU, then a sigmoid: (n, 64) float32 to (n, 1) in 0..1."""
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 1),
        nn.Sigmoid(),
    )


def make(path: Path) -> None:
    """Write the weights; the same bytes each time.

    The layers are He-initialised, so that scores spread over 0..1 and a mixed-up answer shows.
    """
    made = network()
    dice = torch.Generator().manual_seed(SEED)
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=dice)
            nn.init.normal_(layer.bias, std=0.1, generator=dice)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made.state_dict(), path)


def load(path: str | Path | None = None) -> nn.Sequential:
    """The network on one CPU thread, ready for :func:`score`.

    Args:
        path: the weights; by default what ``FRAUD_MLP`` names.
    """
    torch.set_num_threads(1)
    loaded = network()
    loaded.load_state_dict(load_file(path or os.environ["FRAUD_MLP"]))
    return loaded.eval()


def tensor(rows: list[list[float]]) -> Tensor:
    """Rows of features as (n, 64) float32, by numpy, which reads lists four times as fast."""
    return torch.from_numpy(np.array(rows, dtype=np.float32))


@torch.inference_mode()
def score(model: nn.Sequential, rows: list[list[float]]) -> list[float]:
    """Score rows of 64 features, in order."""
    scores: Tensor = model(tensor(rows))
    return scores[:, 0].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    make(parser.parse_args().path)
