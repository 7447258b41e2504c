"""A shift of the payments raises an alarm, and ordinary days raise none."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from payments import leave_reasons_out
from torch import Tensor, nn

from plinth.engine import Call, ModelError, ModelStore
from plinth.engine.metrics import REGISTRY
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.online import FEATURES, MODEL_FEATURES, Batch, FeatureState
from plinth.verticals.finance.features.timeline import DAY, LABEL_DELAY
from plinth.verticals.finance.schema import Record
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.succession.drift import (
    FACT,
    SCORE,
    DriftWatch,
    Reference,
    stability_index,
)
from plinth.verticals.finance.training.simulator import (
    Population,
    Table,
    labels_json,
    simulate,
    transactions_json,
)
from plinth.verticals.testing.flows import drive

PEOPLE = Population(customers=600, terminals=1200, days=50, radius=14)
"""With as many terminals around each customer as the model's training has."""
WARM, SHIFT = 36, 44
"""Days from which on payments are scored, and then are three times as large."""


@dataclass(slots=True)
class Stream:
    """Payments and, seven days after each fraud, its label, as a door would bring them."""

    vertical: FraudScoring = field(default_factory=FraudScoring)
    models: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.models = {model.spec.name: model.module for model in self.vertical.models()}

    @torch.inference_mode()
    def score(self, table: Table, until: int, frauds: Table) -> None:
        for records in self._read(table, until, frauds, 256):
            drive(self.vertical.infer(records), self._answer)

    def _answer(self, call: Call) -> Tensor:
        leave_reasons_out(call)
        found: Tensor = self.models[call.model](call.rows)
        return found

    def observe(self, table: Table, until: int, frauds: Table) -> None:
        for records in self._read(table, until, frauds, 4096):
            self.vertical.observe(records)

    def _read(self, table: Table, until: int, frauds: Table, size: int) -> Iterator[list[Record]]:
        first = int(table["time"][0])
        due = frauds["time"] + LABEL_DELAY
        frauds = frauds[(due >= first) & (due < until)]
        records = sorted(
            [
                *zip(table["time"].tolist(), transactions_json(table), strict=True),
                *zip((frauds["time"] + LABEL_DELAY).tolist(), labels_json(frauds), strict=True),
            ]
        )
        for start in range(0, len(records), size):
            yield [self.vertical.parse(raw) for _, raw in records[start : start + size]]


@pytest.fixture(scope="module")
def days() -> list[Table]:
    """The history, the plain days and the later ones."""
    table = simulate(PEOPLE, seed=23)
    cuts = PEOPLE.start_ms + np.array([WARM, SHIFT]) * DAY
    return list(np.split(table, np.searchsorted(table["time"], cuts)))


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"plinth_finance_{name}", labels)


def test_a_plain_stream_raises_no_alarm_and_a_shifted_one_names_the_feature(
    days: list[Table], caplog: pytest.LogCaptureFixture
) -> None:
    history, plain, later = days
    frauds = np.concatenate([part[part["fraud"]] for part in days])
    ends = [PEOPLE.start_ms + day * DAY for day in (WARM, SHIFT, PEOPLE.days)]
    stream = Stream()
    watch = stream.vertical.drift
    assert watch is not None
    stream.observe(history, ends[0], frauds)
    with caplog.at_level(logging.ERROR):
        stream.score(plain, ends[1], frauds)
    assert watch.shifted == {}
    assert caplog.text == ""
    assert metric("drift_shifted") == 0
    for name in (*MODEL_FEATURES, SCORE):
        index = metric("drift_psi", feature=name)
        assert index is not None, f"the windows of {name} were full"
        assert index < 0.25, name

    later = later.copy()
    later["amount"] = np.round(later["amount"] * 3, 2)
    with caplog.at_level(logging.ERROR):
        stream.score(later, ends[2], frauds)
    assert "amount" in watch.shifted
    assert not {"weekend", "night", "terminal_count_24h"} & set(watch.shifted)
    assert metric("drift_shifted") == len(watch.shifted)
    told = [record.getMessage() for record in caplog.records]
    assert "amount" in told[0]
    assert len(told) <= len(watch.shifted), "told when something shifts, not with every window"


@pytest.fixture
def reference() -> Reference:
    found = Reference.read(ModelStore(STORE).facts("fraud"), "fraud")
    assert found is not None
    return found


def test_labels_that_stop_are_told_and_labels_that_come_are_not(
    reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    def sixty_days(watch: DriftWatch, labels_per_day: int) -> None:
        rng = np.random.default_rng(5)
        output = np.column_stack((rng.random(2_500), np.zeros(2_500))).astype(np.float32)
        batch = Batch(np.zeros((2_500, len(FEATURES)), np.float32), np.zeros(2_500, np.uint8))
        for day in range(60):
            watch.label(labels_per_day)
            watch.take((day * DAY, day * DAY), batch, output, FeatureState(), 0)

    usual = round(2_500 * reference.fraud_share)
    kept, stopped = DriftWatch(reference, 0.25, 0.7), DriftWatch(reference, 0.25, 0.7)
    sixty_days(kept, usual)
    assert not kept.labels_missing
    share = metric("missing_label_share")
    assert share is not None
    assert share < 0.3
    with caplog.at_level(logging.ERROR):
        sixty_days(stopped, 0)
    assert stopped.labels_missing
    assert metric("missing_label_share") == 1.0
    assert caplog.text.count("labels do not come") == 1


def test_labels_that_are_read_again_are_counted_as_often_as_their_payments(
    days: list[Table],
) -> None:
    """A replay counts neither, a chunk that is taken twice counts both once."""
    history, plain, _ = days
    counted: list[int] = []

    class Counting(DriftWatch):
        def label(self, count: int) -> None:
            counted.append(count)

    stream = Stream()
    stream.vertical.drift.__class__ = Counting  # type: ignore[assignment]
    frauds = history[history["fraud"]]
    stream.observe(history, PEOPLE.start_ms + WARM * DAY, frauds)
    assert sum(counted) == 0, "payments of a replay are not counted, nor are their labels"
    end = PEOPLE.start_ms + SHIFT * DAY
    for _ in range(2):
        stream.score(plain[:2_000], end, frauds)
    due = frauds["time"] + LABEL_DELAY
    assert sum(counted) == ((due >= plain["time"][0]) & (due < end)).sum() > 0


SHARES = st.lists(st.integers(0, 1_000), min_size=2, max_size=12).map(
    lambda counts: (np.array(counts) + 0.5) / (np.array(counts) + 0.5).sum()
)


@given(SHARES)
def test_the_index_is_nothing_for_equal_shares_and_the_same_both_ways(
    one: NDArray[np.float64],
) -> None:
    other = one[::-1]
    assert stability_index(one, one) == 0
    assert stability_index(one, other) >= 0
    assert stability_index(one, other) == pytest.approx(stability_index(other, one))


def test_the_index_by_hand() -> None:
    found = stability_index(np.array([0.5, 0.5]), np.array([0.25, 0.75]))
    assert found == pytest.approx(0.25 * np.log(2) - 0.25 * np.log(2 / 3))


def test_a_model_without_a_reference_is_served_and_not_watched(tmp_path: Path) -> None:
    store = ModelStore(STORE)
    for name in ("fraud", "fraud-lite"):
        model = store.load(name)
        ModelStore(tmp_path).save(model.spec, model.module)
    assert FraudScoring(FraudSettings(store=tmp_path)).drift is None


def test_a_damaged_reference_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    store = ModelStore(STORE)
    for name in ("fraud", "fraud-lite"):
        model = store.load(name)
        facts = json.loads(json.dumps(store.facts(name)))
        facts[FACT]["bins"]["amount"]["edges"] = [3.0, 1.0]
        ModelStore(tmp_path).save(model.spec, model.module, facts=facts)
    with pytest.raises(ModelError, match=r"fraud \S+: reference\.bins\.amount"):
        FraudScoring(FraudSettings(store=tmp_path))
