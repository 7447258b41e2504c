"""What a high score is put down to."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import ModelStore
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.online import MODEL_FEATURES
from plinth.verticals.finance.features.program import STANDARD
from plinth.verticals.finance.reasons import MIN_EFFECT, Groups
from plinth.verticals.finance.settings import STORE

GROUPS = Groups(Columns.all(STANDARD))
LITE = ModelStore(STORE).load("fraud-lite").module


def test_every_feature_of_the_model_belongs_to_one_reason() -> None:
    members = [name for names in GROUPS.members for name in names]
    assert sorted(members) == sorted(MODEL_FEATURES)
    codes = [reason.code for reason in GROUPS.reasons]
    assert len(set(codes)) == len(codes)


@given(st.integers(1, 4), st.integers(0, 99))
def test_reasons_of_an_additive_model_add_up_to_its_score(count: int, seed: int) -> None:
    """For a logistic regression the contributions are exact: nothing is left over."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, len(MODEL_FEATURES), generator=generator) * 3
    with torch.inference_mode():
        scores = LITE(GROUPS.masked_rows(rows))[:, 0]
        full = torch.logit(LITE(rows)[:, 0].double())
        nothing = torch.logit(LITE(torch.full((1, rows.shape[1]), -1.0))[0, 0].double())
    effects = GROUPS.contributions(scores)
    assert effects.shape == (count, len(GROUPS.reasons))
    torch.testing.assert_close(effects.sum(1), full - nothing, atol=2e-3, rtol=1e-3)


def test_the_strongest_reasons_come_first_and_weak_ones_not_at_all() -> None:
    effects = [0.0] * len(GROUPS.reasons)
    effects[2], effects[5], effects[0], effects[1] = 1.0, 4.0, MIN_EFFECT - 0.01, -3.0
    assert [reason.code for reason in GROUPS.main(effects)] == ["M06", "M03"]
