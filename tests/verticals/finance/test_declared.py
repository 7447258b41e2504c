"""Features that are declared are what their definition says, in training as in serving."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from payments import DAY, HOUR, MINUTE, NOON, payment, written
from pydantic import ValidationError

from plinth.engine import ConfigError, InputError, ModelError
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.language import KEYS, Declaration
from plinth.verticals.finance.features.online import (
    FEATURES,
    Event,
    FeatureState,
    Flag,
    Labelled,
    Limits,
)
from plinth.verticals.finance.features.persistence import pack, unpack
from plinth.verticals.finance.features.places import distance
from plinth.verticals.finance.features.program import STANDARD, compiled
from plinth.verticals.finance.training.simulator import Population, events, simulate
from plinth.verticals.finance.training.train import declared_in

SPANS = ("1m", "5m", "1h", "24h", "7d", "30d")
AMOUNTS = (0.0, 0.01, 1.0, 12.34, 99.9999, 1e7)
PLACES = (None, (52.5, 13.4), (48.1, 11.6), (-33.9, 151.2))
STEPS = (0, 1, MINUTE, 5 * MINUTE, HOUR, HOUR + 1, DAY, 7 * DAY, 9 * DAY)


@st.composite
def declarations(draw: st.DrawFn) -> Declaration:
    """Any features, and ratios of them."""
    made: list[dict[str, Any]] = [{"name": "amount", "kind": "value", "of": "amount"}]
    for number in range(draw(st.integers(1, 6))):
        kinds = ("count", "sum", "mean", "max", "min", "distinct", "recency", "speed", "risk")
        kind = draw(st.sampled_from(kinds))
        by = "terminal" if kind == "risk" else draw(st.sampled_from(KEYS))
        one = {"name": f"f{number}", "kind": kind, "by": by, "over": draw(st.sampled_from(SPANS))}
        if kind in ("sum", "mean", "max", "min"):
            one["of"] = "amount"
        elif kind == "distinct":
            one["of"] = draw(st.sampled_from([key for key in KEYS if key != by]))
        elif kind == "risk":
            one["after"] = draw(st.sampled_from(("1m", "1h", "7d")))
        made.append(one)
    plain = [one["name"] for one in made]
    for number in range(draw(st.integers(0, 2))):
        of, to = draw(st.sampled_from(plain)), draw(st.sampled_from(plain))
        otherwise = draw(st.sampled_from((0.0, 1.0, 2.5)))
        made.append(
            {"name": f"r{number}", "kind": "ratio", "of": of, "to": to, "otherwise": otherwise}
        )
    return declared(made)


def declared(features: list[dict[str, Any]]) -> Declaration:
    """Features with reasons, as a file would have them."""
    whole = [{"reason": "A1", **one} for one in features]
    return Declaration.model_validate({"feature": whole, "reasons": {"A1": "Some reason"}})


@st.composite
def histories(draw: st.DrawFn) -> list[Event | Labelled]:
    """Payments on the edges of windows, some late, and labels of some of them."""
    now, made = NOON, []
    for number in range(draw(st.integers(1, 10))):
        now += draw(st.sampled_from(STEPS))
        seen = [one for one in made if isinstance(one, Event)]
        if seen and draw(st.integers(0, 4)) == 0:
            about = draw(st.sampled_from(seen))
            known = [one for one in made if isinstance(one, Labelled)]
            if about.transaction not in {one.transaction for one in known}:
                made.append(
                    Labelled(about.transaction, about.terminal, about.time, now, True, about.card)
                )
                continue
        made.append(
            Event(
                f"x{number}",
                now - draw(st.sampled_from((0, 0, 0, 1, HOUR, 2 * DAY))),
                draw(st.sampled_from(AMOUNTS)),
                draw(st.sampled_from("kl")),
                draw(st.sampled_from("cd")),
                draw(st.sampled_from("tu")),
                draw(st.sampled_from((None, "d", "e"))),
                draw(st.sampled_from(PLACES)),
            )
        )
    return made


@given(declarations(), histories(), st.integers(0, 14))
def test_any_declared_features_are_what_their_definition_says(
    declaration: Declaration, history: list[Event | Labelled], cut: int
) -> None:
    if not os.environ.get("PLINTH_REQUIRE_EXTRAS"):
        pytest.importorskip("pandas")
    from brute import Brute

    features = compiled(declaration)
    state, brute = FeatureState(Limits(lateness_ms=90 * DAY), features), Brute(declaration)
    for number, one in enumerate(history):
        if number == cut:  # a restart in between changes nothing
            state = unpack(pack(state), state.limits, features)
        if isinstance(one, Labelled):
            state.label(one)
            brute.labels.append(one)
            continue
        batch = state.update([one])
        assert not int(batch.flags[0]) & (Flag.PARTIAL | Flag.UNCOUNTED)
        slow = brute.update(one)
        assert tuple(slow) == features.names
        np.testing.assert_allclose(
            batch.rows[0], np.array(list(slow.values()), np.float32), rtol=3e-7, err_msg=str(slow)
        )


BEFORE = "3da5c0a6fd13a9d8320753b9db2b193ff72b5c8b5003e2cb17d8cad8ac618603"
"""SHA-256 of 8,045 rows of the features as they were coded by hand."""


def late_and_repeated() -> list[Event]:
    """Simulated payments with devices; some late, some repeated, some with another amount."""
    people = Population(customers=60, terminals=40, days=70, radius=30, bad_terminals=0.2)
    made = list(events(simulate(people, seed=11)))
    dice = np.random.default_rng(3)
    made = [one._replace(device=f"d{n % 37}" if n % 3 else None) for n, one in enumerate(made)]
    arrived = [one.time + int(dice.random() < 0.12) * dice.integers(3 * DAY) for one in made]
    order = [made[at] for at in np.argsort(arrived, kind="stable")]
    again = [one._replace(amount=one.amount + 1) for one in order[::50]]
    return [*order, *again]


def test_the_standard_features_are_bit_for_bit_what_they_were() -> None:
    history = late_and_repeated()
    state, digest = FeatureState(), hashlib.sha256()
    for number, start in enumerate(range(0, len(history), 500)):
        batch = state.update(history[start : start + 500])
        digest.update(batch.rows.tobytes() + batch.flags.tobytes())
        for one in history[start : start + 500 : 25]:
            if number > 2:
                about = history[start - 1200]
                known = Labelled(
                    about.transaction, about.terminal, about.time, one.time, True, about.card
                )
                state.label(known)
    assert digest.hexdigest() == BEFORE


def test_what_comes_with_plinth_is_declared_in_the_order_that_its_models_know() -> None:
    assert FEATURES[:3] == ("amount", "weekend", "night")
    assert FEATURES[-1] == "device_cards_24h"
    assert len(FEATURES) == 22
    assert STANDARD.model == 21
    assert STANDARD.yes_or_no == {"weekend", "night"}
    assert STANDARD.reach == 37 * DAY


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"over": "5 minutes"}, "feature.0.sum.over: expected a time from 1m to 90d"),
        ({"over": "91d"}, "expected a time from 1m to 90d"),
        ({"over": "0m"}, "expected a time from 1m to 90d"),
        ({"by": "shop"}, "feature.0.sum.by: Input should be 'card', 'terminal'"),
        ({"of": "price"}, "feature.0.sum.of: Input should be 'amount'"),
        ({"kind": "median"}, "feature.0: Input tag 'median' found using 'kind' does not match"),
        ({"after": "7d"}, "feature.0.sum.after: Extra inputs are not permitted"),
        ({"name": "Sum"}, "feature.0.sum.name: String should match pattern"),
        ({"name": "score"}, "feature 1 (score): the name means something else in rules"),
        ({"name": "amount"}, "feature 1 (amount): rules mean the payment's amount"),
        ({"reason": "B2"}, "feature 1 (s), reason: there is no text for B2"),
        ({"reason": None}, "feature 1 (s), reason: the model sees it"),
        ({"use": "rules"}, "no feature has use = 'model'"),
        ({"kind": "distinct", "of": "card"}, "of and by are both card"),
        ({"kind": "risk", "by": "card", "of": None}, "feature.0.risk.by: Input should be 'term"),
    ],
)
def test_what_is_wrong_with_a_declaration_is_said_with_the_feature_and_field(
    change: dict[str, Any], said: str
) -> None:
    good = {"name": "s", "kind": "sum", "of": "amount", "by": "card", "over": "1h"}
    declared([good])
    whole = {name: value for name, value in (good | change).items() if value is not None}
    if "reason" not in change:
        whole["reason"] = "A1"
    with pytest.raises(ValidationError) as caught:
        Declaration.model_validate({"feature": [whole], "reasons": {"A1": "Some reason"}})
    told = [
        ".".join(map(str, one["loc"])) + ": " + one["msg"].removeprefix("Value error, ")
        for one in caught.value.errors(include_url=False)
    ]
    assert said in "\n".join(told)


def test_a_ratio_is_of_features_declared_before_it() -> None:
    ratio = {"name": "r", "kind": "ratio", "of": "amount", "to": "later"}
    amount = {"name": "amount", "kind": "value", "of": "amount"}
    with pytest.raises(ValidationError, match=r"feature 2 \(r\): later is not declared before it"):
        declared([amount, ratio])
    with pytest.raises(ValidationError, match="is a ratio itself"):
        declared([amount, {**ratio, "to": "amount"}, {**ratio, "name": "q", "to": "r"}])
    with pytest.raises(ValidationError, match="the name is there twice"):
        declared([amount, amount])


def test_the_speed_between_two_payments_is_that_of_the_great_circle() -> None:
    berlin, sydney = (52.52, 13.405), (-33.8688, 151.2093)
    assert distance(berlin, sydney) == pytest.approx(16_090, rel=0.005)
    fast = {"name": "card_speed", "kind": "speed", "by": "card", "over": "24h"}
    state = FeatureState(features=compiled(declared([fast])))
    one = Event("1", NOON, 1.0, "k", "c", "t", None, berlin)
    rows = state.update([one, one._replace(transaction="2", time=NOON + 2 * HOUR, place=sydney)])
    assert rows.rows[1, 0] == pytest.approx(16_090 / 2, rel=0.005)


CARDS = """
[reasons]
M01 = "Amount unusual"
A1 = "Too fast between two places"

[[feature]]
name = "amount"
kind = "value"
of = "amount"
reason = "M01"

[[feature]]
name = "card_speed_24h"
kind = "speed"
by = "card"
over = "24h"
reason = "A1"
use = "rules"

[[feature]]
name = "customer_largest_7d"
kind = "max"
of = "amount"
by = "customer"
over = "7d"
use = "rules"
"""


def with_standard() -> dict[str, Any]:
    """The standard features and two more for rules."""
    text = Path(__file__).parents[3] / "verticals/finance/features/standard.toml"
    standard, more = tomllib.loads(text.read_text()), tomllib.loads(CARDS)
    return {
        "feature": [*standard["feature"], *more["feature"][1:]],
        "reasons": {**more["reasons"], **standard["reasons"]},
    }


RULE = {"code": "B1", "text": "Too fast", "when": "card_speed_24h > 1000", "action": "decline"}


def test_rules_speak_of_declared_features_beside_the_model_that_is_there() -> None:
    from plinth.verticals.testing.flows import run_with_models

    given: dict[str, Any] = {"features": with_standard(), "rules": {"rule": [RULE]}}
    vertical = FraudScoring(FraudSettings.model_validate(given))
    one = payment(1, NOON, latitude=52.5, longitude=13.4)
    far = payment(2, NOON + HOUR, latitude=-33.9, longitude=151.2)
    near = payment(3, NOON + 2 * HOUR, latitude=-33.8, longitude=151.2)
    requests = [vertical.parse(raw) for raw in (one, far, near)]
    found: Any = run_with_models(vertical, requests)
    assert [decision.decision for decision in found][1] == "decline"
    assert found[1].reason_codes[0].code == "B1"
    assert "B1" not in [reason.code for reason in found[2].reason_codes]
    fresh = FraudScoring(FraudSettings.model_validate(given))
    told = written(fresh, requests)[1]["evidence"]["features"]
    assert told["card_speed_24h"] > 10_000
    assert told["customer_largest_7d"] == 42.5
    assert set(FEATURES) < set(told)


def test_a_rule_of_an_undeclared_feature_is_refused_and_a_model_of_one_too() -> None:
    with pytest.raises(ValidationError, match="card_speed_24h is not known"):
        FraudSettings.model_validate({"rules": {"rule": [RULE]}})
    features = tomllib.loads(CARDS)
    with pytest.raises(ModelError, match=r"fraud \S+ was trained on the feature weekend"):
        FraudScoring(FraudSettings.model_validate({"features": features}))
    other = with_standard()
    for one in other["feature"]:
        if one["name"] == "card_count_1h":
            one["over"] = "2h"
    with pytest.raises(ModelError, match="card_count_1h, which is declared otherwise now"):
        FraudScoring(FraudSettings.model_validate({"features": other}))


def test_features_are_taken_up_at_a_start_alone_and_a_snapshot_knows_its_own() -> None:
    plain = FraudScoring()
    more = FraudSettings.model_validate({"features": with_standard()})
    with pytest.raises(ConfigError, match="taken up at a start"):
        plain.reconfigure(more)
    vertical = FraudScoring(more)
    with pytest.raises(InputError, match="other features declared"):
        vertical.restore(plain.snapshot())
    vertical.observe([vertical.parse(payment(1, latitude=1.0, longitude=2.0))])
    kept = vertical.snapshot()
    vertical.restore(kept)
    assert vertical.snapshot() == kept


@pytest.mark.parametrize("missing", ["latitude", "longitude"])
def test_half_a_place_is_refused(missing: str) -> None:
    both = {"latitude": 52.5, "longitude": 13.4}
    FraudScoring().parse(payment(1, **both))
    with pytest.raises(InputError, match=f"{missing}: is missing"):
        FraudScoring().parse(payment(1, **{k: v for k, v in both.items() if k != missing}))
    with pytest.raises(InputError, match=f"{missing}"):
        FraudScoring().parse(payment(1, **{**both, missing: 181.0}))


def test_the_file_may_be_named_in_the_config(tmp_path: Path) -> None:
    from plinth.pipelines.assembly import load_vertical
    from plinth.pipelines.config.settings import load

    (tmp_path / "features.toml").write_text(CARDS)
    (tmp_path / "rules.toml").write_text(
        "".join(["[[rule]]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in RULE.items())])
    )
    named = '[verticals.finance]\nfeatures = "features.toml"\nrules = "rules.toml"\n'
    (tmp_path / "plinth.toml").write_text(named)
    config = load(tmp_path / "plinth.toml", env={})
    with pytest.raises(ModelError, match="trained on the feature"):
        load_vertical(config, "finance")  # features and rules were read
    (tmp_path / "features.toml").write_text(CARDS.replace('over = "24h"', 'over = "1y"'))
    with pytest.raises(ConfigError, match=r"features\.toml: feature 2 \(card_speed_24h\)"):
        load_vertical(config, "finance")


def test_the_example_adds_features_to_the_standard_ones() -> None:
    declared = declared_in(Path(__file__).parents[3] / "examples" / "features.toml").declaration
    standard = STANDARD.declaration
    assert declared.feature[: len(standard.feature)] == standard.feature
    assert declared.reasons == standard.reasons
    assert len(declared.feature) == len(standard.feature) + 9
