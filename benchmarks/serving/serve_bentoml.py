"""BentoML with adaptive batching.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html. ``max_latency_ms`` is what
the batch window adapts to and after which it answers 503; two thirds of the promise leave time
for the way in and out. ``traffic.timeout`` ends a request with 504:
https://docs.bentoml.com/en/latest/reference/bentoml/configurations.html. A batchable endpoint
takes and gives a batch, so one transaction is sent as a list of one.
"""
# mypy: disable-error-code="import-not-found,untyped-decorator"

import os

import bentoml
import fraud_mlp

SLA_MS = int(os.environ["SLA_MS"])


@bentoml.service(
    workers=1,
    traffic={"timeout": SLA_MS / 1000},
    logging={"access": {"enabled": False}},
)
class Fraud:
    """Scores batches of transactions."""

    def __init__(self) -> None:
        self.model = fraud_mlp.load()

    @bentoml.api(
        route="/score",
        batchable=True,
        batch_dim=0,
        max_batch_size=128,
        max_latency_ms=SLA_MS * 2 // 3,
    )
    def score(self, features: list[list[float]]) -> list[float]:
        """Score a batch."""
        return fraud_mlp.score(self.model, features)
