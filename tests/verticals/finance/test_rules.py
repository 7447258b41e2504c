"""Rules beside the model, and what a high score is put down to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import ModelStore
from plinth.verticals.finance.features.online import FEATURES, MODEL_FEATURES
from plinth.verticals.finance.rules import (
    GROUPS,
    MIN_EFFECT,
    Rules,
    contributions,
    main_reasons,
    masked_rows,
)
from plinth.verticals.finance.vertical import STORE

LITE = ModelStore(STORE).load("fraud-lite").module
RULES = Rules(hard_amount=5000.0, card_count_5m=10, device_cards_24h=5)


def row(**values: float) -> list[float]:
    return [values.get(name, 0.0) for name in FEATURES]


@pytest.mark.parametrize(
    ("values", "action", "codes"),
    [
        ({"amount": 5000.0, "card_count_5m": 10, "device_cards_24h": 5}, "approve", []),
        ({"amount": 5000.01}, "decline", ["R01"]),
        ({"card_count_5m": 11}, "review", ["R02"]),
        ({"device_cards_24h": 6}, "review", ["R03"]),
        (
            {"amount": 9e6, "card_count_5m": 99, "device_cards_24h": 99},
            "decline",
            ["R01", "R02", "R03"],
        ),
    ],
)
def test_rules_hold_above_their_limits(
    values: dict[str, float], action: str, codes: list[str]
) -> None:
    found, why = RULES.apply(row(**values))
    assert (found, [reason.code for reason in why]) == (action, codes)


def test_a_rule_without_a_limit_is_off() -> None:
    off = Rules(None, None, None)
    assert off.apply(row(amount=9e6, card_count_5m=99, device_cards_24h=99)) == ("approve", [])


def test_every_feature_of_the_model_belongs_to_one_reason() -> None:
    members = [name for _, names in GROUPS for name in names]
    assert sorted(members) == sorted(MODEL_FEATURES)
    codes = [reason.code for reason, _ in GROUPS]
    assert len(set(codes)) == len(codes)


@given(st.integers(1, 4), st.integers(0, 99))
def test_reasons_of_an_additive_model_add_up_to_its_score(count: int, seed: int) -> None:
    """For a logistic regression the contributions are exact: nothing is left over."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, len(MODEL_FEATURES), generator=generator) * 3
    with torch.inference_mode():
        scores = LITE(masked_rows(rows))[:, 0]
        full = torch.logit(LITE(rows)[:, 0].double())
        nothing = torch.logit(LITE(torch.full((1, rows.shape[1]), -1.0))[0, 0].double())
    effects = contributions(scores)
    assert effects.shape == (count, len(GROUPS))
    torch.testing.assert_close(effects.sum(1), full - nothing, atol=2e-3, rtol=1e-3)


def test_the_strongest_reasons_come_first_and_weak_ones_not_at_all() -> None:
    effects = [0.0] * len(GROUPS)
    effects[2], effects[5], effects[0], effects[1] = 1.0, 4.0, MIN_EFFECT - 0.01, -3.0
    assert [reason.code for reason in main_reasons(effects)] == ["M06", "M03"]
