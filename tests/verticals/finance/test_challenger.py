"""A challenger scores in shadow, is promoted by a written rule, and can be taken back."""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from payments import leave_reasons_out
from pydantic import ValidationError
from stores import add_version
from torch import Tensor

from plinth.engine import Call, ConfigError, Flow, ModelError, Timing
from plinth.engine.flow import Pause
from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.schema import Decision, Record
from plinth.verticals.finance.succession.challenger import (
    MAX_WAITING,
    Pair,
    Promotion,
    Shadow,
    Thresholds,
    compare,
)
from plinth.verticals.finance.succession.champion import WINDOW, Champion
from plinth.verticals.finance.succession.probation import LEAST, Probation
from plinth.verticals.finance.training.simulator import (
    Population,
    labels_json,
    simulate,
    transactions_json,
)
from plinth.verticals.testing.flows import drive

PEOPLE = Population(customers=150, terminals=100, days=30, radius=30, bad_terminals=1.0)
HALF = (Thresholds(0.5, 0.9),) * 2
EASY = {"min_labelled": 500, "min_frauds": 20, "min_ap_gain": 0.02}


@dataclass
class Process:
    """A vertical and the models that an engine has for it, both by hand."""

    vertical: FraudScoring
    models: dict[str, torch.nn.Module] = field(default_factory=dict)
    now: float = 0.0

    @classmethod
    def of(cls, store: Path, **settings: Any) -> Process:
        made = cls.__new__(cls)
        given = FraudSettings.model_validate(
            {"store": store, "max_ahead_seconds": None, **settings}
        )
        vertical = FraudScoring(given, clock=lambda: made.now)
        made.__init__(vertical, {m.spec.name: m.module for m in vertical.models()})  # type: ignore[misc]
        return made

    def answer(self, call: Call) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.models[call.model](call.rows)
        return found

    def answer_but_reasons(self, call: Call) -> Tensor:
        leave_reasons_out(call)
        return self.answer(call)

    def score(self, records: Sequence[Record]) -> list[Decision]:
        return [
            one
            for start in range(0, len(records), 256)
            for one in drive(
                self.vertical.infer(records[start : start + 256]), self.answer_but_reasons
            )
            if isinstance(one, Decision)
        ]

    def follow(self) -> bool:
        """One look at the store, an engine that loads what is asked for, and the shadow's work."""
        self.now += 60
        models = self.vertical.next_models()
        self.models |= {model.spec.name: model.module for model in models}
        if models:
            self.vertical.models_loaded()
        while (flow := self.vertical.background()) is not None:
            drive(flow, self.answer)
            self.vertical.background_done(Timing(device=1e-3))
        return bool(models)

    def settle(self) -> None:
        while self.follow():
            pass

    @property
    def version(self) -> str:
        return self.vertical.versions.serving.version


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    """Payments, and what became known of each fraud seven days after it."""
    table = simulate(PEOPLE, seed=5)
    frauds = table[table["fraud"]]
    known = zip((frauds["time"] + LABEL_DELAY).tolist(), labels_json(frauds), strict=True)
    return [
        raw
        for _, raw in sorted(
            [*zip(table["time"].tolist(), transactions_json(table), strict=True), *known]
        )
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A poor champion, and the model that comes with Plinth as a newer version."""
    add_version(tmp_path, "1.0.0", noise=0.4)
    add_version(tmp_path, "2.0.0")
    Champion(tmp_path).promote("1.0.0", by="training", champion=None)
    return tmp_path


def read(process: Process, records: Sequence[bytes]) -> list[Record]:
    return [process.vertical.parse(raw) for raw in records]


def test_the_better_version_is_promoted_by_the_rule_and_the_reason_is_written_down(
    store: Path, records: list[bytes]
) -> None:
    process = Process.of(store, challenger="newest", promotion=EASY)
    assert process.version == "1.0.0", "the champion of the store, not the newest"
    process.settle()
    decisions = process.score(read(process, records))
    assert {one.model_version for one in decisions if one.score is not None} == {"1.0.0"}
    process.follow()
    process.follow()
    (first, last) = Champion(store).decisions()
    assert first["by"] == "training"
    assert (last["from"], last["to"], last["by"]) == ("1.0.0", "2.0.0", "rule")
    assert last["why"]["rule"]["min_ap_gain"] == 0.02
    figures = last["why"]["figures"]
    assert figures["ap_gain"] == figures["challenger_ap"] - figures["champion_ap"] > 0.02
    assert figures["frauds"] >= 20
    process.settle()
    assert process.version == "2.0.0"
    assert process.vertical.versions.serving.name == "fraud", "under its usual name again"
    (after,) = process.score(read(process, records[:1]))
    assert after.model_version == "2.0.0"

    assert Champion(store).roll_back() == ("2.0.0", "1.0.0")
    process.settle()
    assert process.version == "1.0.0"
    assert process.vertical.versions.shadow is None, "what was rolled back is no challenger"
    assert Process.of(store, challenger="newest").version == "1.0.0", "a restart keeps to it"


@pytest.mark.parametrize(
    ("by", "threshold", "rule", "stays"),
    [("rule", 0.0, EASY, False), ("rule", 1.0, EASY, True), ("hand", 0.0, EASY, True),
     ("rule", 0.0, None, True), ("rule", 0.0, {**EASY, "max_decline_share": 1.0}, True)],
)  # fmt: skip
def test_a_version_that_declines_far_more_than_in_shadow_is_taken_back(
    store: Path, records: list[bytes], by: Any, threshold: float, rule: Any, stays: bool
) -> None:
    figures = {"champion_decline_share": 0.001, "challenger_decline_share": 0.001}
    Champion(store).promote("2.0.0", by=by, champion="1.0.0", why={"figures": figures})
    given = {"challenger": "newest", "promotion": rule} if rule else {}
    process = Process.of(store, review_threshold=0.0, decline_threshold=threshold, **given)
    process.settle()
    process.score(read(process, records[: LEAST - 1]))
    process.settle()
    assert process.version == "2.0.0", "too few to tell"
    process.score(read(process, records[LEAST - 1 : LEAST + 600]))
    process.settle()
    assert process.version == ("2.0.0" if stays else "1.0.0")
    last = Champion(store).decisions()[-1]
    if not stays:
        assert (last["by"], last["from"], last["to"]) == ("rollback", "2.0.0", "1.0.0")
        assert last["why"]["probation"]["decline_share"] == 1.0
        assert Champion(store).take_back("2.0.0", {}) is None, "once"


def test_a_decision_that_says_nothing_of_declines_takes_no_version_back() -> None:
    rule, line = Promotion(), {"by": "rule", "from": "1", "to": "2"}
    for why, share in ((None, False), ({"figures": {"ap_gain": 0.1}}, False),
                       ({"figures": {"challenger_decline_share": 0.0}}, True)):  # fmt: skip
        probation = Probation.of({**line, "why": why} if why else line, rule)
        probation.take(LEAST, LEAST)
        assert (probation.exceeded() is not None) == share
    assert Probation.of(None, rule).exceeded() is None


def test_chance_takes_no_version_back() -> None:
    for declined, exceeded in ((20, False), (37, False), (39, True)):
        probation = Probation(0.01)
        probation.take(2_000, declined)
        assert (probation.exceeded() is not None) == exceeded


NEVER = {
    "labelled": {"min_labelled": 10**6},
    "frauds": {"min_frauds": 10**5},
    "ap_gain": {"min_ap_gain": 0.9},
    "challenger_alert_share": {"max_alert_share": 1e-9},
    "challenger_decline_share": {"max_decline_share": 1e-9},
    "cost_us": {"max_cost_us": 1e-9},
}
"""By the figure that it is about, what no challenger fulfils."""


def test_each_condition_of_the_rule_alone_keeps_the_champion(
    store: Path, records: list[bytes]
) -> None:
    rule = {**EASY, **{name: bound for one in NEVER.values() for name, bound in one.items()}}
    process = Process.of(store, challenger="2.0.0", promotion=rule)
    process.settle()
    process.score(read(process, records))
    process.follow()
    process.settle()
    assert process.version == "1.0.0"
    report = json.loads((store / "fraud" / "challenger.json").read_bytes())
    assert [line.partition(":")[0] for line in report["unmet"]] == list(NEVER)
    assert (report["champion"], report["challenger"]) == ("1.0.0", "2.0.0")
    assert Promotion.model_validate(EASY).unmet(report["figures"]) == []
    for name, bound in NEVER.items():
        (line,) = Promotion.model_validate({**EASY, **bound}).unmet(report["figures"])
        assert line.startswith(f"{name}: ")


def test_a_flow_keeps_to_the_version_it_began_with(store: Path, records: list[bytes]) -> None:
    process = Process.of(store)
    request = read(process, records[:1])

    def begin() -> tuple[Flow[Any], Call]:
        flow = process.vertical.infer(request)
        return flow, next(flow)

    def end(flow: Flow[Any], call: Call | Pause) -> Decision:
        while True:
            try:
                call = flow.send(None if isinstance(call, Pause) else process.answer(call))
            except StopIteration as stop:
                return stop.value[0]  # type: ignore[no-any-return]

    early, asked_early = begin()
    Champion(store).promote("2.0.0", by="hand", champion="1.0.0")
    assert process.follow(), "the new version is loaded under the second name"
    assert not process.follow(), "it answers now; the first name is still in use"
    late, asked_late = begin()
    assert (asked_early.model, asked_late.model) == ("fraud", "fraud-challenger")
    assert not process.follow()
    assert end(early, asked_early).model_version == "1.0.0"
    assert process.follow(), "the first name is free"
    last, asked_last = begin()
    assert asked_last.model == "fraud"
    assert end(late, asked_late).model_version == end(last, asked_last).model_version == "2.0.0"
    assert end(*begin()).score == pytest.approx(Process.of(store).score(request)[0].score)


def test_a_version_that_cannot_be_loaded_leaves_what_serves(
    store: Path, records: list[bytes]
) -> None:
    process = Process.of(store, challenger="newest")
    weights = store / "fraud" / "2.0.0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not what was saved"):
        process.follow()
    assert process.score(read(process, records[:1]))[0].model_version == "1.0.0"
    with pytest.raises(ModelError, match="not what was saved"):
        Champion(store).promote("2.0.0", by="hand", champion="1.0.0")
    assert Champion(store).version() == "1.0.0"


def test_no_figure_that_is_no_number_and_no_equal_is_promoted() -> None:
    rule = Promotion(max_alert_share=0.5, max_decline_share=0.5)
    shares = {"challenger_alert_share": 0.1, "challenger_decline_share": 0.1}
    good = {"labelled": 1e5, "frauds": 100.0, "ap_gain": 0.01, **shares}
    assert rule.unmet(good) == []
    for name, value in (("ap_gain", nan), ("ap_gain", 0.0), *((name, nan) for name in shares)):
        assert len(rule.unmet(good | {name: value})) == 1


@pytest.mark.parametrize(
    ("own", "share", "why"),
    [(0.0, None, "challenger_alert_share: 1, at most 0.2"), (2.0, None, "challenger_recall_own: 0"),
     (2.0, 1.0, "challenger_recall_own: 0"), (0.8, None, None), (0.0, 1.0, None)],
)  # fmt: skip
def test_a_challenger_that_alerts_on_everything_or_finds_nothing_is_not_promoted(
    own: float, share: float | None, why: str | None
) -> None:
    """By its scores it is the better one; by its own threshold nobody could look at its alerts."""
    places = np.arange(1000, dtype=np.float32) / 1000
    champion, fraud = places.copy(), (places >= 0.92).astype(np.int8)
    champion[:5], champion[-5:] = 0.99, 0.01
    figures = compare(Pair(champion, places, (Thresholds(0.9, 2.0), Thresholds(own, 2.0))), fraud)
    assert figures["ap_gain"] > 0.01
    unmet = Promotion(min_labelled=1, max_alert_share=share).unmet(figures)
    assert [why is not None and line.startswith(why) for line in unmet] == ([True] if why else [])


@pytest.mark.parametrize(
    ("theirs", "own", "share", "why"),
    [(0.95, 0.8, None, "decline_share: 0.2, at most 0.1 "), (2.0, 0.95, None, "at most 0 "),
     (0.95, 0.9, None, None), (0.95, 0.95, 0.01, "at most 0.01 "), (2.0, 0.95, 0.06, None)],
)  # fmt: skip
def test_a_challenger_that_declines_far_more_than_the_champion_is_not_promoted(
    theirs: float, own: float, share: float | None, why: str | None
) -> None:
    """As many alerts as the champion has, all of which would be declined unseen."""
    places = np.arange(1000, dtype=np.float32) / 1000
    champion, fraud = places.copy(), (places >= 0.92).astype(np.int8)
    champion[:5], champion[-5:] = 0.99, 0.01
    both = Thresholds(0.9, theirs), Thresholds(0.8, own)
    figures = compare(Pair(champion, places, both), fraud)
    unmet = Promotion(min_labelled=1, max_decline_share=share).unmet(figures)
    assert [why is not None and why in line for line in unmet] == ([True] if why else [])


def test_rolling_back_twice_goes_back_twice_and_half_a_line_hides_no_other(store: Path) -> None:
    champion = Champion(store)
    add_version(store, "3.0.0")
    for version, before in (("1.0.0", None), ("2.0.0", "1.0.0"), ("3.0.0", "2.0.0")):
        champion.promote(version, by="hand", champion=before)
    with (store / "fraud" / "decisions.jsonl").open("a") as file:
        file.write('{"time": "20')  # a process was killed here
    assert champion.roll_back() == ("3.0.0", "2.0.0")
    assert champion.rolled_back() == {"3.0.0"}
    assert champion.roll_back() == ("2.0.0", "1.0.0")
    assert champion.rolled_back() == {"2.0.0", "3.0.0"}
    with pytest.raises(ConfigError, match="no version answered before"):
        champion.roll_back()
    champion.promote("3.0.0", by="hand", champion="1.0.0")
    assert champion.rolled_back() == {"2.0.0"}


def test_what_a_cheaper_variant_scored_and_what_came_again_is_not_compared_twice(
    batches: tuple[list[Any], Any],
) -> None:
    payments, batch = batches
    shadow = Shadow("x", HALF, 10_000, 1.0)
    output = np.tile(np.array([[0.1, 0.0]], np.float32), (1000, 1))
    output[:400, 1] = 1.0
    for _ in range(3):
        shadow.offer(payments, batch, output)
    while (flow := shadow.flow()) is not None:
        drive(flow, lambda call: torch.zeros(len(call.rows), 2))  # type: ignore[arg-type]
    assert shadow.figures(7.0)["payments"] == 600


def at_once(count: int, work: Callable[[], object]) -> list[object]:
    """What each of some threads came to that began together: a result, or its error."""
    start, found = threading.Barrier(count), []

    def one() -> None:
        start.wait(30)
        try:
            found.append(work())
        except ConfigError as error:
            found.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == count
    return found


def test_of_workers_that_promote_at_once_one_does(store: Path) -> None:
    def promote() -> bool:
        return Champion(store).promote("2.0.0", by="rule", champion="1.0.0")

    assert sorted(map(bool, at_once(8, promote))) == [False] * 7 + [True]
    assert [(one["from"], one["to"]) for one in Champion(store).decisions()[1:]] == [
        ("1.0.0", "2.0.0")
    ]


def test_who_rolls_back_at_once_goes_back_one_step_each(store: Path) -> None:
    add_version(store, "3.0.0")
    champion = Champion(store)
    champion.promote("2.0.0", by="hand", champion="1.0.0")
    champion.promote("3.0.0", by="hand", champion="2.0.0")
    found = at_once(3, lambda: Champion(store).roll_back())
    done = sorted(one for one in found if not isinstance(one, ConfigError))  # type: ignore[type-var]
    assert done == [("2.0.0", "1.0.0"), ("3.0.0", "2.0.0")]
    assert champion.version() == "1.0.0"


def test_a_rule_does_not_promote_what_was_decided_otherwise_meanwhile(store: Path) -> None:
    champion = Champion(store)
    add_version(store, "3.0.0")
    champion.promote("3.0.0", by="hand", champion="1.0.0")
    assert not champion.promote("2.0.0", by="rule", champion="1.0.0")
    champion.roll_back()
    assert not champion.promote("3.0.0", by="rule", champion="1.0.0"), "it was rolled back"
    assert champion.version() == "1.0.0"
    assert champion.promote("3.0.0", by="hand", champion="1.0.0"), "a person may"


def test_a_process_that_holds_the_decisions_is_named_and_not_waited_for_without_end(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plinth.verticals.finance.succession.champion.LOCK_SECONDS", 0.05)
    with (store / "fraud" / "champion.lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"champion\.lock"):
            Champion(store).promote("2.0.0", by="hand", champion="1.0.0")
    assert Champion(store).promote("2.0.0", by="hand", champion="1.0.0")


def test_no_thread_loses_the_count_of_flows(store: Path) -> None:
    versions = Process.of(store).vertical.versions

    def work() -> None:
        for _ in range(3_000):
            with versions.asked() as serving:
                assert serving.flows

    at_once(4, work)
    assert not versions.serving.flows


def test_a_flow_that_begins_while_another_version_takes_over_asks_that_one(store: Path) -> None:
    versions = Process.of(store).vertical.versions
    before, after = (
        versions.serving,
        replace(versions.serving, asked_as=("fraud-challenger", "fraud-challenger-lite")),
    )

    class TakenOver(set[object]):
        def add(self, flow: object) -> None:
            versions.serving = replace(after, flows=set())
            super().add(flow)

    before.flows = TakenOver()
    with versions.asked() as serving:
        assert serving.name == "fraud-challenger"
        assert (len(serving.flows), len(before.flows)) == (1, 0)
    assert not serving.flows


def test_payments_that_a_version_was_trained_on_do_not_judge_it(
    store: Path, tmp_path: Path, records: list[bytes]
) -> None:
    times = sorted({one["event_time"] for one in map(json.loads, records) if "amount" in one})
    until = times[len(times) // 2]
    moment = round(datetime.fromisoformat(until).timestamp() * 1e3)
    for version in ("4.0.0", "5.0.0"):
        add_version(store, version, facts={WINDOW: {"from": 0, "to": moment}})
    Champion(store).promote("2.0.0", by="hand", champion="1.0.0")
    compared = []
    for champion, challenger in (("2.0.0", "4.0.0"), ("4.0.0", "2.0.0"), ("4.0.0", "5.0.0")):
        Champion(store).promote(champion, by="hand", champion="2.0.0")
        process = Process.of(store, challenger=challenger)
        process.settle()
        process.score(read(process, records))
        process.follow()
        process.follow()
        report = json.loads((store / "fraud" / "challenger.json").read_bytes())
        assert (report["champion"], report["challenger"]) == (champion, challenger)
        compared.append(report["figures"]["payments"])
    later = sum(one["event_time"] > until for one in map(json.loads, records) if "amount" in one)
    assert 0 < later < sum("amount" in json.loads(one) for one in records)
    assert compared == [min(later, MAX_WAITING)] * 3


def test_what_was_never_changed_cannot_be_rolled_back(store: Path) -> None:
    with pytest.raises(ConfigError, match="no version answered before"):
        Champion(store).roll_back()
    (store / "fraud" / "champion.json").write_text("{")
    with pytest.raises(ModelError, match=r"champion\.json"):
        FraudScoring(FraudSettings(store=store))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="promotion needs a challenger"):
        FraudSettings(promotion=Promotion())
    with pytest.raises(ValidationError, match="model_version pins"):
        FraudSettings(promotion=Promotion(), challenger="newest", model_version="1.0.0")


def test_labels_are_joined_to_their_payments_and_silence_for_a_week_means_genuine(
    records: list[bytes],
) -> None:
    vertical = FraudScoring(FraudSettings(max_ahead_seconds=None))
    table = simulate(PEOPLE, seed=5)
    payments = [vertical.parse(raw) for raw in transactions_json(table)]
    shadow = Shadow("x", HALF, 100_000, 1.0)
    dice = np.random.default_rng(2)
    old, new = dice.random((2, len(table))).astype(np.float32)
    for start in range(0, len(table), 500):
        span = slice(start, start + 500)
        batch = vertical.state.update(vertical._asked(payments[span]).events())
        shadow.offer(payments[span], batch, np.stack([old[span], np.zeros_like(old[span])], 1))  # type: ignore[arg-type]
        while (flow := shadow.flow()) is not None:
            answer = torch.from_numpy(new[span])[:, None]
            drive(flow, lambda call, answer=answer: answer)  # type: ignore[misc]
    for raw in labels_json(table):
        shadow.note(vertical.parse(raw))  # type: ignore[arg-type]
    assert shadow.flow() is None
    known = table["time"] <= table["time"][-1] - 7 * DAY
    fraud = np.where(table["fraud"], 1, np.where(known, 0, -1)).astype(np.int8)
    expected = compare(Pair(old, new, HALF), fraud)
    found = shadow.figures(7.0)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["frauds"] == table["fraud"].sum()
    assert found["days"] == pytest.approx((table["time"][-1] - table["time"][0]) / DAY)


SCORES = st.lists(
    st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32), st.sampled_from((-1, 0, 1))),
    min_size=1,
    max_size=40,
)


@given(SCORES, st.floats(0, 1))
def test_versions_are_compared_at_the_same_number_of_alerts(
    rows: list[tuple[float, float, int]], review: float
) -> None:
    old, new = (np.array([row[at] for row in rows], np.float32) for at in (0, 1))
    fraud = np.array([row[2] for row in rows], np.int8)
    same = compare(Pair(old, old, (Thresholds(review, 1.0),) * 2), fraud)
    assert same["psi"] == 0
    assert same.get("ap_gain", 0.0) == 0.0
    assert same.get("champion_recall") == same.get("challenger_recall")
    found = compare(Pair(old, new, (Thresholds(review, 1.0),) * 2), fraud)
    assert found["psi"] >= 0
    alerts = {place for place, score in enumerate(old) if score >= review}
    ranked = sorted(range(len(new)), key=lambda place: -new[place])[: len(alerts)]
    if alerts:
        assert found["alerts_in_common"] == pytest.approx(len(alerts & set(ranked)) / len(alerts))
    if "challenger_recall" in found:
        hits = sum(fraud[place] == 1 for place in ranked)
        assert found["challenger_recall"] == pytest.approx(hits / (fraud == 1).sum())


def left_out() -> float:
    name, labels = "plinth_finance_challenger_payments_total", {"outcome": "left_out"}
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def batches(records: list[bytes]) -> tuple[list[Any], Any]:
    vertical = FraudScoring(FraudSettings(max_ahead_seconds=None))
    payments: list[Any] = [vertical.parse(raw) for raw in records[:1000]]
    return payments, vertical.state.update(vertical._asked(payments).events())


def test_what_waits_is_bounded_and_what_is_left_out_is_counted(
    batches: tuple[list[Any], Any],
) -> None:
    payments, batch = batches
    shadow, before = Shadow("x", HALF, 1_000, 1.0), left_out()
    for _ in range(20):
        shadow.offer(payments, batch, np.tile(np.array([[0.1, 0.0]], np.float32), (1000, 1)))
    assert left_out() - before == 20_000 - MAX_WAITING // 1000 * 1000
    while (flow := shadow.flow()) is not None:
        drive(flow, lambda call: torch.zeros(len(call.rows), 2))  # type: ignore[arg-type]
    assert shadow.figures(7.0)["payments"] == 1_000, "the newest are remembered"
    before = left_out()
    shadow.offer(payments, batch, np.tile(np.array([[0.1, 0.0]], np.float32), (1000, 1)))
    assert left_out() == before, "there is room again"


def test_a_share_of_the_cards_is_scored_and_of_those_every_payment(
    batches: tuple[list[Any], Any],
) -> None:
    payments, batch = batches
    shadow = Shadow("x", HALF, 10_000, 0.25)
    shadow.offer(payments, batch, np.tile(np.array([[0.1, 0.0]], np.float32), (1000, 1)))
    flow = shadow.flow()
    assert flow is not None
    call = next(flow)
    taken = {
        payment.card for payment in payments if payment.card in _cards_of(call, payments, batch)
    }
    assert 0.05 < len(taken) / len({payment.card for payment in payments}) < 0.5
    assert len(call.rows) == sum(payment.card in taken for payment in payments)  # type: ignore[arg-type]


def _cards_of(call: Call, payments: list[Any], batch: Any) -> set[str]:
    """Cards of the rows that were asked for."""
    asked = {row.tobytes() for row in call.rows.numpy()}  # type: ignore[union-attr]
    columns = call.rows.shape[1]  # type: ignore[union-attr]
    rows = np.ascontiguousarray(batch.rows[:, :columns])
    return {one.card for one, row in zip(payments, rows, strict=True) if row.tobytes() in asked}
