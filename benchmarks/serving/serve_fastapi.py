"""FastAPI and uvicorn alone, no batching: what a service is before it takes a model server.

The handler is ``async``, since a forward pass of one row is shorter than a change of threads:
https://fastapi.tiangolo.com/async/#path-operation-functions. Run by ``uvicorn`` with uvloop and
httptools, one worker a core: https://fastapi.tiangolo.com/deployment/server-workers/.
There is no queue timeout to set.
"""
# mypy: disable-error-code="import-not-found,unused-ignore,untyped-decorator"

from typing import Annotated

import fraud_mlp
from fastapi import FastAPI
from pydantic import BaseModel, Field

app = FastAPI()
model = fraud_mlp.load()


class Transaction(BaseModel):
    """64 features of one transaction."""

    features: Annotated[list[float], Field(min_length=64, max_length=64)]


class Score(BaseModel):
    """How likely it is a fraud, 0..1."""

    score: float


@app.post("/score")
async def score(transaction: Transaction) -> Score:
    """Score one transaction."""
    return Score(score=fraud_mlp.score(model, [transaction.features])[0])
