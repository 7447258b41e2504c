"""The fraud models: rows of features in, calibrated probability out, nothing outside needed.

Normalisation and calibration are buffers of the module, so the artefact is the whole scorer.
Each row of the output says which variant it comes from, because under load the engine may let
the cheaper one answer. A negative feature means "not told" and counts as the training mean;
all features are >= 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plinth.engine.errors import ConfigError
from plinth.engine.models.store import architecture

BLOCK = 32
"""Rows of every forward, so that a score's bits do not depend on who shares its batch."""

MOST_NODES = 8
"""Of a tree: its table has a place for each set of conditions that hold, which bfloat16 counts."""
LIMIT = 10.0
"""Deviations beyond which a standardised value is cut off, unless a model says otherwise."""


class Standardise(nn.Module):
    """Columns to zero mean and unit deviation, once as they are and once as log(1 + x).

    Args:
        features: number of columns, all >= 0; a negative value becomes the mean.
        limit: deviations beyond which a value is cut off.

    Shapes: (n, features) float32 to (n, 2 * features) float32.
    """

    def __init__(self, features: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(2 * features))
        self.register_buffer("scale", torch.ones(2 * features))

    def fit(self, rows: Tensor) -> None:
        """Measure mean and deviation on training rows (n, features)."""
        both = torch.cat((rows, torch.log1p(rows)), dim=1).double()
        self.mean.copy_(both.mean(0))
        self.scale.copy_(both.std(0).clamp_min(1e-6).reciprocal())

    def forward(self, rows: Tensor) -> Tensor:
        told = (rows >= 0).repeat(1, 2)
        both = torch.cat((rows, torch.log1p(rows.clamp_min(0))), dim=1)
        return torch.where(told, (both - self.mean) * self.scale, 0.0).clamp(
            -self.limit, self.limit
        )


class Calibration(nn.Module):
    """Platt's map from logit to probability: sigmoid(slope * logit + shift).

    Source: J. Platt, Probabilistic outputs for support vector machines, 1999.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slope: Tensor
        self.shift: Tensor
        self.register_buffer("slope", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def fit(self, logits: Tensor, fraud: Tensor) -> None:
        """Fit on logits (n,) and labels (n,), both kinds among them, in float64.

        By Newton's method, each step halved until the likelihood grows. Where every fraud has a
        higher logit than every genuine row it would grow without end: then the labels count as
        Platt's (frauds + 1) / (frauds + 2) and 1 / (genuine + 2).
        """
        values, truth = logits.double().flatten(), fraud.double().flatten()
        bad = truth > 0
        if values[bad].min() > values[~bad].max():
            frauds, genuine = int(bad.sum()), int((~bad).sum())
            truth = torch.where(bad, (frauds + 1) / (frauds + 2), 1 / (genuine + 2)).double()
        design = torch.stack((values, torch.ones_like(values)), dim=1)

        def loss(weights: Tensor) -> Tensor:
            odds = design @ weights
            return (functional.softplus(odds) - truth * odds).sum()

        weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
        for _ in range(50):
            chance = torch.sigmoid(design @ weights)
            gradient = design.T @ (chance - truth)
            curvature = (design * (chance * (1 - chance))[:, None]).T @ design
            ridge = 1e-9 * torch.eye(2, dtype=torch.float64)
            step, now = torch.linalg.solve(curvature + ridge, gradient), loss(weights)
            for _ in range(60):
                if loss(weights - step) <= now:
                    weights = weights - step
                    break
                step = step / 2
        self.slope.copy_(weights[0])
        self.shift.copy_(weights[1])

    def forward(self, logits: Tensor) -> Tensor:
        # Not torch.sigmoid: that of ONNX Runtime is off by 5e-8, a twentieth of a chance of 1e-6.
        return 1 / (1 + torch.exp(-(self.slope * logits.float() + self.shift)))


class GatedBlock(nn.Module):
    """x + W2 (a * sigmoid(b)), where a, b = W1 norm(x): a gated linear unit with a shortcut.

    Source: Dauphin et al., Language modeling with gated convolutional networks, 2017.

    Shapes: (n, width) to (n, width).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor) -> Tensor:
        gated = functional.glu(self.inner(self.norm(rows)), dim=-1)
        step: Tensor = self.dropout(self.outer(gated))
        return rows + step


class FraudScorer(nn.Module):
    """Standardised features, a body that gives logits, and a calibration.

    Args:
        features: number of columns.
        body: (n, 2 * features) to logits (n, 1).
        variant: number that signs each row: 0 the model, 1 its cheaper variant.
        limit: of the standardised features.

    Shapes: (n, features) float32 to (n, 2) float32: probability in [0, 1], variant.
    """

    def __init__(self, features: int, body: nn.Module, variant: int, limit: float = LIMIT) -> None:
        super().__init__()
        self.variant = float(variant)
        self.standardise = Standardise(features, limit)
        self.body = body
        self.calibration = Calibration()

    def logits(self, rows: Tensor) -> Tensor:
        """Uncalibrated log-odds (n, 1)."""
        logits: Tensor = self.body(self.standardise(rows))
        return logits

    def forward(self, rows: Tensor) -> Tensor:
        probability: Tensor = self.calibration(self.logits(rows))
        return torch.cat((probability, torch.full_like(probability, self.variant)), dim=1)


def fraud_mlp(
    features: int = 21,
    width: int = 64,
    blocks: int = 2,
    dropout: float = 0.2,
    limit: float = LIMIT,
) -> FraudScorer:
    """The gated residual network over standardised features."""
    layers: Sequence[nn.Module] = (
        nn.Linear(2 * features, width),
        *(GatedBlock(width, dropout) for _ in range(blocks)),
        nn.LayerNorm(width),
        nn.Linear(width, 1),
    )
    return FraudScorer(features, nn.Sequential(*layers), variant=0, limit=limit)


class Trees(nn.Module):
    """Sum of the leaves that rows fall into, one of each decision tree.

    All conditions of a tree are asked at once; the answers, as the bits of one number, are the
    place of the leaf in a table of the tree.

    Args:
        trees: how many.
        nodes: inner nodes of each, at most :data:`MOST_NODES`.

    Attributes:
        shape: what it was made with.
        feature, threshold: (trees, nodes): a condition holds where its column is at most this.
        leaf: (trees, 2 ** nodes) values by the conditions that hold, the first being worth 1.

    Shapes: (n, features) float32 to (n, 1) float32.

    Raises:
        ConfigError: a tree has too many nodes.
    """

    def __init__(self, trees: int, nodes: int) -> None:
        super().__init__()
        if nodes > MOST_NODES:
            raise ConfigError(
                f"trees of {nodes} nodes, expected at most {MOST_NODES}",
                hint="train the model anew",
            )
        self.feature: Tensor
        self.threshold: Tensor
        self.leaf: Tensor
        self.worth: Tensor
        self.shape = {"trees": trees, "nodes": nodes}
        self.register_buffer("feature", torch.zeros(trees, nodes, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(trees, nodes))
        self.register_buffer("leaf", torch.zeros(trees, 2**nodes))
        self.register_buffer("worth", 2.0 ** torch.arange(nodes), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        asked = rows.t().index_select(0, self.feature.flatten())
        holds = (asked <= self.threshold.view(-1, 1)).float().view(*self.feature.shape, -1)
        return self.leaf.gather(1, (self.worth @ holds).long()).sum(0)[:, None]


class FraudEnsemble(FraudScorer):
    """The gated network and boosted trees: their log-odds are added, then calibrated.

    Args:
        network: the scorer of its body and standardisation.
        trees: over the features as they are; one that is not told is its training mean.
    """

    def __init__(self, network: FraudScorer, trees: Trees) -> None:
        super().__init__(len(network.standardise.mean) // 2, network.body, variant=0)
        self.standardise = network.standardise
        self.trees = trees

    def logits(self, rows: Tensor) -> Tensor:
        told = torch.where(rows >= 0, rows, self.standardise.mean[: rows.shape[1]])
        grown: Tensor = self.trees(told)
        return super().logits(rows) + grown


def fraud_ensemble(trees: int, nodes: int, **network: Any) -> FraudEnsemble:
    """The gated network of :func:`fraud_mlp`, and boosted trees beside it."""
    return FraudEnsemble(fraud_mlp(**network), Trees(trees, nodes))


def fraud_lite(features: int = 21, limit: float = LIMIT) -> FraudScorer:
    """Logistic regression over the same standardised features: the cheaper variant."""
    return FraudScorer(features, nn.Linear(2 * features, 1), variant=1, limit=limit)


architecture("fraud-mlp")(fraud_mlp)
architecture("fraud-lite")(fraud_lite)
architecture("fraud-ensemble")(fraud_ensemble)
