"""MOSEC with dynamic batching.

Workers and batching: https://mosecorg.github.io/mosec/reference/interface.html. ``--timeout`` is
the service timeout of one request, ``--capacity`` bounds the queue:
https://mosecorg.github.io/mosec/reference/arguments.html.
"""
# mypy: disable-error-code="import-not-found,misc"

import fraud_mlp
from mosec import Server, ValidationError, Worker


class FraudWorker(Worker):
    """Scores batches of transactions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fraud_mlp.load()

    def forward(self, data: list[dict[str, list[float]]]) -> list[dict[str, float]]:
        """Score a batch."""
        try:
            rows = [request["features"] for request in data]
        except KeyError as error:
            raise ValidationError(f"no {error}") from None
        return [{"score": score} for score in fraud_mlp.score(self.model, rows)]


if __name__ == "__main__":
    server = Server()
    server.append_worker(FraudWorker, num=1, max_batch_size=128, max_wait_time=2, route="/score")
    server.run()
