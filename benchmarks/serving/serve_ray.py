"""Ray Serve with dynamic request batching, one replica.

Batching: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html. Timeout, queue
bound and throughput settings (``RAY_SERVE_THROUGHPUT_OPTIMIZED``, set by ``servers.py``):
https://docs.ray.io/en/latest/serve/advanced-guides/performance.html.
"""
# mypy: disable-error-code="import-not-found,untyped-decorator"

import asyncio
import signal
import sys

import fraud_mlp
import ray
from ray import serve
from starlette.requests import Request


@serve.deployment(
    num_replicas=1,
    ray_actor_options={"num_cpus": 1},
    max_ongoing_requests=1024,
    max_queued_requests=1024,
)
class Fraud:
    """Scores batches of transactions."""

    def __init__(self) -> None:
        self.model = fraud_mlp.load()

    @serve.batch(max_batch_size=128, batch_wait_timeout_s=0.002)
    async def batch(self, rows: list[list[float]]) -> list[float]:
        """Score a batch."""
        return fraud_mlp.score(self.model, rows)

    async def __call__(self, request: Request) -> dict[str, float]:
        """Answer one request."""
        return {"score": await self.batch((await request.json())["features"])}


async def until_told_to_end() -> None:
    """Wait for SIGTERM or SIGINT."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()


if __name__ == "__main__":
    host, port, sla_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": sla_seconds})
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    application = Fraud.bind()  # type: ignore[attr-defined]
    serve.run(application, route_prefix="/score", logging_config=quiet)
    asyncio.run(until_told_to_end())
    serve.shutdown()
    ray.shutdown()
