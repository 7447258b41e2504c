"""Weights that are given become a version of their own, with what hangs on them found anew."""

from __future__ import annotations

import gzip
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import add_version

from plinth.engine import ConfigError, ModelError, ModelStore
from plinth.engine.compression.packing import Coded, PackedFile
from plinth.engine.compression.training import Compressed
from plinth.pipelines.cli.main import main
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.timeline import DAY
from plinth.verticals.finance.model import FraudEnsemble
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.succession.champion import WINDOW, Champion
from plinth.verticals.finance.succession.drift import Reference
from plinth.verticals.finance.training.adopt import Adoption, adopt
from plinth.verticals.finance.training.derived import pack, score, scorer
from plinth.verticals.finance.training.history import Data, simulated
from plinth.verticals.finance.training.simulator import (
    Population,
    labels_json,
    simulate,
    transactions_json,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PEOPLE = Population(customers=120, terminals=60, days=70, radius=50, bad_terminals=0.5)
FIRST = 70 - 2 - 7 - 14 + 1
"""Day on which the week of calibration begins."""
ADOPTION = Adoption(None, "1.0.0", "2.0.0", "a test", alert_budget=10)


@pytest.fixture(scope="module")
def data() -> Data:
    return simulated(PEOPLE, 3, lambda done: None)


def packed_version(store: Path, data: Data) -> None:
    """Version 1.0.0, whose scores are far from chances, and packed."""
    add_version(store / "plain", "1.0.0", shift=4.0)
    plain = ModelStore(store / "plain")
    for name in ("fraud", "fraud-lite"):
        spec, module = plain.verify(name), plain.network(name)
        small = pack(scorer(module), data, data.between(40, 7)) if name == "fraud" else module
        ModelStore(store).save(spec, small, facts=plain.facts(name))


def test_packed_weights_become_a_version_with_chances_thresholds_and_bins_of_their_own(
    data: Data, tmp_path: Path
) -> None:
    packed_version(tmp_path, data)
    made = adopt(data, tmp_path, ADOPTION)
    assert [(spec.name, spec.version) for spec in made] == [
        ("fraud", "2.0.0"),
        ("fraud-lite", "2.0.0"),
    ]
    before, after = (
        PackedFile(tmp_path / "fraud" / version / "weights.packed")
        for version in ("1.0.0", "2.0.0")
    )
    with before, after:
        for name in before.entries:
            one, other = before.read(name), after.read(name)
            if isinstance(one, Coded) and isinstance(other, Coded):
                assert torch.equal(one.codes, other.codes), "the very codes"
                assert torch.equal(one.scales, other.scales)
            elif not name.startswith("calibration."):
                assert torch.equal(before.dense(name), after.dense(name))
        assert not torch.equal(before.dense("calibration.shift"), after.dense("calibration.shift"))
    assert Champion(tmp_path).version() == "1.0.0", "what answers stays"

    store = ModelStore(tmp_path)
    facts, spec = store.facts("fraud", "2.0.0"), store.verify("fraud", "2.0.0")
    model = scorer(store.network("fraud", "2.0.0"))
    week, both = data.between(FIRST, 7), data.between(FIRST, 14)
    fraud = data.table["fraud"]
    assert score(model, data, week).mean() == pytest.approx(fraud[week].mean(), rel=0.2)
    assert facts[WINDOW]["to"] == int(data.table["time"][week[-1]])
    found = Reference.read(facts, "fraud")
    want = Reference.of(data.rows[both], score(model, data, both), fraud[both])
    assert found == want
    assert 0 < spec.metrics["review_threshold"] <= spec.metrics["decline_threshold"]
    assert {"ap", "calibration_error"} <= spec.metrics.keys()
    assert "fold_ap_mean" not in spec.metrics, "the folds were of another training"
    Champion(tmp_path).promote("2.0.0", by="hand", champion="1.0.0")
    assert FraudScoring(FraudSettings(store=tmp_path)).variants[0].version == "2.0.0"


def test_payments_that_the_weights_were_trained_on_judge_nothing(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    until = data.start(FIRST)
    for version, end in (("1.0.0", until), ("3.0.0", until - 1)):
        add_version(tmp_path, version, facts={WINDOW: {"from": until - 9 * DAY, "to": end}})
    with pytest.raises(ConfigError, match="were made from payments up to 2018-"):
        adopt(data, tmp_path, ADOPTION)
    with caplog.at_level(logging.WARNING):
        adopt(data, tmp_path, replace(ADOPTION, base="3.0.0"))
        assert not caplog.text
        add_version(tmp_path, "4.0.0")
        adopt(data, tmp_path, replace(ADOPTION, base="4.0.0", version="5.0.0"))
    assert "does not say which payments" in caplog.text
    assert ModelStore(tmp_path).facts("fraud", "2.0.0")[WINDOW]["from"] == until - 9 * DAY


def test_what_cannot_be_adopted_is_named_and_nothing_is_stored(data: Data, tmp_path: Path) -> None:
    add_version(tmp_path, "1.0.0")
    with pytest.raises(ModelError, match="nothing-like-it"):
        adopt(data, tmp_path, replace(ADOPTION, variant="nothing-like-it"))
    with pytest.raises(ConfigError, match="70 days of payments, 83 are needed"):
        adopt(data, tmp_path, replace(ADOPTION, label_days=31))
    genuine = data.table.copy()
    genuine["fraud"][data.day >= FIRST + 7] = False
    with pytest.raises(ConfigError, match="have 0 frauds"):
        adopt(replace(data, table=genuine), tmp_path, ADOPTION)
    assert ModelStore(tmp_path).versions("fraud") == ["1.0.0"]
    adopt(data, tmp_path, ADOPTION)
    with pytest.raises(ModelError, match=r"2\.0\.0 exists already"):
        adopt(data, tmp_path, ADOPTION)


def test_the_model_that_comes_with_plinth_is_packed_and_a_sixth_of_float32() -> None:
    store = ModelStore(STORE)
    stored = store.network("fraud")
    assert isinstance(stored, Compressed)
    plain = sum(value.nbytes for value in stored.module.state_dict().values())
    assert store.size("fraud") * 6 <= plain


def test_it_scores_without_lightgbm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    model = ModelStore(STORE).load("fraud")
    assert isinstance(model.module, FraudEnsemble), "its trees too"
    with torch.inference_mode():
        chance, variant = model.module(torch.ones(1, 21))[0].tolist()
    assert 0 < chance < 1
    assert variant == 0


@pytest.mark.soak
def test_from_a_history_to_a_smaller_model_that_answers(tmp_path: Path) -> None:
    """The commands: rows, compress, adopt, promote."""
    store, history = tmp_path / "models", tmp_path / "history"
    add_version(store, "1.0.0")
    history.mkdir()
    table = simulate(PEOPLE, seed=3)
    with gzip.open(history / "payments.jsonl.gz", "wb") as lines:
        lines.writelines(raw + b"\n" for raw in transactions_json(table))
    (history / "labels.jsonl").write_bytes(b"\n".join(labels_json(table)))
    config = tmp_path / "plinth.toml"
    config.write_text(f'[verticals.finance]\nstore = "{store}"\n')

    def plinth(*words: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*words, "--config", str(config)])
        assert ended.value.code == 0

    rows = tmp_path / "rows.npz"
    plinth("finance", "rows", str(history), "--out", str(rows))
    with np.load(rows) as found:
        assert found["features"].shape == (len(found["labels"]), 21)
        assert found["labels"].any()
    search = ("--bits", "even", "--sparsity", "0", "--epochs", "0", "--max-loss", "0.05")
    metric = ("--store", str(store), "--data", str(rows), "--metric", "ap")
    plinth("compress", "fraud", *metric, *search)
    (variant,) = ModelStore(store).variants("fraud").list()
    plinth("finance", "adopt", variant.name, str(history), "--version", "2.0.0")
    plinth("finance", "promote", "2.0.0")
    vertical = FraudScoring(FraudSettings(store=store))
    assert vertical.variants[0].version == "2.0.0"
    assert ModelStore(store).size("fraud", "2.0.0") * 6 < ModelStore(store).size("fraud", "1.0.0")
