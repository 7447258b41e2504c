"""Fraud scoring as its users meet it: records in, decisions out."""

from __future__ import annotations

import json
import logging
import math
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from payments import DAY, HOUR, NOON, label, payment, written
from torch import Tensor, nn

from plinth.engine import (
    Call,
    Closed,
    ConfigError,
    Engine,
    Flow,
    InputError,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    QueueFull,
    Sla,
    TensorSpec,
)
from plinth.engine.metrics import REGISTRY
from plinth.verticals.contract import Written
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.decisions.reasons import MOST_ROWS
from plinth.verticals.finance.schema import Decision, Label, Transaction
from plinth.verticals.finance.settings import STORE
from plinth.verticals.testing import check_vertical, checks, feed
from plinth.verticals.testing.flows import drive, run_with_models

NOW = NOON / 1000
SHIPPED = ModelStore(STORE).versions("fraud")[-1]
CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "finance"


def at_noon() -> float:
    return NOW


def score(vertical: FraudScoring, *raws: bytes) -> list[Any]:
    """Answers of the vertical's own models, one for each record."""
    return run_with_models(vertical, [vertical.parse(raw) for raw in raws])


REQUESTS = [
    FraudScoring().parse(raw)
    for raw in (
        payment(1, amount=900.0),
        payment(2, NOON + 1, card="tok_2", device_id="d1"),
        label(1),
        payment(2, NOON + 1, card="tok_2", device_id="d1"),
    )
]
CHECKS = checks(FraudScoring(), REQUESTS)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_it_keeps_the_contract(check: Any) -> None:
    check()


def test_nothing_of_the_contract_is_left_out_but_folders() -> None:
    report = check_vertical(FraudScoring(), REQUESTS)
    skipped = [outcome.name for outcome in report.outcomes if outcome.status == "skipped"]
    assert skipped == ["folders are discovered"]


def test_an_ordinary_payment_is_approved_and_the_model_named() -> None:
    [decision] = score(FraudScoring(), payment())
    assert (decision.decision, decision.reason_codes) == ("approve", [])
    assert (decision.model, decision.model_version) == ("fraud", SHIPPED)
    assert 0 <= decision.score < 0.01


def test_a_payment_five_times_the_cards_habit_is_an_alert_with_reasons() -> None:
    vertical = FraudScoring()
    habit = [payment(n, NOON - n * DAY, amount=50.0) for n in range(30, 0, -1)]
    *before, odd = score(vertical, *habit, payment(99, amount=450.0))
    assert {decision.decision for decision in before[5:]} == {"approve"}
    assert odd.decision == "decline"
    assert "M01" in [reason.code for reason in odd.reason_codes]


def test_fraud_at_the_terminal_raises_the_score_of_the_next_payment() -> None:
    def last(*labels: bytes) -> Decision:
        raws = [payment(n, NOON + n * HOUR, card=f"tok_{n}") for n in range(5)]
        decisions = score(FraudScoring(), *raws, *labels, payment(9, NOON + 8 * DAY))
        assert isinstance(decisions[-1], Decision)
        return decisions[-1]

    known = [label(n, NOON + n * HOUR, NOON + 7 * DAY) for n in range(5)]
    calm, warned = last(), last(*known)
    assert calm.score is not None
    assert warned.score is not None
    assert warned.score > 20 * calm.score
    assert warned.reason_codes[0].code == "M06"
    withdrawn = [label(n, NOON + n * HOUR, NOON + 7 * DAY, fraud=False) for n in range(5)]
    assert last(*known, *withdrawn).score == calm.score


def test_a_label_is_noted_in_its_place() -> None:
    first, noted, second = score(FraudScoring(), payment(1), label(1), payment(2))
    assert (noted.decision, noted.transaction_id, noted.score) == ("noted", "x1", None)
    assert "noted" not in (first.decision, second.decision)
    assert isinstance(FraudScoring().parse(label()), Label)


@pytest.mark.parametrize("kind", ["capture", "reversal", "refund"])
def test_what_is_done_with_a_payment_later_is_noted_and_changes_no_feature(kind: str) -> None:
    later = {"kind": kind, "transaction_id": "x1", "card": "tok_1"}
    raw = json.dumps(later | {"event_time": "2025-09-01T12:01:00Z"}).encode()
    plain, followed = FraudScoring(), FraudScoring()
    noted = score(followed, payment(1), raw)[1]
    score(plain, payment(1))
    assert (noted.decision, noted.score, noted.transaction_id) == ("noted", None, "x1")
    again = [score(one, payment(2, NOON + 60_000))[0] for one in (plain, followed)]
    assert again[0] == again[1]
    assert followed.key(followed.parse(raw)) == "tok_1"


def test_a_record_of_another_kind_is_never_counted_as_a_payment() -> None:
    for kind in ("chargeback", 7, None):
        with pytest.raises(InputError) as refused:
            FraudScoring().parse(payment(kind=kind))
        assert refused.value.field == "kind"
    assert FraudScoring().parse(payment(kind="payment")) == FraudScoring().parse(payment())


def test_the_order_of_answers_is_that_of_the_records() -> None:
    raws = [payment(1), payment(2, currency="XXX"), label(1), payment(3, amount=6000.0)]
    one, two, three, four = score(FraudScoring(), *raws)
    assert isinstance(two, InputError)
    assert (two.field, two.reason) == ("currency", "unknown_currency")
    assert [d.transaction_id for d in (one, three, four)] == ["x1", "x1", "x3"]
    assert four.decision == "decline"
    assert four.reason_codes[0].code == "R01"


def test_only_labels_and_refusals_ask_no_model() -> None:
    vertical = FraudScoring()
    vertical.observe([vertical.parse(payment())])
    flow = vertical.infer([vertical.parse(label()), vertical.parse(payment(currency="XXX"))])
    with pytest.raises(StopIteration) as end:
        next(flow)
    noted, refused = end.value.value
    assert noted.decision == "noted"
    assert isinstance(refused, InputError)


def test_amounts_count_in_base_currency() -> None:
    vertical = FraudScoring(FraudSettings(rates={"EUR": 1.0, "JPY": 0.006}))
    yen, euro = score(
        vertical, payment(1, amount=500_000.0, currency="JPY"), payment(2, amount=5001.0)
    )
    assert "R01" not in [reason.code for reason in yen.reason_codes]
    assert "R01" in [reason.code for reason in euro.reason_codes]


def test_an_amount_has_a_bound_by_what_it_is_worth_not_by_how_many_units_it_counts() -> None:
    vertical = FraudScoring(FraudSettings(rates={"EUR": 1.0, "IDR": 0.00005}))
    rupiah, largest, refused = score(
        vertical,
        payment(1, amount=12_000_000.0, currency="IDR"),
        payment(2, amount=10_000_000.0),
        payment(3, amount=10_000_000.01),
    )
    assert "R01" not in [reason.code for reason in rupiah.reason_codes]
    assert "R01" in [reason.code for reason in largest.reason_codes]
    assert isinstance(refused, InputError)
    assert (refused.field, refused.reason) == ("amount", "too_large")


@pytest.mark.parametrize("raw", [payment(at=NOON + 301_000), label(at=NOON + 301_000)])
def test_the_future_is_refused(raw: bytes) -> None:
    vertical = FraudScoring(clock=at_noon)
    for parse in (vertical.parse, lambda raw: vertical.parse_at(raw, NOW)):
        with pytest.raises(InputError) as refused:
            parse(raw)
        assert (refused.value.field, refused.value.reason) == ("event_time", "future_event")


def test_what_is_the_future_is_the_logs_to_say_so_that_a_replay_decides_the_same() -> None:
    vertical = FraudScoring(clock=lambda: NOW + 10 * DAY)  # the replay comes ten days later
    with pytest.raises(InputError):
        vertical.parse_at(payment(at=NOON + 301_000), NOW)
    assert vertical.parse_at(payment(at=NOON + 301_000), NOW + 2)
    with pytest.raises(InputError):  # and again, now that a later time has been seen
        vertical.parse_at(payment(at=NOON + 301_000), NOW)
    assert vertical.parse_at(payment(at=NOON + 400 * DAY), 1e15)
    assert vertical.parse_at(payment(at=NOON + 301_000), None)


def test_the_future_is_taken_where_that_is_asked_for() -> None:
    free = FraudScoring(FraudSettings(max_ahead_seconds=None), clock=at_noon)
    [taken] = score(free, payment(at=NOON + 400 * DAY))
    assert taken.decision == "approve"
    [close] = score(FraudScoring(clock=at_noon), payment(at=NOON + 299_000))
    assert close.decision == "approve"


def test_late_repeated_and_incomplete_are_said() -> None:
    vertical = FraudScoring(FraudSettings(lateness_days=0))
    plain, late, again = score(vertical, payment(1), payment(2, NOON - HOUR), payment(1))
    assert (plain.features_late, plain.features_partial, plain.duplicate) == (False, False, False)
    assert (late.features_late, late.duplicate) == (True, False)
    assert again.duplicate
    assert again.score == plain.score
    month = [payment(n, NOON + n * DAY) for n in range(10, 80)]
    *_, old = score(vertical, *month, payment(99, NOON + 2 * DAY))
    assert old.features_partial


def case(name: str) -> list[bytes]:
    """The records of a file of failing inputs."""
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    return (CASES / name).read_bytes().splitlines()


def codes(decision: Any) -> list[str]:
    return [reason.code for reason in decision.reason_codes]


def test_an_id_that_comes_again_with_another_amount_is_judged_by_the_amount_asked_for() -> None:
    small, large, other, huge = score(FraudScoring(), *case("same_id_other_amount.jsonl"))
    assert (small.decision, small.conflict) == ("approve", False)
    for asked in (large, huge):
        assert (asked.decision, asked.duplicate, asked.conflict) == ("decline", True, True)
        assert codes(asked)[:2] == ["R01", "R04"]
    assert (other.decision, other.conflict, codes(other)[0]) == ("decline", False, "R01")


def test_a_small_change_of_a_repeated_id_is_reviewed() -> None:
    _, again, elsewhere, same = score(
        FraudScoring(),
        payment(1),
        payment(1, amount=43.0),
        payment(1, terminal_id="t2"),
        payment(1),
    )
    assert (again.decision, codes(again)) == ("review", ["R04"])
    assert (elsewhere.decision, codes(elsewhere)) == ("review", ["R04"])
    assert (same.decision, same.duplicate, same.conflict) == ("approve", True, False)


def test_verifications_of_amount_zero_count_in_velocity() -> None:
    *tests, purchase = score(FraudScoring(), *case("zero_amount_card_test.jsonl"))
    assert {type(one) for one in tests} == {Decision}
    assert codes(tests[-1])[0] == codes(purchase)[0] == "R02"
    assert purchase.decision in ("review", "decline")


def test_a_label_of_an_unknown_payment_is_refused_and_counts_nothing() -> None:
    first, refused, last = score(FraudScoring(), *case("label_of_unknown_payment.jsonl"))
    assert refused.reason == "unknown_payment"
    assert isinstance(first, Decision)
    assert last == score(FraudScoring(), *case("label_of_unknown_payment.jsonl")[::2])[-1]


def test_a_new_optional_field_of_a_producer_stops_nothing() -> None:
    raws = case("new_optional_field.jsonl")
    assert len(score(FraudScoring(), *raws)) == 500
    *_, kept = score(FraudScoring(FraudSettings(unknown_fields="keep")), *raws)
    assert json.loads(FraudScoring().encode(kept))["extra"] == {"merchant_category": "5411"}
    with pytest.raises(InputError, match="merchant_category"):
        FraudScoring(FraudSettings(unknown_fields="refuse")).parse(raws[-1])


def test_a_field_that_is_there_twice_is_refused() -> None:
    [raw] = case("double_key.jsonl")
    with pytest.raises(InputError, match="amount: is there twice"):
        FraudScoring().parse(raw)


def test_any_number_of_alerts_is_explained_in_calls_of_bounded_size() -> None:
    vertical = FraudScoring(FraudSettings(review_threshold=0.0))
    flow = vertical.infer([vertical.parse(payment(n, card=f"tok_{n}")) for n in range(300)])
    sizes: list[int] = []

    def answer(call: Any) -> torch.Tensor:
        sizes.append(len(call.rows))
        with torch.inference_mode():
            scores: torch.Tensor = vertical.models()[0].module(call.rows)
        return scores

    decisions = drive(flow, answer)
    assert sizes[0] == 300
    assert max(sizes[1:]) <= MOST_ROWS
    assert all(not {"X01", "X02"} & set(codes(decision)) for decision in decisions)


def test_a_share_of_the_partitions_is_said_on_every_decision() -> None:
    def partial(mine: int, **settings: Any) -> bool:
        vertical = FraudScoring(FraudSettings(**settings))
        vertical.see_partitions(mine, 4)
        [decision] = score(vertical, payment())
        found: bool = decision.features_partial
        return found

    assert [partial(n) for n in (1, 2, 4)] == [True, True, False]
    assert not partial(1, colocated=True)


def test_windows_that_reach_below_the_growth_of_the_log_are_said() -> None:
    vertical = FraudScoring(FraudSettings(colocated=True))
    vertical.see_partitions(1, 4)
    at = vertical.parse(payment()).event_time.timestamp()

    def partial(grown: float | None) -> bool:
        vertical.see_growth(grown)
        [decision] = score(vertical, payment())
        return bool(decision.features_partial)

    days = 86_400
    grown = (None, at, at - 43.9 * days, at - 44.1 * days)
    assert [partial(one) for one in grown] == [False, True, True, False]


def test_windows_that_reach_below_what_the_state_has_seen_are_said() -> None:
    vertical = FraudScoring()
    vertical.see_start(NOW)

    def partial(number: int, at: int) -> bool:
        return bool(score(vertical, payment(number, at))[0].features_partial)

    assert partial(1, NOON)
    assert partial(2, NOON + 44 * DAY)  # windows and lateness
    assert not partial(3, NOON + 44 * DAY + 1)
    vertical.see_start(None)
    assert not partial(4, NOON + 44 * DAY)


@pytest.mark.parametrize("told", [FraudScoring.see_growth, FraudScoring.see_start])
def test_a_label_whose_payment_another_state_had_is_believed(told: Any) -> None:
    vertical = FraudScoring()
    assert score(vertical, label(1, card="tok_1"))[0].reason == "unknown_payment"
    told(vertical, NOW)
    [noted] = score(vertical, label(1, card="tok_1"))
    assert (noted.decision, noted.features_partial) == ("noted", True)
    assert score(vertical, label(2, NOON + 1, card="tok_1"))[0].reason == "unknown_payment"
    [later] = score(vertical, payment(3, NOON + 8 * DAY))
    assert later.features_partial  # the payment itself is not among those the share is of
    [other] = score(vertical, payment(4, NOON + 50 * DAY, terminal_id="t2"))
    assert not other.features_partial


def test_what_must_lie_in_one_partition_is_told_where_it_was_declared() -> None:
    raws = payment(1, device_id="d1"), payment(2), label(1), label(1, card="tok_1")
    vertical = FraudScoring(FraudSettings(colocated=True))
    assert [vertical.together(vertical.parse(raw)) for raw in raws] == [
        ("tok_1", "c1", "t1", "d1"),
        ("tok_1", "c1", "t1", None),
        (None, None, "t1", None),
        ("tok_1", None, "t1", None),
    ]
    assert not FraudScoring().together(vertical.parse(raws[0]))


def test_what_had_to_be_forgotten_is_counted_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def evicted() -> float:
        return REGISTRY.get_sample_value("plinth_finance_evicted_total", {"table": "cards"}) or 0

    before = evicted()
    vertical = FraudScoring(FraudSettings(max_cards=8))
    for n in range(12):
        score(vertical, payment(n, card=f"tok_{n}"))
    assert evicted() - before == 4
    assert caplog.text.count("more cards than may be remembered (max_cards") == 1
    held = REGISTRY.get_sample_value("plinth_finance_remembered", {"table": "cards"})
    assert held == 8


def test_many_cards_on_one_device_go_to_review() -> None:
    raws = [payment(n, card=f"tok_{n}", device_id="d1") for n in range(6)]
    *before, last = score(FraudScoring(), *raws)
    assert [d.decision for d in before] == ["approve"] * 5
    assert (last.decision, last.reason_codes[0].code) == ("review", "R03")


def test_thresholds_of_the_settings_hold() -> None:
    strict = FraudSettings(review_threshold=0.0, decline_threshold=1.0)
    [decision] = score(FraudScoring(strict), payment())
    assert decision.decision == "review"
    nothing = FraudSettings(review_threshold=1.0, decline_threshold=1.0, hard_amount=None)
    [decision] = score(FraudScoring(nothing), payment(amount=9000.0))
    assert decision.decision == "approve"


def test_an_alert_without_time_for_reasons_says_so() -> None:
    vertical = FraudScoring(FraudSettings(review_threshold=0.0))
    flow = vertical.infer([vertical.parse(payment(1)), vertical.parse(payment(2, amount=6000.0))])
    next(flow)
    flow.send(torch.tensor([[0.5, 0.0], [0.9, 0.0]]))
    flow.throw(QueueFull("the queue is full"))
    with pytest.raises(StopIteration) as end:
        flow.throw(QueueFull("the queue is full"))
    assert [codes(decision) for decision in end.value.value] == [["X01"], ["R01", "X01"]]


def test_an_alert_is_explained_by_the_variant_that_scored_it() -> None:
    vertical = FraudScoring(FraudSettings(review_threshold=0.0))
    flow = vertical.infer([vertical.parse(payment(1)), vertical.parse(payment(2))])
    next(flow)
    first = flow.send(torch.tensor([[0.5, 1.0], [0.5, 0.0]]))
    assert isinstance(first, Call)
    second = flow.send(torch.tensor([[0.5, 0.0]]).expand(len(first.rows), 2))
    assert isinstance(second, Call)
    assert [first.model, second.model] == ["fraud", "fraud-lite"]


def test_reasons_that_are_sought_while_the_engine_closes_leave_no_decision_without() -> None:
    """The stream answers the payment at its next start; over HTTP it is refused."""
    vertical = FraudScoring(FraudSettings(review_threshold=0.0))
    flow = vertical.infer([vertical.parse(payment(1))])
    next(flow)
    flow.send(torch.tensor([[0.5, 0.0]]))
    with pytest.raises(Closed):
        flow.throw(Closed("the engine was closed"))


def test_a_refused_payment_that_comes_again_is_not_counted_twice() -> None:
    vertical = FraudScoring()
    flow = vertical.infer([vertical.parse(payment(1))])
    next(flow)
    with pytest.raises(QueueFull):
        flow.throw(QueueFull("the queue is full"))
    [again] = score(vertical, payment(1))
    [fresh] = score(FraudScoring(), payment(1))
    assert again.duplicate
    assert again.score == fresh.score


def test_observing_and_restoring_lead_to_the_same_answers() -> None:
    raws = [payment(n, NOON + n * HOUR, amount=10.0 * n + 1) for n in range(20)]
    raws.insert(9, label(3, NOON + 3 * HOUR, NOON + 4 * HOUR))
    scored, observed, restored = FraudScoring(), FraudScoring(), FraudScoring()
    score(scored, *raws)
    observed.observe([observed.parse(raw) for raw in raws])
    assert observed.snapshot() == scored.snapshot()
    restored.restore(scored.snapshot())
    after = payment(99, NOON + 8 * DAY)
    assert score(scored, after) == score(observed, after) == score(restored, after)


def test_card_numbers_go_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    number = "4111111111111111"
    vertical = FraudScoring()
    with caplog.at_level(logging.DEBUG), pytest.raises(InputError) as refused:
        vertical.parse(payment(card=number))
    score(vertical, payment())
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__
    for place in (str(refused.value), repr(refused.value), caplog.text, repr(vertical)):
        assert number not in place
    assert number.encode() not in vertical.snapshot()


def test_the_answers_key_is_the_cards_token() -> None:
    vertical = FraudScoring()
    assert vertical.key(vertical.parse(payment(card="tok_77"))) == "tok_77"
    assert vertical.key(vertical.parse(label(card="tok_77"))) == "tok_77"
    assert vertical.key(vertical.parse(label())) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"review_threshold": 0.9, "decline_threshold": 0.5},
        {"decline_threshold": 0.001},
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="below review_threshold"):
        FraudScoring(FraudSettings(**settings))


@pytest.mark.parametrize("review", [None, math.nan, 5.0, -0.1])
def test_a_store_without_a_threshold_that_can_hold_is_refused(
    review: float | None, tmp_path: Path
) -> None:
    for name in ("fraud", "fraud-lite"):
        model = ModelStore(STORE).load(name)
        metrics = {"decline_threshold": 0.5} | (
            {} if review is None else {"review_threshold": review}
        )
        spec = model.spec.model_copy(update={"metrics": metrics})
        ModelStore(tmp_path).save(spec, model.module, facts=ModelStore(STORE).facts(name))
    with pytest.raises(ConfigError, match="review_threshold"):
        FraudScoring(FraudSettings(store=tmp_path))
    FraudScoring(FraudSettings(store=tmp_path, review_threshold=0.1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": {}},
        {"hard_amount": math.inf},
        {"max_card_count_5m": 10**20},
        {"rates": {"eur": 1.0}},
        {"rates": {"EUR": 0.0}},
        {"review_threshold": 1.5},
        {"max_cards": 0},
        {"lateness_days": -1},
        {"treshold": 0.5},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FraudSettings(**wrong)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from plinth.engine import architecture

    architecture("test-finance-sum")(lambda: nn.Linear(21, 1))
    spec = ModelSpec(
        name="fraud",
        architecture="test-finance-sum",
        inputs=(TensorSpec(name="features", shape=(21,)),),
        outputs=(TensorSpec(name="score", shape=(1,)),),
    )
    ModelStore(tmp_path).save(spec, nn.Linear(21, 1))
    with pytest.raises(ModelError, match="expected probability and variant"):
        FraudScoring(FraudSettings(store=tmp_path))


def test_the_stored_models_are_the_manifests() -> None:
    store = ModelStore(STORE)
    for name in ("fraud", "fraud-lite"):
        spec = store.verify(name)
        assert spec.metrics["review_threshold"] <= spec.metrics["decline_threshold"]


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", ["fraud", "fraud-lite"])
def test_the_bits_of_a_score_do_not_depend_on_who_shares_the_batch(backend: str, name: str) -> None:
    def scores(part: Tensor) -> Flow[Tensor]:
        answer = yield Call(name, part)
        assert isinstance(answer, Tensor)
        return answer

    dice = random.Random(0)
    rows = torch.rand(600, 21, generator=torch.Generator().manual_seed(0)) ** 3 * 3_000
    device = "cpu" if backend == "onnxruntime" else "auto"
    with Engine(device=device, backend=backend, threads=1) as engine:
        engine.add(ModelStore(STORE).load(name))
        whole = engine.run(scores(rows)).value
        for _ in range(40):
            first, count = dice.randrange(600), dice.choice((1, 7, 20, 600))
            part = rows[first : first + count]
            assert torch.equal(engine.run(scores(part)).value, whole[first : first + count])


class Slow(nn.Module):
    """The same answers, after far more work."""

    def __init__(self, inner: nn.Module, times: int) -> None:
        super().__init__()
        self.inner = inner
        self.times = times

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            answer: torch.Tensor = self.inner(rows)
        return answer


@pytest.mark.clock
def test_under_load_the_cheaper_variant_answers_with_its_own_thresholds_and_says_so() -> None:
    vertical = FraudScoring()
    main, lite = vertical.models()
    with Engine(threads=1) as engine:
        engine.add(Model(main.spec, Slow(main.module, 1200)), batch_range=(1, 1))
        engine.add(lite, batch_range=(1, 1))
        answer = engine.run(
            vertical.infer([vertical.parse(payment(amount=160.0))]),
            Sla(deadline_ms=40, on_overload="degrade"),
        )
    [decision] = answer.value
    assert isinstance(decision, Decision)
    assert decision.score is not None
    assert answer.degraded == {"fraud": "fraud-lite"}
    assert (decision.model, decision.model_version) == ("fraud-lite", SHIPPED)
    own, other = (model.spec.metrics["review_threshold"] for model in (lite, main))
    assert other < decision.score < own, "an alert of one model, an ordinary score of the other"
    assert decision.decision == "approve"


def test_an_engine_with_time_answers_with_the_model_itself() -> None:
    vertical = FraudScoring()
    raws = [payment(n, NOON + n * HOUR, amount=700.0) for n in range(40)]
    with Engine(threads=1) as engine:
        for model in vertical.models():
            engine.add(model, batch_range=(1, 16))
        requests = [vertical.parse(raw) for raw in raws]
        answer = engine.run(vertical.infer(requests), Sla(deadline_ms=60_000))
    alone = FraudScoring()
    expected = [score(alone, raw)[0] for raw in raws]
    for made, wanted in zip(answer.value, expected, strict=True):
        assert isinstance(made, Decision)
        assert made.model == "fraud"
        assert made.score == pytest.approx(wanted.score, rel=1e-4)
        assert made.reason_codes == wanted.reason_codes
    assert json.loads(vertical.encode(answer.value[-1]))["reason_codes"]


@pytest.mark.parametrize("score", [float("nan"), -0.1, 1.1])
def test_a_score_that_is_no_chance_is_no_decision(score: float) -> None:
    vertical = FraudScoring()
    flow = vertical.infer([vertical.parse(payment(1))])
    next(flow)
    with pytest.raises(ModelError, match="outside"):
        flow.send(torch.tensor([[score, 0.0]]))


ODD = {
    "transaction_id": ['q"1', "b\\2", "550e8400-e29b-41d4-a716-446655440000"],
    "customer_id": ["c2", "4111111111111111"],
    "device_id": ["d1", 'd"2'],
    "amount": [0, 0.0001, 6000.0, 9e6],
    "note": ["héllo", {"x": [1.5]}, None],
    "event_time": ["2025-09-01T12:00:00.123456-05:30"],
}


@pytest.mark.parametrize("unknown", ["ignore", "keep"])
def test_answers_written_in_columns_say_what_decisions_and_features_do(unknown: str) -> None:
    dice = random.Random(7)
    rule = {"code": "B1", "text": "Large", "when": "amount > 5000", "action": "decline"}
    given = {"unknown_fields": unknown, "card_numbers_in_ids": "allow", "rules": {"rule": [rule]}}
    raws = []
    for number in range(120):
        odd = {name: dice.choice(values) for name, values in ODD.items() if dice.random() < 0.2}
        at = NOON + (number - 60 * (dice.random() < 0.2)) * HOUR
        raws.append(payment(number // 2, at, **odd, card=f"tok_{number % 7}"))
    alone, columns = (FraudScoring(FraudSettings.model_validate(given)) for _ in range(2))
    requests = [alone.parse(raw) for raw in raws]
    decisions: list[Any] = run_with_models(alone, requests)
    told = written(columns, requests)
    assert [one["answer"] for one in told] == [json.loads(alone.encode(one)) for one in decisions]
    assert [one["key"] for one in told] == [request.card.encode() for request in requests]
    for request, one in zip(requests, told, strict=True):
        assert isinstance(request, Transaction)
        record = one["evidence"]["record"]
        assert record.get("device_id") == request.device_id
        assert (record["amount"], record["customer_id"]) == (request.amount, request.customer_id)
        assert datetime.fromisoformat(record["event_time"]) == request.event_time
    kinds = {one["answer"]["decision"] for one in told}
    assert kinds == {"approve", "review", "decline"}
    assert any(one["answer"]["duplicate"] for one in told)
    fresh = FraudScoring(FraudSettings.model_validate(given))
    rows = fresh.state.update(fresh._taken_in(requests, fresh._asked(requests), [], [])).rows
    seen = [list(one["evidence"]["features"].values()) for one in told]
    assert seen == rows.tolist()


def test_an_unknown_field_that_cannot_be_written_again_is_refused_alone() -> None:
    vertical = FraudScoring(FraudSettings(unknown_fields="keep"))
    requests = [vertical.parse(payment(n, note=1)) for n in range(3)]
    extra = requests[1].model_extra
    assert extra is not None
    extra["note"] = 1 << 70  # one that was read so is refused before
    flow = vertical.answers(requests)
    first, wrong, last = feed(flow, lambda call: torch.zeros(len(call.rows), 2))
    assert isinstance(wrong, InputError)
    assert wrong.reason == "encode_failed"
    assert isinstance(first, Written)
    assert isinstance(last, Written)
