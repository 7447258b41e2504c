"""Triton through PyTriton, with the dynamic batcher.

https://triton-inference-server.github.io/pytriton/latest/binding_configuration/. The queue policy
rejects what waited longer than the promise:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/batcher.html.
The request is V2 JSON, Triton's own.
"""
# mypy: disable-error-code="import-not-found,misc,untyped-decorator"

import sys

import fraud_mlp
import numpy as np
import torch
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy, Tensor, TimeoutAction
from pytriton.triton import Triton, TritonConfig

model = fraud_mlp.load()


@batch
def infer(features: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Score a batch (n, 64) to (n, 1)."""
    with torch.inference_mode():
        return {"score": model(torch.from_numpy(features)).numpy()}


if __name__ == "__main__":
    host, port, sla_us = sys.argv[1], int(sys.argv[2]), round(float(sys.argv[3]))
    settings = TritonConfig(
        http_address=host,
        http_port=port,
        grpc_address=host,
        grpc_port=port + 1,
        metrics_port=port + 2,
    )
    queue = QueuePolicy(
        timeout_action=TimeoutAction.REJECT,
        default_timeout_microseconds=sla_us,
        allow_timeout_override=False,
        max_queue_size=1024,
    )
    with Triton(config=settings) as triton:
        triton.bind(
            model_name="fraud",
            infer_func=infer,
            inputs=[Tensor(name="features", dtype=np.float32, shape=(fraud_mlp.FEATURES,))],
            outputs=[Tensor(name="score", dtype=np.float32, shape=(1,))],
            config=ModelConfig(
                max_batch_size=128,
                batcher=DynamicBatcher(
                    max_queue_delay_microseconds=2000, default_queue_policy=queue
                ),
            ),
        )
        triton.serve()
