"""The fraud model of the comparison as a vertical of Plinth: 64 features in, one score out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import fraud_mlp
from pydantic import BaseModel, Field

from plinth.engine import (
    Call,
    Flow,
    InputError,
    Model,
    ModelSpec,
    Sla,
    TensorSpec,
    architecture,
    from_pretrained,
)
from plinth.verticals import Vertical

SPEC = ModelSpec(
    name="fraud-mlp",
    architecture="fraud_mlp",
    inputs=(TensorSpec(name="features", shape=(fraud_mlp.FEATURES,)),),
    outputs=(TensorSpec(name="score", shape=(1,)),),
)
architecture("fraud_mlp")(fraud_mlp.network)
Feature = Annotated[float, Field(allow_inf_nan=False)]


class Transaction(BaseModel):
    """64 features of one transaction."""

    features: list[Feature] = Field(min_length=fraud_mlp.FEATURES, max_length=fraud_mlp.FEATURES)


class Score(BaseModel):
    """How likely it is a fraud, 0..1."""

    score: float


class FraudMlp(Vertical[Transaction, Score]):
    """Scores transactions with the multilayer perceptron."""

    name = "fraud_mlp"
    summary = "The fraud model of the serving comparison."
    action = "score"
    request = Transaction
    response = Score
    sla = Sla(deadline_ms=150)

    def models(self) -> Sequence[Model]:
        return [from_pretrained(SPEC.name)]

    def example(self) -> Transaction:
        return Transaction(features=[0.1 * at for at in range(fraud_mlp.FEATURES)])

    def infer(self, requests: Sequence[Transaction]) -> Flow[list[Score | InputError]]:
        if not requests:
            return []
        scores = yield Call(SPEC.name, fraud_mlp.tensor([one.features for one in requests]))
        return [Score(score=score) for score in scores[:, 0].tolist()]
