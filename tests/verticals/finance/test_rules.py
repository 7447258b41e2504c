"""Rules in a readable file: what they may say, what they ask for, and what is wrong with them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from plinth.engine import ConfigError
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.decisions.expressions import condition
from plinth.verticals.finance.decisions.rules import NAMES, Payments, RuleBook, limits
from plinth.verticals.finance.features.online import FEATURES, Flag
from plinth.verticals.finance.schema import Transaction

BUILT_IN = limits(5000.0, 10, 5).compiled()


def payments(*rows: dict[str, Any]) -> Payments:
    """Payments of which only what is named differs from nothing."""
    features = np.zeros((len(rows), len(FEATURES)), dtype=np.float32)
    flags = np.zeros(len(rows), dtype=np.uint8)
    for place, row in enumerate(rows):
        for name, value in row.items():
            if name in FEATURES:
                features[place, FEATURES.index(name)] = value
        flags[place] = Flag.CONFLICT if row.get("conflict") else 0
    return Payments(
        [
            Transaction(
                transaction_id=f"x{place}",
                event_time=datetime(2026, 1, 1, tzinfo=UTC),
                amount=float(row.get("amount", 0)),
                currency=row.get("currency", "EUR"),
                card=row.get("card", "tok_a"),
                customer_id="c1",
                terminal_id=row.get("terminal_id", "t1"),
                device_id=row.get("device_id"),
            )
            for place, row in enumerate(rows)
        ],
        np.array([row.get("amount", 0.0) for row in rows], dtype=np.float64),
        features,
        flags,
        np.array([row.get("score", 0.0) for row in rows], dtype=np.float32),
    )


def book(*rules: tuple[str, str, str], **lists: list[str]) -> RuleBook:
    """Rules of code, condition and action."""
    return RuleBook.model_validate(
        {
            "rule": [
                {"code": code, "text": f"Text of {code}", "when": when, "action": action}
                for code, when, action in rules
            ],
            "lists": lists,
        }
    )


def asked(rules: RuleBook, row: dict[str, Any]) -> tuple[str, list[str]]:
    """Action and codes for one payment."""
    verdicts, _ = rules.compiled().apply(payments(row))
    return verdicts[0].action, [reason.code for reason in verdicts[0].reasons]


@pytest.mark.parametrize(
    ("values", "action", "codes"),
    [
        ({"amount": 5000.0, "card_count_5m": 10, "device_cards_24h": 5}, "approve", []),
        ({"amount": 5000.01}, "decline", ["R01"]),
        ({"card_count_5m": 11}, "review", ["R02"]),
        ({"device_cards_24h": 6}, "review", ["R03"]),
        ({"conflict": True}, "review", ["R04"]),
        (
            {"amount": 9e6, "card_count_5m": 99, "device_cards_24h": 99, "conflict": True},
            "decline",
            ["R01", "R04", "R02", "R03"],
        ),
    ],
)
def test_built_in_rules_hold_above_their_limits(
    values: dict[str, Any], action: str, codes: list[str]
) -> None:
    verdicts, _ = BUILT_IN.apply(payments(values))
    assert (verdicts[0].action, [reason.code for reason in verdicts[0].reasons]) == (action, codes)


def test_a_rule_without_a_limit_is_off_but_a_reused_id_is_always_reviewed() -> None:
    off = limits(None, None, None)
    assert asked(off, {"amount": 9e6, "card_count_5m": 99, "conflict": True}) == (
        "review",
        ["R04"],
    )


@pytest.mark.parametrize("amount", [0.1, 0.07, 4999.99, 1234.56, 199_999.95])
def test_what_equals_a_limit_is_not_above_it(amount: float) -> None:
    """The nearest float32 of most amounts lies above or below them."""
    rules = book(
        ("B1", f"amount > {amount}", "decline"), ("B2", f"card_sum_24h > {amount}", "review")
    )
    assert asked(rules, {"amount": amount, "card_sum_24h": amount}) == ("approve", [])
    assert asked(rules, {"amount": amount * 1.001, "card_sum_24h": amount * 1.001})[1] == [
        "B1",
        "B2",
    ]


def test_rules_speak_of_texts_lists_flags_and_the_score() -> None:
    rules = book(
        ("L1", "terminal_id in stolen or card in ['tok_x', 'tok_y']", "decline"),
        ("L2", "currency != 'EUR' and not has_device", "review"),
        ("L3", "0.2 <= score < 0.4 and night", "review"),
        stolen=["t8", "t9"],
    )
    assert asked(rules, {"terminal_id": "t9"}) == ("decline", ["L1"])
    assert asked(rules, {"card": "tok_y", "currency": "USD"}) == ("decline", ["L1", "L2"])
    assert asked(rules, {"currency": "USD", "device_id": "d"}) == ("approve", [])
    assert asked(rules, {"score": 0.3, "night": 1}) == ("review", ["L3"])
    assert asked(rules, {"score": 0.4, "night": 1}) == ("approve", [])


def test_a_rule_in_shadow_is_counted_and_asks_for_nothing() -> None:
    rules = RuleBook.model_validate(
        {
            "rule": [
                {
                    "code": "S1",
                    "text": "Watched",
                    "when": "amount > 10",
                    "action": "decline",
                    "shadow": True,
                }
            ]
        }
    ).compiled()
    verdicts, hits = rules.apply(payments({"amount": 11.0}, {"amount": 9.0}))
    assert not verdicts
    assert hits == {"S1": [0]}


def test_a_division_by_zero_holds_for_no_payment() -> None:
    rules = book(
        ("Z1", "card_sum_24h / card_count_24h > 1", "decline"), ("Z2", "1 / 0 > 0", "decline")
    )
    assert asked(rules, {}) == ("approve", [])
    assert asked(rules, {"card_sum_24h": 4, "card_count_24h": 2}) == ("decline", ["Z1"])
    assert asked(rules, {"card_sum_24h": 4, "card_count_24h": 0}) == ("approve", [])


@pytest.mark.parametrize(
    "when",
    [
        "{} > 1", "{} < 1", "{} == 1", "{} != 1", "not {} > 1", "not {} != 1",
        "1 / ({}) < 1", "not (1 < {} < 5)", "not (night or {} > 1)", "-({}) < 0", "1 - {} != 3",
        "not not {} > 1", "1 / 0 != 1 or {} > 1",
    ],
)  # fmt: skip
def test_what_is_divided_by_zero_is_neither_true_nor_false(when: str) -> None:
    rules = book(("Z1", when.format("card_sum_24h / card_count_24h"), "decline"))
    for of in (-3.0, 0.0, 3.0):
        assert asked(rules, {"card_sum_24h": of, "card_count_24h": 0}) == ("approve", [])


def test_the_rest_of_a_condition_with_a_division_by_zero_still_counts() -> None:
    rules = book(
        ("Z1", "card_sum_24h / card_count_24h > 1 or amount > 5", "decline"),
        ("Z2", "not (card_sum_24h / card_count_24h > 1 and amount > 50)", "review"),
    )
    assert asked(rules, {"card_sum_24h": 4, "amount": 9.0}) == ("decline", ["Z1", "Z2"])


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("amonut > 5", "at character 1: amonut is not known, did you mean amount?"),
        ("amount > 5 and", "this is no condition"),
        ("amount", "it is a number, expected a condition"),
        ("amount + 1", "it is a number"),
        ("night > 0", "a condition is not compared"),
        ("amount > '5'", "at character 10: expected a number, this is a text"),
        ("currency > 'EUR'", "texts are compared by"),
        ("currency in known", "there is no list known"),
        ("amount in [1, 2]", "at character 1: expected a text, this is a number"),
        ("card in ['a', 3]", "expected a list of quoted texts"),
        ("card in ['a', 'b ']", "at character 9: no payment has a text with spaces"),
        ("terminal_id == 'caf\u00e9'", "no payment has a text with spaces or other signs"),
        ("device_id != ''", "or empty"),
        ("amount and night", "at character 1: expected a condition"),
        ("amount is 5", "'is' is not part"),
        ("__import__('os').system('x')", "at character 1: this is not part of the language"),
        ("card.__class__ == 'x'", "this is not part of the language"),
        ("(lambda: night)()", "not part of the language"),
        ("amount ** 9 > 1", "not part of the language"),
        ("[x for x in card] == 'a'", "not part of the language"),
        ("amount > 1e999", "expected a number below 1e15"),
        ("amount > 1j", "expected a number below 1e15"),
        ("not " * 40 + "night", "more than 30 levels"),
        ("(" * 300 + "night" + ")" * 300, "this is no condition"),
        ("amount > 1 or " * 100 + "night", "at most 1000"),
        ("", "this is no condition"),
        ("night\0", "this is no condition"),
    ],
)
def test_what_is_wrong_with_a_condition_is_said_with_its_place(when: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        condition(when, NAMES)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ("currency == 'eur'", "three capital letters, did you mean EUR?"),
        ("not ('EURO' != currency)", "at character 6: currency never is that: EURO is no currency"),
        ("currency in ['EUR', 'usd']", "did you mean USD?"),
        ("currency not in west", "did you mean CHF?"),
        ("card == '4111111111111111'", "looks like a card number"),
        ("card in cards", "looks like a card number"),
        ("terminal_id == '" + "t" * 65 + "'", "more than 64 characters"),
        ("score >= 90", "90 is no probability"),
        ("0.1 < score < 1.5", "1.5 is no probability"),
        ("-1 < score", "-1 is no probability"),
    ],
)  # fmt: skip
def test_what_no_payment_can_have_is_refused_and_not_compared(when: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        book(("B1", when, "review"), west=["EUR", "chf"], cards=["t", "4111-1111-1111-1111"])
    assert said in str(caught.value)
    assert "4111" not in str(caught.value.errors()[0]["msg"])


def test_what_payments_may_have_is_compared() -> None:
    for when in ("currency in west", "score >= 1 or score <= 0", "card in cards", "amount > 90",
                 "card == terminal_id", "-1 < amount"):  # fmt: skip
        book(("B1", when, "review"), west=["EUR", "CHF"], cards=["tok_1"])


def test_what_is_wrong_with_a_book_is_said_with_the_rule() -> None:
    one = ("B1", "night", "review")
    for rules, said in (
        ((one, one), "rule 2: the code B1 is there twice"),
        ((("R04", "night", "review"),), "the code R04 is taken"),
        ((("M01", "night", "review"),), "the code M01 is taken"),
        ((one, ("B2", "nihgt", "review")), "rule 2 (B2), when: at character 1"),
        ((("b1", "night", "review"),), "rule.0.code"),
        ((("B1", "night", "approve"),), "rule.0.action"),
    ):
        with pytest.raises(ValidationError) as caught:
            book(*rules)
        assert said in str(caught.value)
    with pytest.raises(ValidationError, match="give the list another name"):
        book(one, card=["x"])
    with pytest.raises(ValidationError, match=r"lists\.stolen"):
        book(one, stolen=["tok_1", "tok_2 "])
    with pytest.raises(ValidationError, match="rules takes the place of hard_amount"):
        FraudSettings(rules=book(one), hard_amount=100.0)


# -- against brute force -------------------------------------------------------------------------
NUMBERS = ("card_count_1h", "card_count_24h", "terminal_count_24h")
number = st.recursive(
    st.sampled_from(NUMBERS) | st.integers(0, 9).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=4,
)
compared = st.tuples(number, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), number).map(
    " ".join
)
conditions = st.recursive(
    compared | st.sampled_from(["night", "weekend", "conflict", "True", "False"]),
    lambda inner: (
        inner.map(lambda one: f"not ({one})")
        | st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"
        )
    ),
    max_leaves=6,
)
values = st.fixed_dictionaries(
    {**{name: st.integers(0, 9) for name in NUMBERS}, "night": st.booleans()}
    | {"weekend": st.booleans(), "conflict": st.booleans()}
)


@given(conditions, st.lists(values, min_size=1, max_size=5))
def test_a_condition_holds_where_python_says_so_row_by_row(
    when: str, rows: list[dict[str, Any]]
) -> None:
    found = condition(when, NAMES)(payments(*rows)).tolist()
    assert found == [bool(eval(when, {}, dict(row))) for row in rows]  # noqa: S307 - ours


# -- in the vertical -----------------------------------------------------------------------------
def test_decisions_name_the_rules_that_were_in_force_and_new_ones_take_over() -> None:
    vertical = FraudScoring(FraudSettings(rules=book(("B1", "amount > 10", "decline"))))
    before = vertical.rules.version
    vertical.reconfigure(FraudSettings(rules=book(("B1", "amount > 20", "decline"))))
    assert vertical.rules.version != before
    vertical.reconfigure(FraudSettings(rules=book(("B1", "amount > 10", "decline"))))
    assert vertical.rules.version == before, "the same rules have the same version"
