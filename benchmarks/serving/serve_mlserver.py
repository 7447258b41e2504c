"""MLServer with adaptive batching: the custom runtime that ``servers.py`` names in its settings.

Runtime: https://docs.seldon.ai/mlserver/user-guide/custom. Batching works on the V2 protocol
only, so the request is V2 JSON: https://docs.seldon.ai/mlserver/user-guide/adaptive-batching.
``parallel_workers`` is 0, since one small model gains nothing from a process of its own on one
core: https://docs.seldon.ai/mlserver/user-guide/parallel-inference. There is no queue timeout.
"""
# mypy: disable-error-code="import-not-found,misc"

import fraud_mlp
import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Fraud(MLModel):
    """Scores batches of transactions."""

    async def load(self) -> bool:
        """Load the model."""
        self.model = fraud_mlp.load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Score a batch."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        with torch.inference_mode():
            scores = self.model(torch.from_numpy(rows)).numpy()
        output = NumpyCodec.encode_output("score", scores)
        return InferenceResponse(model_name=self.name, outputs=[output])
