"""A small stateful vertical for the tests of the stream: it counts each card's records.

The n-th record of a card is answered with ``count == n``. So the answers alone show whether a
record was lost, answered twice, or counted twice in the state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from plinth.engine import Call, Engine, Flow, InputError, Model, ModelSpec, TensorSpec
from plinth.verticals.contract import Vertical


class Spend(BaseModel):
    """One record."""

    id: int
    card: str
    amount: float


class Tally(BaseModel):
    """One answer."""

    id: int
    card: str
    count: int
    score: float


class TallyVertical(Vertical[Spend, Tally]):
    """Counts per card. Amount -1 is refused by the vertical, -2 makes it fail."""

    name = "tally"
    summary = "Counts records per card."
    request = Spend
    response = Tally

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.observed = 0
        self.shares: list[tuple[int, int]] = []

    @property
    def seen(self) -> int:
        """Records in the state."""
        return sum(self.counts.values())

    def see_partitions(self, mine: int, total: int) -> None:
        self.shares.append((mine, total))

    def models(self) -> list[Model]:
        """One linear layer: the sum of amount and count."""
        layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(layer.weight)
        spec = ModelSpec(
            name="sum",
            version="1",
            inputs=(TensorSpec(name="x", shape=(2,), dtype="float32"),),
            outputs=(TensorSpec(name="y", shape=(1,), dtype="float32"),),
        )
        return [Model(spec, module=layer.eval())]

    def example(self) -> Spend:
        return Spend(id=0, card="a", amount=1.0)

    def _count(self, card: str) -> int:
        self.counts[card] = self.counts.get(card, 0) + 1
        return self.counts[card]

    def infer(self, requests: Sequence[Spend]) -> Flow[list[Tally | InputError]]:
        counts = [self._count(r.card) for r in requests]
        if any(r.amount == -2 for r in requests):
            raise ValueError("a bug in the vertical")
        rows = torch.tensor([[r.amount, float(c)] for r, c in zip(requests, counts, strict=True)])
        scores = yield Call("sum", rows)
        return [
            InputError("amount is negative", field="amount", reason="negative")
            if r.amount == -1
            else Tally(id=r.id, card=r.card, count=c, score=float(s))
            for r, c, s in zip(requests, counts, scores, strict=True)
        ]

    def key(self, request: Spend) -> str:
        return request.card

    def observe(self, requests: Sequence[Spend]) -> None:
        self.observed += len(requests)
        for request in requests:
            self._count(request.card)

    def snapshot(self) -> bytes:
        return json.dumps(self.counts).encode()

    def restore(self, state: bytes) -> None:
        try:
            self.counts = json.loads(state)
        except ValueError as error:
            raise InputError(f"not a tally: {error}") from None


def spends(
    count: int, cards: int = 50, *, start: int = 0, **amounts: Any
) -> list[tuple[bytes, bytes]]:
    """Records ``start``.. as (key, value), keyed by card."""
    made = []
    for i in range(start, start + count):
        card = f"c{i % cards}"
        record = {"id": i, "card": card, "amount": amounts.get(f"at_{i}", 1.0)}
        made.append((card.encode(), json.dumps(record).encode()))
    return made


def expect_each_once(answers: list[dict[str, Any]], count: int) -> None:
    """Every id answered once, and each card's counts run 1, 2, 3 ... in order."""
    ids = sorted(a["id"] for a in answers)
    assert ids == list(range(count)), (
        f"{len(ids)} answers, {len(ids) - len(set(ids))} twice, {count - len(set(ids))} missing"
    )
    seen: dict[str, int] = {}
    for answer in answers:
        seen[answer["card"]] = seen.get(answer["card"], 0) + 1
        assert answer["count"] == seen[answer["card"]], f"state of {answer['card']} is off"


def started_engine(vertical: Vertical[Any, Any]) -> Engine:
    """A running engine with the vertical's models."""
    engine = Engine()
    for model in vertical.models():
        engine.add(model)
    engine.start()
    return engine
