"""Trees that LightGBM grew score in the module as they do in LightGBM, and the ensemble serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from payments import payment

from plinth.engine import ConfigError, Engine, ModelStore
from plinth.verticals.finance import FraudScoring, FraudSettings
from plinth.verticals.finance.features.online import MODEL_FEATURES
from plinth.verticals.finance.model import FraudEnsemble, Trees, fraud_mlp
from plinth.verticals.finance.settings import STORE
from plinth.verticals.finance.training.boosting import SETTINGS, as_module, with_trees
from plinth.verticals.finance.training.derived import score
from plinth.verticals.finance.training.history import simulated
from plinth.verticals.finance.training.simulator import Population
from plinth.verticals.finance.training.train import RECIPES, fit, recipes, specification

pytestmark = pytest.mark.needs("lightgbm")
WIDTH = len(MODEL_FEATURES)


def rows_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    rows = np.round(dice.exponential(3, (count, WIDTH)), 1).astype(np.float32)
    return rows, rows[:, 0] * dice.random(count) + rows[:, 3] > 9


def test_each_row_falls_into_the_leaves_that_lightgbm_says() -> None:
    import lightgbm

    rows, fraud = rows_of(3_000)
    booster = lightgbm.train(SETTINGS, lightgbm.Dataset(rows, fraud.astype(np.float32)), 40)
    module = as_module([one["tree_structure"] for one in booster.dump_model()["tree_info"]])
    edges = np.unique(module.threshold.numpy())
    seen = np.concatenate([rows, np.resize(edges, (200, WIDTH)), np.zeros((1, WIDTH))])
    seen = np.concatenate([seen, np.nextafter(seen, np.float32(np.inf))]).astype(np.float32)
    told = module(torch.from_numpy(seen))[:, 0].numpy()
    np.testing.assert_allclose(told, booster.predict(seen, raw_score=True), atol=1e-5)
    assert len(np.unique(told)) > 1_000


def test_trees_of_one_leaf_are_their_value() -> None:
    module = as_module([{"leaf_value": -2.5}, {"leaf_value": 0.5}])
    assert module(torch.zeros(3, WIDTH)).tolist() == [[-2.0]] * 3


def test_trees_stand_beside_the_network_alone_and_not_its_cheaper_variant() -> None:
    people = Population(customers=60, terminals=30, days=20, radius=40, bad_terminals=0.5)
    data = simulated(people, 1, lambda done: None)
    for recipe in recipes(trees=True):
        told = {"epochs": 1, "seed": 0, "advance": lambda done: None}
        one, two = (fit(recipe, data, data.between(0, 20), **told) for _ in range(2))
        assert isinstance(one, FraudEnsemble) is (recipe.name == "fraud")
        scores = (score(model, data, data.between(0, 20)) for model in (one, two))
        assert np.array_equal(*scores), "the same seed gives the same model"


def test_what_is_not_told_counts_as_the_mean_in_both_parts() -> None:
    rows, fraud = rows_of(500)
    network = fraud_mlp(WIDTH, width=16).eval()
    network.standardise.fit(torch.from_numpy(rows))
    made = with_trees(network, rows, fraud, seed=1)
    made.requires_grad_(False)
    nothing, mean = torch.full((1, WIDTH), -1.0), network.standardise.mean[None, :WIDTH]
    assert float(made.trees(mean)) + float(network.logits(nothing)) == pytest.approx(
        float(made.logits(nothing)), abs=1e-6
    )


def test_an_ensemble_is_stored_and_served_and_gives_reasons(tmp_path: Path) -> None:
    rows, fraud = rows_of(2_000)
    network = fraud_mlp(WIDTH, width=16).eval()
    network.standardise.fit(torch.from_numpy(rows))
    made = with_trees(network, rows, fraud, seed=1)
    alone, told = network.logits(torch.from_numpy(rows)), made.logits(torch.from_numpy(rows))
    assert (told - alone).std() > 0.5
    recipe = replace(RECIPES[0], config={"width": 16})
    spec = specification(
        recipe, "2.0.0", "a test", {"review_threshold": 0.0, "decline_threshold": 0.9}, model=made
    )
    ModelStore(tmp_path).save(spec, made)
    lite = ModelStore(STORE).load("fraud-lite")
    ModelStore(tmp_path).save(lite.spec, lite.module)
    vertical = FraudScoring(FraudSettings(store=tmp_path))
    with Engine(backend="eager", precision="fp32") as engine:
        for model in vertical.models():
            engine.add(model)
        answer = engine.run(vertical.infer([vertical.parse(payment(amount=400.0))]))
    (decision,) = answer.value
    assert decision.model_version == "2.0.0"
    assert 0 <= decision.score <= 1


def test_a_tree_whose_table_would_be_huge_is_refused() -> None:
    with pytest.raises(ConfigError, match="trees of 30 nodes"):
        Trees(1, 30)
