"""What a high score is put down to: groups of features, masked together; what a change is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.schema import Reason

MASKED = -1.0
"""A feature with this value is "not told" to the model."""
LAST_BITS = 1e-6
"""Scores closer than this differ by arithmetic alone."""
MIN_EFFECT = 0.3
"""Log-odds below which a group is no reason."""

NO_TIME = Reason(code="X01", text="High score; there was no time to find its reasons")


class Groups:
    """Groups of model features that are told or masked together, with the reason each stands for.

    Args:
        columns: what the model sees.
    """

    def __init__(self, columns: Columns) -> None:
        told = columns.reasons
        self.reasons = tuple(Reason(code=code, text=text) for code, text, _ in told)
        self.members = tuple(names for _, _, names in told)
        self._member = torch.tensor(
            [[name in names for name in columns.names] for names in self.members]
        )

    def masked_rows(self, rows: Tensor) -> Tensor:
        """What to ask the model to explain rows.

        Args:
            rows: (n, features) float32, told in full.

        Returns:
            float32 (n * (2 * groups + 1) + 1, features): for each row, the row without each group,
            with only each group, and in full; at the end one row that tells nothing.
        """
        full = rows[:, None, :]
        without = torch.where(self._member, MASKED, full)
        only = torch.where(self._member, full, MASKED)
        nothing = torch.full((1, rows.shape[1]), MASKED)
        return torch.cat((torch.cat((without, only, full), dim=1).flatten(0, 1), nothing))

    def contributions(self, scores: Tensor) -> Tensor:
        """How much each group raised each score, in log-odds, (n, groups).

        The mean of a group's effect when it is taken away from everything and when it is added to
        nothing. It is the Shapley value exactly where groups interact at most in pairs; with eight
        groups, 18 rows take the place of 256.

        Args:
            scores: probabilities of :meth:`masked_rows`, (n * (2 * groups + 1) + 1,).
        """
        odds = torch.logit(scores.double(), eps=1e-7)
        count = len(self.reasons)
        each = odds[:-1].view(-1, 2 * count + 1)
        without, only, full = each[:, :count], each[:, count:-1], each[:, -1:]
        return ((full - without) + (only - odds[-1])) / 2

    def main(self, effects: Sequence[float]) -> list[Reason]:
        """The reasons for a score, the strongest first."""
        order = sorted(range(len(self.reasons)), key=lambda group: -effects[group])
        return [self.reasons[group] for group in order if effects[group] >= MIN_EFFECT]


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
