"""What a high score is put down to: groups of features, masked together; what a change is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import factorial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine import Call, Closed, Flow, Refused
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.schema import Reason

MASKED = -1.0
"""A feature with this value is "not told" to the model."""
LAST_BITS = 1e-6
"""Scores closer than this differ by arithmetic alone."""
MIN_EFFECT = 0.3
"""Log-odds below which a group is no reason."""

MOST_ROWS = 1_024
"""Rows of one call, whatever the number of alerts; the coalitions of ten groups."""

NO_TIME = Reason(code="X01", text="High score; there was no time to find its reasons")
ESTIMATED = Reason(code="X02", text="Reasons estimated; there was no time for exact ones")


def log_odds(scores: Tensor) -> Tensor:
    """In float64; what float32 cannot tell from 1 counts as the nearest below, 16.6.

    By NumPy: MKL, which torch asks, has other threads help with a thousand of them and wait for
    more at full speed, which took a quarter of a payment's CPU time.
    """
    chances = np.clip(scores.double().numpy(), 1e-15, 1 - 2**-24)
    return torch.as_tensor(np.log(chances) - np.log1p(-chances))


class Coalitions:
    """Sets of groups that are told to the model, and what follows from its answers.

    Args:
        told: bool (sets, groups); the first set is empty.
        weights: float64 (sets, groups): of the log-odds of each set in the effect of each group.
        member: bool (groups, features).
    """

    def __init__(self, told: Tensor, weights: Tensor, member: Tensor) -> None:
        self._told = (told[1:].double() @ member.double()) > 0
        self._weights = weights
        self.at_once = max(1, (MOST_ROWS - 1) // len(self._told))

    def masked_rows(self, rows: Tensor) -> Tensor:
        """What to ask the model to explain rows.

        Args:
            rows: (n, features) float32, told in full; ``at_once`` of them fit into a call.

        Returns:
            float32 (n * (sets - 1) + 1, features): each row by each set but the empty one; at
            the end one row that tells nothing.
        """
        masked = torch.where(self._told, rows[:, None, :], MASKED).flatten(0, 1)
        return torch.cat((masked, torch.full((1, rows.shape[1]), MASKED)))

    def contributions(self, scores: Tensor) -> Tensor:
        """How much each group raised each score, in log-odds, (n, groups).

        Args:
            scores: probabilities of :meth:`masked_rows`, (n * (sets - 1) + 1,).
        """
        odds, weights = log_odds(scores).numpy(), self._weights.numpy()
        each = odds[:-1].reshape(-1, len(self._told))
        return torch.from_numpy(each @ weights[1:] + odds[-1] * weights[0])


class Groups:
    """Groups of model features that are told or masked together, with the reason each stands for.

    Args:
        columns: what the model sees.

    Attributes:
        exact: all sets of groups: Shapley values by their definition.
        pairs: each group left out, and each alone: Shapley values where groups interact at most
            in pairs. For eight groups 18 sets take the place of 256.
    """

    def __init__(self, columns: Columns) -> None:
        told = columns.reasons
        self.reasons = tuple(Reason(code=code, text=text) for code, text, _ in told)
        self.members = tuple(names for _, _, names in told)
        member = torch.tensor([[name in names for name in columns.names] for names in self.members])
        self.exact = _exact(member)
        self.pairs = _pairs(member)

    def main(self, effects: Sequence[float]) -> list[Reason]:
        """The reasons for a score, the strongest first."""
        order = sorted(range(len(self.reasons)), key=lambda group: -effects[group])
        return [self.reasons[group] for group in order if effects[group] >= MIN_EFFECT]


def _exact(member: Tensor) -> Coalitions:
    """Every set; weights by the definition (Shapley, A value for n-person games, 1953)."""
    count = len(member)
    told = (torch.arange(1 << count)[:, None] >> torch.arange(count)) & 1
    orders = [factorial(k) * factorial(count - 1 - k) / factorial(count) for k in range(count)]
    share = torch.tensor(orders, dtype=torch.float64)
    others = told.sum(1, keepdim=True) - told
    weights = torch.where(told > 0, share[others], -share[others])
    return Coalitions(told > 0, weights, member)


def _pairs(member: Tensor) -> Coalitions:
    """The mean of what the score loses without a group and what it gains from the group alone."""
    count = len(member)
    alone = torch.eye(count, dtype=torch.bool)
    nothing = torch.zeros(1, count, dtype=torch.bool)
    half = torch.full((1, count), 0.5, dtype=torch.float64)
    each = alone.double() / 2
    told = torch.cat((nothing, ~alone, alone, ~nothing))
    return Coalitions(told, torch.cat((-half, -each, each, half)), member)


def first_question(groups: Groups, model: str, rows: Tensor) -> Call:
    """What :func:`explain` asks first."""
    return Call(model, groups.exact.masked_rows(rows[: groups.exact.at_once]))


def explain(
    groups: Groups, model: str, variant: int, rows: Tensor, first: Call | None = None
) -> Flow[list[tuple[Tensor | None, bool]]]:
    """The effects of the groups on scores of one variant of a model, and whether they are exact.

    Where there is no time for exact ones they are estimated by pairs, and are none where there is
    no time for that either. An answer by another variant than the one that scored explains nothing.

    Args:
        groups: of the features.
        model: its name in the engine.
        variant: that scored, as it signs its rows.
        rows: (n, features) float32.
        first: its first question, where that was foreseen.
    """
    found: list[tuple[Tensor | None, bool]] = []
    exact = True
    while len(found) < len(rows):
        sets = groups.exact if exact else groups.pairs
        part = rows[len(found) : len(found) + sets.at_once]
        call, first = first or Call(model, sets.masked_rows(part)), None
        try:
            masked: Tensor | None = yield call
        except Closed:  # a decision of a server that ends would lack its reasons for ever
            raise
        except Refused:
            masked = None
        if masked is not None and bool((masked[:, 1] == variant).all()):
            found += [(one, exact) for one in sets.contributions(masked[:, 0])]
        elif exact:
            exact = False
        else:
            found += [(None, False)] * len(part)
    return found


def why_other(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why two decisions on one payment differ, made at two times from the same records.

    Args:
        before, now: the fields of the decisions.
    """

    def other(*names: str) -> bool:
        return any(before.get(name) != now.get(name) for name in names)

    def both(*names: str) -> str:
        then, again = (" ".join(str(one.get(name)) for name in names) for one in (before, now))
        return f"{then} then, {again} now"

    why = []
    if other("model", "model_version"):
        why.append(f"another model: {both('model', 'model_version')}")
    elif other("score"):
        scores = before.get("score"), now.get("score")
        if None not in scores and abs(scores[0] - scores[1]) <= LAST_BITS:  # type: ignore[operator]
            why.append("the score differs in its last bits: another machine, backend or precision")
        elif before.get("duplicate") or now.get("duplicate"):
            why.append(
                "a payment that came twice has the features of its first time, which may have "
                "come in another order from another partition"
            )
        else:
            why.append(
                "other features: other settings of them (rates, lateness_days, max_cards, ...), "
                "another version of Plinth, or a label that came in another order"
            )
    if other("rules_version"):
        why.append(f"other rules: {both('rules_version')}")
    flags = "features_late", "features_partial", "duplicate", "conflict"
    why += [f"{name}: {both(name)}" for name in flags if other(name)]
    if not why and other("decision", "reason_codes"):
        why.append("other thresholds: the same score, model and rules")
    if other("extra"):
        why.append("unknown_fields is set otherwise")
    return why or ["the same fields, written otherwise"]
