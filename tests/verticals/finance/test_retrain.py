"""The next version is trained up to the newest usable day, and replaces nothing."""

from __future__ import annotations

import gzip
import logging
import threading
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import add_version

from plinth.engine import ConfigError, InputError, ModelStore
from plinth.pipelines.cli.finance.retraining import files_of, seconds_of, train_on, train_once
from plinth.pipelines.cli.main import main
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.timeline import DAY
from plinth.verticals.finance.succession.champion import WINDOW, Champion
from plinth.verticals.finance.training.history import Data, recorded, simulated
from plinth.verticals.finance.training.retrain import Plan, retrain, window_of
from plinth.verticals.finance.training.simulator import (
    Population,
    Table,
    labels_json,
    simulate,
    transactions_json,
)
from plinth.verticals.finance.training.train import Plan as FirstPlan
from plinth.verticals.finance.training.train import rates_of

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE = Population(customers=120, terminals=60, days=76, radius=50, bad_terminals=0.5)
QUICK = Plan(days=14, label_days=7, epochs=1, alert_budget=20)


@pytest.fixture(scope="module")
def data() -> Data:
    return simulated(PEOPLE, 3, lambda done: None)


@pytest.fixture(scope="module")
def table() -> Table:
    return simulate(PEOPLE, seed=3)


def write(folder: Path, table: Table) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "payments.jsonl").write_bytes(b"\n".join(transactions_json(table)))
    (folder / "labels.jsonl").write_bytes(b"\n".join(labels_json(table)))
    return folder


def weights(store: Path, version: str) -> bytes:
    return (store / "fraud" / version / "weights.packed").read_bytes()


def train(data: Data, store: Path, version: str) -> None:
    retrain(data, QUICK, store, version=version, source="a test", advance=lambda done: None)


def test_the_window_ends_at_the_newest_usable_day_and_what_lies_outside_changes_nothing(
    data: Data, tmp_path: Path
) -> None:
    last = QUICK.last(data)
    assert last == PEOPLE.days - 1 - 1 - 7
    train(data, tmp_path, "1")

    def with_amounts_of(day: int) -> Data:
        rows = data.rows.copy()
        rows[data.day == day, 0] *= 2
        return replace(data, rows=rows)

    train(with_amounts_of(last), tmp_path, "2")
    assert weights(tmp_path, "2") != weights(tmp_path, "1"), "the newest usable day counts"
    for version, day in (("3", last + 1), ("4", last - QUICK.days)):
        train(with_amounts_of(day), tmp_path, version)
        assert weights(tmp_path, version) == weights(tmp_path, "1")


def test_other_labels_are_another_window_though_there_are_as_many(data: Data) -> None:
    before = window_of(data, QUICK)
    table = data.table.copy()
    rows = data.between(QUICK.last(data) - 3, 3)
    fraud = table["fraud"]
    one, other = rows[fraud[rows]][0], rows[~fraud[rows]][0]
    fraud[one], fraud[other] = False, True
    after = window_of(replace(data, table=table), QUICK)
    assert after["frauds"] == before["frauds"]
    assert after != before
    assert window_of(data, QUICK) == before


def quality(data: Data, store: Path, plan: Plan = QUICK) -> tuple[float, ...]:
    (spec, _) = retrain(data, plan, store, version="1", source="", advance=lambda done: None)
    return tuple(spec.metrics[name] for name in ("auc", "ap", "card_precision_100"))


def test_what_a_version_is_worth_is_measured_without_labels_that_came_later(
    data: Data, tmp_path: Path
) -> None:
    """Frauds that were not known when the test week began are genuine to the measured model."""
    first = QUICK.last(data) - 7 + 1
    late = data.between(0, first)
    late = late[data.table["fraud"][late]][::2]
    known = data.known.copy()
    known[late] = data.start(first + 7)
    genuine = data.table.copy()
    genuine["fraud"][late] = False
    seen_late = quality(replace(data, known=known), tmp_path / "late")
    assert seen_late == quality(replace(data, table=genuine), tmp_path / "never")
    assert seen_late != quality(data, tmp_path / "at once")


def test_the_measured_window_ends_as_long_before_the_test_as_labels_take(
    data: Data, tmp_path: Path
) -> None:
    plan = replace(QUICK, days=11, label_days=9)
    first = plan.last(data) - 7 + 1
    for day, counts in ((first - 1, False), (first - 9, False), (first - 10, True)):
        rows = data.rows.copy()
        rows[data.day == day] *= 30
        changed = quality(replace(data, rows=rows), tmp_path / f"{day}", plan)
        plain = quality(data, tmp_path / f"plain{day}", plan)
        assert (changed != plain) is counts, day


@pytest.mark.parametrize("cut", [-1, -9, 40, 5])
def test_a_history_that_is_not_copied_in_full_is_named_and_trains_nothing(
    table: Table, tmp_path: Path, cut: int
) -> None:
    whole = gzip.compress(b"\n".join(transactions_json(table[:200])))
    file = tmp_path / "payments.jsonl.gz"
    file.write_bytes(whole[:cut])
    with pytest.raises(InputError, match=r"payments\.jsonl\.gz: cannot be read") as caught:
        recorded([file], {"EUR": 1.0}, lambda done: None)
    assert "copy to another name" in str(caught.value.hint)
    file.write_bytes(whole[:30] + bytes(30) + whole[60:])
    with pytest.raises(InputError, match=r"payments\.jsonl\.gz"):
        recorded([file], {"EUR": 1.0}, lambda done: None)


def test_since_when_a_fraud_is_known_is_kept_of_recorded_labels(
    table: Table, tmp_path: Path
) -> None:
    frauds = table[table["fraud"]]
    file = tmp_path / "all.jsonl"
    file.write_bytes(b"\n".join([*labels_json(table, delay_ms=9 * DAY), *transactions_json(table)]))
    data = recorded([file], {"EUR": 1.0}, lambda done: None)
    assert np.array_equal(data.known[data.table["fraud"]], frauds["time"] + 9 * DAY)
    assert data.as_known(int(frauds["time"][0]) + 9 * DAY).table["fraud"].sum() == 0
    assert data.as_known(int(frauds["time"][0]) + 9 * DAY + 1).table["fraud"].sum() == 1


def test_a_stored_version_is_a_challenger_and_never_the_champion(
    data: Data, tmp_path: Path
) -> None:
    add_version(tmp_path, "1.0.0")
    train(data, tmp_path, "20261126.050000")
    assert Champion(tmp_path).version() == "1.0.0"
    vertical = FraudScoring(FraudSettings(store=tmp_path, challenger="newest"))
    assert vertical.versions.serving.version == "1.0.0"
    loaded = vertical.next_models()
    assert [model.spec.version for model in loaded] == ["20261126.050000"] * 2
    spec = ModelStore(tmp_path).verify("fraud", "20261126.050000")
    assert 0 < spec.metrics["ap"] <= 1
    assert 0 < spec.metrics["review_threshold"] <= spec.metrics["decline_threshold"]
    assert ModelStore(tmp_path).facts("fraud")[WINDOW] == window_of(data, QUICK)
    assert vertical.drift is not None


def test_the_command_trains_from_files_and_not_twice_on_the_same(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "models"
    add_version(store, "1.0.0")
    history = write(tmp_path / "history", table)
    settings = FraudSettings(store=store)
    made = train_once(settings, [history], QUICK)
    assert made is not None
    assert ModelStore(store).versions("fraud") == ["1.0.0", made]
    assert train_once(settings, [history], QUICK) is None, "nothing is new"
    assert "no other payments or labels" in capsys.readouterr().err
    assert Champion(store).version() == "1.0.0"


def test_a_training_that_fails_leaves_the_store_as_it_was(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "models"
    add_version(store, "1.0.0")
    (tmp_path / "plinth.toml").write_text(f'[verticals.finance]\nstore = "{store}"\n')
    history = write(tmp_path / "history", table[table["time"] < PEOPLE.start_ms + 30 * 86_400_000])
    before = sorted(path for path in store.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["finance", "retrain", str(history), "--config", str(tmp_path / "plinth.toml")])
    assert ended.value.code == 2
    assert "30 days of payments" in capsys.readouterr().err
    (history / "payments.jsonl").write_bytes(b"{\n")
    with pytest.raises(SystemExit) as ended:
        main(["finance", "retrain", str(history), "--config", str(tmp_path / "plinth.toml")])
    assert ended.value.code == 1
    assert "payments.jsonl:1" in capsys.readouterr().err
    assert sorted(path for path in store.rglob("*")) == before


@pytest.mark.soak
def test_a_time_that_fails_is_logged_and_the_next_one_trains(
    table: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, stop = tmp_path / "models", threading.Event()
    add_version(store, "1.0.0")
    (tmp_path / "history").mkdir()
    told = (FraudSettings(store=store), [tmp_path / "history"], QUICK, 1.0, stop)
    thread = threading.Thread(target=train_on, args=told)
    thread.start()
    try:
        with caplog.at_level(logging.ERROR):
            while "what answers stays" not in caplog.text:
                thread.join(0.02)
                assert thread.is_alive()
        write(tmp_path / "history", table)
        while len(ModelStore(store).versions("fraud")) < 2:
            thread.join(0.02)
            assert thread.is_alive()
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert Champion(store).version() == "1.0.0"


def test_a_history_without_fraud_labels_is_refused(data: Data, tmp_path: Path) -> None:
    genuine = data.table.copy()
    genuine["fraud"] = False
    with pytest.raises(ConfigError, match="fraud labels"):
        train(replace(data, table=genuine), tmp_path, "1")
    frauds = genuine.copy()
    frauds["fraud"] = True
    with pytest.raises(ConfigError, match="are frauds: genuine ones are needed"):
        train(replace(data, table=frauds, known=data.table["time"]), tmp_path, "1")
    assert not (tmp_path / "fraud").exists()


@pytest.mark.parametrize("wrong", [{"decline_cost": nan}, {"decline_cost": -1.0},
                                   {"decline_cost": inf}, {"alert_budget": 0}])  # fmt: skip
@pytest.mark.parametrize("kind", [Plan, FirstPlan])
def test_thresholds_that_nothing_or_everything_is_above_are_not_planned(
    kind: Any, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", " ")):
        kind(**wrong)


def test_a_payment_far_off_and_too_few_cards_are_told_for_what_they_are(
    data: Data, tmp_path: Path
) -> None:
    day = data.day.copy()
    day[-1] = 29_000
    with pytest.raises(ConfigError, match="no payment lies in the 14 days up to day 28992"):
        window_of(replace(data, day=day), QUICK)
    one = data.table.copy()
    one["customer"] = 0
    with pytest.raises(ConfigError, match="of too few cards"):
        train(replace(data, table=one), tmp_path, "1")


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "payments.jsonl"
    file.write_bytes(b"\0" * 1_000_002)
    with pytest.raises(InputError, match=r"payments\.jsonl: a line has more than 1,000,000 bytes"):
        recorded([file], {"EUR": 1.0}, lambda done: None)


@pytest.mark.parametrize("word", ["USD", "USD=x", "USD=nan", "USD=inf", "USD=-1", "USD=0"])
def test_a_rate_is_a_number_that_money_can_be_worth(word: str) -> None:
    with pytest.raises(ConfigError, match=f"--rate {word}"):
        rates_of([word])
    assert rates_of(["USD=0.9"]) == {"USD": 0.9}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("1h", 3600.0)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1", "-1h", "0s", "1w", "nanh", "infd"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--every"):
        seconds_of(text)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \*\.jsonl"):
        files_of([tmp_path])
    assert files_of([tmp_path / "a.jsonl"]) == [tmp_path / "a.jsonl"]
