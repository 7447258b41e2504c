"""What hangs on the weights of a model: calibration, thresholds, quality, reference of drift.

Whoever has weights and a history gets it here: training, retraining, and who makes a compressed
variant a version of its own. Networks are stored packed, and all that is derived is of the packed
weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from plinth.engine import ConfigError
from plinth.engine.compression.registry import Recipe as Packing
from plinth.engine.compression.training import Compressed, compress
from plinth.verticals.finance.features.columns import FACT as SEEN
from plinth.verticals.finance.model import FraudEnsemble, FraudScorer
from plinth.verticals.finance.succession.champion import WINDOW
from plinth.verticals.finance.succession.drift import FACT, Reference
from plinth.verticals.finance.training.history import WEEK, Data, Rows
from plinth.verticals.finance.training.quality import (
    calibration_error,
    card_days,
    decline_threshold,
    measure,
    review_threshold,
)

Quality = dict[str, float]
Stored = FraudScorer | Compressed
"""A model as a store takes it: as it is, or packed."""

PACKING = Packing(
    {"quantization_aware": {"bits": "even", "step": 0.5, "feedback": True}}, epochs=0, batch=512
)
"""About 3.5 bits a weight, nothing is trained; chosen on another simulated population."""
PACKING_ROWS = 4096


class Settled(NamedTuple):
    """A calibrated model, and from which scores on to act."""

    stored: Stored
    review: float
    decline: float


def scorer(stored: nn.Module | Compressed) -> FraudScorer:
    """The network of what is stored.

    Raises:
        ConfigError: it is no fraud model.
    """
    module = stored.module if isinstance(stored, Compressed) else stored
    if not isinstance(module, FraudScorer):
        raise ConfigError(f"expected a fraud model, not {type(module).__name__}")
    return module


def pack(model: FraudScorer, data: Data, chosen: Rows) -> Compressed:
    """A model whose weights take a seventh of the bytes or less; leaves of trees are in float16.

    Args:
        model: fitted.
        data: where the rows are.
        chosen: row numbers, a few thousand of which show how inputs go together.
    """
    some = chosen[:: -(-len(chosen) // PACKING_ROWS)]
    rows = {"features": torch.from_numpy(data.rows[some])}
    small = compress(model, rows, PACKING, lambda run, given: {"score": run(given["features"])})
    if isinstance(small.module, FraudEnsemble):
        leaf = small.module.trees.leaf
        leaf.copy_(leaf.half())
    return small.as_now()


@torch.inference_mode()
def score(model: FraudScorer, data: Data, chosen: Rows) -> npt.NDArray[np.float64]:
    """Probabilities (n,) of some rows."""
    parts = torch.from_numpy(data.rows[chosen]).split(8192)  # type: ignore[no-untyped-call]
    return torch.cat([model(part)[:, 0] for part in parts]).double().numpy()


def week_of(data: Data, first: int, known_from: int) -> Rows:
    """Rows of a week without cards known as defrauded before, frauds and genuine ones among them.

    Raises:
        ConfigError: there are not both; nothing could be measured on it.
    """
    rows = data.test(first, known_from=known_from)
    frauds = int(data.table["fraud"][rows].sum())
    if not 0 < frauds < len(rows):
        raise ConfigError(
            f"days {first} to {first + WEEK - 1} have {frauds:,} frauds in {len(rows):,} payments "
            "with cards not known as defrauded before; both kinds are needed",
            hint="bring payments of more cards, and all their labels",
        )
    return rows


def settle(stored: Stored, data: Data, rows: Rows, budget: int, cost: float) -> Settled:
    """Calibrate a model on payments it was not trained on, and find its thresholds there.

    Args:
        stored: the model; its calibration is replaced.
        data: where the rows are.
        rows: row numbers, frauds and genuine ones among them.
        budget: cards per day that people can look at; sets the review threshold.
        cost: lost by refusing a genuine payment; sets the decline threshold.
    """
    model = scorer(stored)
    with torch.inference_mode():
        parts = torch.from_numpy(data.rows[rows]).split(8192)  # type: ignore[no-untyped-call]
        logits = torch.cat([model.logits(part) for part in parts])
    model.calibration.fit(logits, torch.from_numpy(data.table["fraud"][rows]))
    scores = score(model, data, rows)
    review = review_threshold(scores, data, rows, budget)
    decline = decline_threshold(scores, data, rows, cost)
    now = stored.as_now() if isinstance(stored, Compressed) else stored
    return Settled(now, review, max(review, decline))


def judge(settled: Settled, data: Data, test: Rows, budget: int) -> Quality:
    """Thresholds, and what a model is worth on a week of its own.

    ``amount_alone_*`` is the baseline on the same week: the amount as the score.
    """
    scores, fraud = score(scorer(settled.stored), data, test), data.table["fraud"][test]
    alerts = card_days(data, test)[scores >= settled.review]
    refused = scores >= settled.decline
    amount = measure(data.table["amount"][test], data, test, budget)
    return {
        **measure(scores, data, test, budget),
        **{f"amount_alone_{name}": value for name, value in amount.items()},
        "calibration_error": calibration_error(scores, fraud),
        "review_threshold": settled.review,
        "decline_threshold": settled.decline,
        "alert_cards_per_day": len(np.unique(alerts)) / WEEK,
        "decline_precision": float(fraud[refused].mean()) if refused.any() else 0.0,
        "decline_recall": float(refused[fraud].mean()),
        "review_recall": float((scores[fraud] >= settled.review).mean()),
    }


def facts_of(
    stored: Stored, data: Data, recent: Rows, window: dict[str, Any], seen: dict[str, str]
) -> dict[str, Any]:
    """What the store keeps with a model: what drift is held against, its window, its features.

    Args:
        stored: calibrated.
        data: whose rows are the columns that the model sees.
        recent: row numbers of the reference.
        window: of the payments that it was made from; see :data:`champion.WINDOW`.
        seen: the features that it sees, and what each means.
    """
    scores = score(scorer(stored), data, recent)
    reference = Reference.of(data.rows[recent], scores, data.table["fraud"][recent], tuple(seen))
    return {FACT: reference.model_dump(), WINDOW: window, SEEN: seen}
