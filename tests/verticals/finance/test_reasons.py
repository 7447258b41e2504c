"""What a high score is put down to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from math import factorial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plinth.verticals.finance.model  # noqa: F401  (registers the architectures)
from plinth.engine import Closed, ModelStore, QueueFull
from plinth.verticals.finance.decisions.reasons import (
    MASKED,
    MIN_EFFECT,
    MOST_ROWS,
    Groups,
    explain,
    log_odds,
)
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.features.online import MODEL_FEATURES
from plinth.verticals.finance.features.program import STANDARD, compiled
from plinth.verticals.finance.settings import STORE

GROUPS = Groups(Columns.all(STANDARD))
LITE = ModelStore(STORE).load("fraud-lite").module


def few_groups(count: int) -> Groups:
    """Groups of one feature each."""
    program = compiled(Declaration.model_validate(declared(count)))
    return Groups(Columns.all(program))


def declared(count: int) -> dict[str, Any]:
    features = [
        {"name": f"f{n}", "kind": "count", "by": "card", "over": f"{n + 1}h", "reason": f"A{n}"}
        for n in range(count)
    ]
    return {"feature": features, "reasons": {f"A{n}": "text" for n in range(count)}}


def test_more_reasons_than_exact_ones_can_be_found_for_are_refused() -> None:
    assert len(few_groups(10).reasons) == 10
    with pytest.raises(ValueError, match="name 11 reasons, expected at most 10"):
        Declaration.model_validate(declared(11))


def test_every_feature_of_the_model_belongs_to_one_reason() -> None:
    members = [name for names in GROUPS.members for name in names]
    assert sorted(members) == sorted(MODEL_FEATURES)
    codes = [reason.code for reason in GROUPS.reasons]
    assert len(set(codes)) == len(codes)


@given(st.integers(1, 3), st.integers(0, 99))
def test_effects_are_shapley_values_by_their_definition(count: int, seed: int) -> None:
    """The mean, over all orders in which groups may be told, of what telling each one changes.

    The score is a random number for every set of groups, so groups interact in every way.
    """
    groups = few_groups(5)
    table = torch.rand(count, 1 << 5, generator=torch.Generator().manual_seed(seed)).double()

    def score(rows: torch.Tensor, row: int) -> torch.Tensor:
        told = (rows != MASKED).int()
        return table[row, (told << torch.arange(5)).sum(1)]

    asked = groups.exact.masked_rows(torch.ones(count, 5))
    rows = [*asked[:-1].split(31), asked[-1:]]
    table[:, 0] = table[0, 0]
    scores = torch.cat([score(part, min(n, count - 1)) for n, part in enumerate(rows)])
    found = groups.exact.contributions(scores)
    odds = torch.logit(table)
    for row in range(count):
        for group in range(5):
            change = 0.0
            for order in permutations(range(5)):
                before = sum(1 << one for one in order[: order.index(group)])
                change += float(odds[row, before | 1 << group] - odds[row, before])
            assert float(found[row, group]) == pytest.approx(change / factorial(5), abs=1e-9)


@given(st.integers(1, 4), st.integers(0, 99))
def test_reasons_of_an_additive_model_add_up_to_its_score(count: int, seed: int) -> None:
    """Of a logistic regression the estimate by pairs leaves nothing over and is exact."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, len(MODEL_FEATURES), generator=generator) * 0.05
    pairs, exact = GROUPS.pairs, GROUPS.exact
    with torch.inference_mode():
        effects = pairs.contributions(LITE(pairs.masked_rows(rows))[:, 0])
        true = exact.contributions(LITE(exact.masked_rows(rows))[:, 0])
        full = log_odds(LITE(rows)[:, 0])
        nothing = log_odds(LITE(torch.full((1, rows.shape[1]), MASKED))[0, 0])
    assert effects.shape == (count, len(GROUPS.reasons))
    torch.testing.assert_close(effects.sum(1), full - nothing, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(effects, true, atol=2e-3, rtol=1e-3)


def answers(told: list[Any]) -> tuple[list[Any], list[int]]:
    """What comes of explaining nine rows when the engine answers so, and the sizes of the calls.

    Args:
        told: for each call an error, or the variant that signs all its rows.
    """
    flow = explain(GROUPS, "fraud", 0, torch.ones(9, len(MODEL_FEATURES)))
    sizes, waiting = [], list(told)
    step: Callable[[], Any] = lambda: next(flow)  # noqa: E731
    while True:
        try:
            call = step()
        except StopIteration as end:
            return end.value, sizes
        sizes.append(len(call.rows))
        one = waiting.pop(0)
        if isinstance(one, Exception):
            step = lambda one=one: flow.throw(one)  # type: ignore[misc]  # noqa: E731
        else:
            both = torch.full((len(call.rows), 2), 0.5)
            both[:, 1] = one
            step = lambda both=both: flow.send(both)  # type: ignore[misc]  # noqa: E731


def test_reasons_are_exact_in_calls_of_bounded_size() -> None:
    found, sizes = answers([0, 0, 0])
    assert [exact for _, exact in found] == [True] * 9
    assert sizes == [4 * 255 + 1, 4 * 255 + 1, 256]
    assert max(sizes) <= MOST_ROWS


@pytest.mark.parametrize("why", [QueueFull("the queue is full"), 1.0])
def test_reasons_are_estimated_without_time_or_with_answers_of_another_variant(why: Any) -> None:
    found, sizes = answers([0, why, 0])
    assert [exact for _, exact in found] == [True] * 4 + [False] * 5
    assert sizes[-1] == 5 * 17 + 1
    assert all(effects is not None for effects, _ in found)
    found, _ = answers([why, why])
    assert found == [(None, False)] * 9


def test_reasons_are_not_left_out_because_the_engine_closes() -> None:
    with pytest.raises(Closed):
        answers([Closed("the engine was closed")])


def test_the_strongest_reasons_come_first_and_weak_ones_not_at_all() -> None:
    effects = [0.0] * len(GROUPS.reasons)
    effects[2], effects[5], effects[0], effects[1] = 1.0, 4.0, MIN_EFFECT - 0.01, -3.0
    assert [reason.code for reason in GROUPS.main(effects)] == ["M06", "M03"]
