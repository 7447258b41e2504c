"""How good scores are, and from which scores on to act."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.engine.errors import ConfigError
from plinth.verticals.finance.training.history import Data, Rows

Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.bool_]


def auc(scores: Scores, fraud: Labels) -> float:
    """Area under the ROC curve: the chance that a fraud outscores a genuine row; ties half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    bad = int(fraud.sum())
    good = len(fraud) - bad
    return float((ranks[fraud].sum() - bad * (bad + 1) / 2) / (bad * good))


def average_precision(scores: Scores, fraud: Labels) -> float:
    """Precision averaged over the frauds in order of score; equal scores count as one step."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(fraud[order])
    last = np.append(np.diff(scores[order]) != 0, True)
    found, seen = hits[last], np.nonzero(last)[0] + 1
    gained = np.diff(found, prepend=0)
    return float((gained * found / seen).sum() / hits[-1])


def card_precision(
    scores: Scores,
    fraud: Labels,
    card: npt.NDArray[np.integer[Any]],
    day: npt.NDArray[np.integer[Any]],
    *,
    budget: int = 100,
) -> float:
    """Share of the ``budget`` highest cards of a day that are defrauded, mean over the days.

    Per day a card has the largest of its scores and of its labels; cards found defrauded leave
    the later days. (Fraud Detection Handbook, chapter 4, "Card Precision top-k".)

    Args:
        scores, fraud: (n,).
        card: (n,) card numbers; day: (n,) day numbers.
        budget: cards that can be looked at per day.
    """
    found: set[int] = set()
    shares = []
    for today in np.unique(day):
        rows = np.nonzero((day == today) & ~np.isin(card, list(found)))[0]
        cards, place = np.unique(card[rows], return_inverse=True)
        top, bad = np.full(len(cards), -np.inf), np.zeros(len(cards), bool)
        np.maximum.at(top, place, scores[rows])
        np.logical_or.at(bad, place, fraud[rows])
        chosen = np.argsort(-top, kind="stable")[:budget]
        shares.append(bad[chosen].sum() / budget)
        found.update(cards[chosen[bad[chosen]]].tolist())
    return float(np.mean(shares))


def calibration_error(scores: Scores, fraud: Labels, *, bins: int = 10) -> float:
    """Expected calibration error over bins of equally many rows, in probability."""
    parts = np.array_split(np.argsort(scores, kind="stable"), bins)
    gaps = [abs(scores[part].mean() - fraud[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(scores))


def measure(scores: Scores, data: Data, chosen: Rows, budget: int) -> dict[str, float]:
    """AUC, average precision and card precision of scores."""
    fraud, card = data.table["fraud"][chosen], data.table["customer"][chosen]
    cards = card_precision(scores, fraud, card, data.day[chosen], budget=budget)
    return {
        "auc": auc(scores, fraud),
        "ap": average_precision(scores, fraud),
        "card_precision_100": cards,
    }


def check_thresholds(budget: int, cost: float) -> None:
    """See that thresholds can be set by these.

    Args:
        budget: cards per day that people can look at.
        cost: base currency lost by refusing a genuine payment.

    Raises:
        ConfigError: by one of them nothing or everything would be an alert or declined.
    """
    if budget < 1:
        raise ConfigError(f"alert budget {budget}: expected at least 1 card per day")
    if not 0 < cost < inf:
        raise ConfigError(f"decline cost {cost:g}: expected more than 0, in base currency")


def review_threshold(scores: Scores, data: Data, chosen: Rows, budget: int) -> float:
    """The score above which ``budget`` cards per day lie on average over these rows."""
    days = data.day[chosen]
    _, place = np.unique(card_days(data, chosen), return_inverse=True)
    top = np.zeros(place.max() + 1)
    np.maximum.at(top, place, scores)
    wanted = min(budget * len(np.unique(days)), len(top))
    return float(np.sort(top)[-wanted])


def card_days(data: Data, chosen: Rows) -> Rows:
    """One number for each pair of card and day, (n,)."""
    return np.asarray(data.day[chosen] * (1 << 32) + data.table["customer"][chosen])


def decline_threshold(scores: Scores, data: Data, chosen: Rows, cost: float) -> float:
    """The score from which refusing costs least: frauds cost their amount, mistakes ``cost``.

    1 where it never costs less than to refuse nothing.
    """
    order = np.argsort(-scores, kind="stable")
    table, falling = data.table[chosen[order]], scores[order]
    costs = np.cumsum(np.where(table["fraud"], -table["amount"], cost))
    last = np.append(np.diff(falling) != 0, True)  # who refuses a score refuses all that have it
    costs, falling = costs[last], falling[last]
    least = int(np.argmin(costs))
    return float(falling[least]) if costs[least] < 0 else 1.0
