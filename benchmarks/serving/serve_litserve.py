"""LitServe with dynamic batching.

Batching: https://lightning.ai/docs/litserve/features/batching. ``timeout`` drops what waited
longer, ``fast_queue`` is ZeroMQ, "for high-throughput scenarios (>100 RPS)":
https://lightning.ai/docs/litserve/api-reference/litserver.
"""
# mypy: disable-error-code="import-not-found,misc"

import sys

import fraud_mlp
import litserve as ls


class FraudApi(ls.LitAPI):
    """Scores batches of transactions."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.model = fraud_mlp.load()

    def decode_request(self, request: dict[str, list[float]]) -> list[float]:
        """The features of one request."""
        return request["features"]

    def batch(self, inputs: list[list[float]]) -> list[list[float]]:
        """Rows stay a list; :func:`fraud_mlp.score` makes one tensor of them."""
        return inputs

    def predict(self, rows: list[list[float]]) -> list[float]:
        """Score a batch."""
        return fraud_mlp.score(self.model, rows)

    def unbatch(self, output: list[float]) -> list[float]:
        """One score a request."""
        return output

    def encode_response(self, output: float) -> dict[str, float]:
        """The answer to one request."""
        return {"score": output}


if __name__ == "__main__":
    host, port, sla_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    api = FraudApi(max_batch_size=128, batch_timeout=0.002, api_path="/score")
    server = ls.LitServer(
        api, accelerator="cpu", workers_per_device=1, timeout=sla_seconds, fast_queue=True
    )
    server.run(
        host=host, port=port, num_api_servers=1, log_level="warning", generate_client_file=False
    )
