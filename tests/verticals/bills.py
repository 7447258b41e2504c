"""A small vertical that keeps the contract, for tests of the kit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from plinth.engine import Call, Flow, InputError, Model, ModelSpec, TensorSpec
from plinth.verticals import Item, Settings, Vertical


class Basket(BaseModel):
    """Prices of one customer's basket."""

    customer: str = Field(pattern=r"^[a-z0-9-]{1,20}$")
    prices: list[float] = Field(min_length=2, max_length=2)


class Bill(BaseModel):
    """The sum."""

    customer: str
    total: float


class Sum(nn.Module):
    """Rows (n, 2) to their sums (n, 1)."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.sum(1, keepdim=True)


def model(module: nn.Module, name: str = "sum", shape: tuple[int | None, ...] = (2,)) -> Model:
    inputs = (TensorSpec(name="prices", shape=shape),)
    outputs = (TensorSpec(name="total", shape=(1,)),)
    return Model(ModelSpec(name=name, inputs=inputs, outputs=outputs), module.eval())


class Bills(Vertical[Any, Any]):
    """A vertical that keeps the contract; the breaches below are subclasses of it."""

    name = "bills"
    summary = "Adds up baskets."
    request = Basket
    response: Any = Bill

    def models(self) -> Sequence[Model]:
        return [model(Sum())]

    def example(self) -> Any:
        return Basket(customer="ann-1", prices=[1.5, 2.5])

    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        good = [request for request in requests if max(map(abs, request.prices)) < 1e6]
        totals: Iterator[float] = iter(())
        if good:
            sums = yield Call("sum", torch.tensor([request.prices for request in good]))
            totals = iter(sums[:, 0].tolist())
        return [
            Bill(customer=request.customer, total=next(totals))
            if max(map(abs, request.prices)) < 1e6
            else InputError("prices are too high", field="prices", reason="too_high")
            for request in requests
        ]


class Loyal(Bills):
    """Stateful: every basket of a customer adds to the total."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.visits: dict[str, int] = {}

    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        bills = yield from super().infer(requests)
        for request, bill in zip(requests, bills, strict=True):
            if isinstance(bill, Bill):
                bill.total += self.visits.get(request.customer, 0)
            self.visits[request.customer] = self.visits.get(request.customer, 0) + 1
        return bills

    def observe(self, requests: Sequence[Any]) -> None:
        for request in requests:
            self.visits[request.customer] = self.visits.get(request.customer, 0) + 1

    def snapshot(self) -> bytes | None:
        return json.dumps(self.visits).encode()

    def restore(self, state: bytes) -> None:
        try:
            self.visits = dict(json.loads(state))
        except ValueError as error:
            raise InputError("the state is damaged") from error


class Files(Bills):
    """Reads folders as well."""

    def discover(self, folder: Path) -> Iterator[Item]:
        for path in sorted(folder.glob("*.json")):
            yield Item(path.stem, (path,))

    def load(self, item: Item) -> Any:
        return self.parse(item.paths[0].read_bytes())
