"""Every breach of the contract is found, and the author is told what to change."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bills import Basket, Bill, Bills, Files, Loyal, Sum, model
from pydantic import BaseModel
from torch import Tensor

from plinth.engine import Call, Flow, InputError, Model
from plinth.verticals import Item, Settings
from plinth.verticals.testing import check_vertical


class BadName(Bills):
    name = "Bills!"


class NoDoor(Bills):
    request = None


class NoSchema(Bills):
    class Response(BaseModel, arbitrary_types_allowed=True):
        thing: Tensor

    response = Response


class TakenSetting(Bills):
    class Mine(Settings):
        sla: int = 1

    settings_type = Mine


class Training(Bills):
    def models(self) -> Sequence[Model]:
        return [Model(model(Sum()).spec, Sum().train())]


class LooseExample(Bills):
    def example(self) -> Any:
        return Basket.model_construct(customer="ann-1", prices=[1.5])


class Traceback(Bills):
    def parse(self, raw: bytes) -> Any:
        return Basket(**json.loads(raw))


class Echo(Bills):
    def parse(self, raw: bytes) -> Any:
        try:
            return super().parse(raw)
        except InputError as error:
            raise InputError(f"cannot read {raw!r}", field="customer", reason="bad") from error


class Reader(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        Path("/etc/hostname").exists()
        with Path("/proc/self/status").open() as file:
            file.read(1)
        return (yield from super().infer(requests))


class Starter(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        threading.Thread(target=self.gate.wait, args=(5,), name="mine", daemon=True).start()
        return (yield from super().infer(requests))

    gate = threading.Event()


class Caller(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        subprocess.run([sys.executable, "-c", ""], check=True)
        return (yield from super().infer(requests))


class NotAFlow(Bills):
    def infer(self, requests: Sequence[Any]) -> Any:
        return [Bill(customer=r.customer, total=0.0) for r in requests]


class UnknownModel(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        yield Call("product", torch.zeros(len(requests), 2))
        return []


class WrongRows(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        yield Call("sum", torch.zeros(len(requests), 3))
        return []


class Forgetful(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        return (yield from super().infer(requests[:1]))


class Reversed(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        return (yield from super().infer(requests))[::-1]


class Coupled(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        bills = yield from super().infer(requests)
        for bill in bills:
            if isinstance(bill, Bill):
                bill.total /= len(bills)
        return bills


class Fragile(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        if any(max(request.prices) > 1e6 for request in requests):
            raise ValueError("too high")
        return (yield from super().infer(requests))


class Silent(Bills):
    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        if not requests:
            return []
        sums = yield Call("sum", torch.tensor([request.prices for request in requests]))
        pairs = zip(requests, sums[:, 0].tolist(), strict=True)
        return [Bill(customer=request.customer, total=total) for request, total in pairs]


class Lossy(Bills):
    def encode(self, result: Any) -> bytes:
        return json.dumps({"total": result.total}).encode()


class Moody(Bills):
    dice = random.Random(1)

    def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
        bills = yield from super().infer(requests)
        for bill in bills:
            if isinstance(bill, Bill):
                bill.total += self.dice.random()
        return bills


class Deaf(Loyal):
    def observe(self, requests: Sequence[Any]) -> None:
        pass


class HalfRestored(Loyal):
    def restore(self, state: bytes) -> None:
        super().restore(state)
        self.visits = dict.fromkeys(self.visits, 0)


class Trusting(Loyal):
    def restore(self, state: bytes) -> None:
        self.visits = json.loads(state) if state.startswith(b"{") and state.endswith(b"}") else {}


class Elsewhere(Bills):
    def write(self, result: Any, folder: Path) -> list[Path]:
        super().write(result, folder)
        return []


class Twins(Files):
    def discover(self, folder: Path) -> Iterator[Item]:
        for path in folder.glob("*.json"):
            yield Item("same", (path,))


class Slashes(Files):
    def discover(self, folder: Path) -> Iterator[Item]:
        for path in folder.glob("*.json"):
            yield Item(f"a/{path.stem}", (path,))


@pytest.mark.parametrize(
    ("kind", "clause", "said"),
    [
        (BadName, "name and summary", "make it lower case letters"),
        (NoDoor, "a door is open", "neither `request`"),
        (NoSchema, "types and schemas", "has no JSON schema"),
        (TakenSetting, "types and schemas", "belong to the doors"),
        (Training, "models", "call .eval()"),
        (LooseExample, "example", "List should have at least 2 items"),
        (Traceback, "malformed records are refused", "raise InputError instead"),
        (Echo, "wrong fields are named, not echoed", "repeats the value"),
        (Reader, "flows open and start nothing", "opened '/proc/self/status'"),
        (Starter, "flows open and start nothing", "started the thread 'mine'"),
        (Caller, "flows open and start nothing", "subprocess.Popen()"),
        (NotAFlow, "calls fit the models", "not a generator"),
        (UnknownModel, "calls fit the models", "models() brings only sum"),
        (WrongRows, "calls fit the models", "does not fit the model's spec"),
        (Forgetful, "the same alone and in a list", "return a list with one result"),
        (Reversed, "the same alone and in a list", "keep the order"),
        (Coupled, "the same alone and in a list", "let no row see another's"),
        (Fragile, "one bad request stays alone", "infer() raised ValueError for an odd prices.0"),
        (Silent, "one bad request stays alone", "a number JSON does not know"),
        (Lossy, "answers survive JSON", "Bill cannot read"),
        (Moody, "state goes out and comes back", "answered otherwise the second time"),
        (Deaf, "state goes out and comes back", "observe() leaves another state"),
        (HalfRestored, "state goes out and comes back", "after restore(snapshot())"),
        (Trusting, "state goes out and comes back", "took a damaged snapshot"),
        (Elsewhere, "answers are written in their folder", "return every path"),
        (Twins, "folders are discovered", "gave an id twice"),
        (Slashes, "folders are discovered", "cannot name a folder"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_breach_is_found_and_explained(
    kind: type[Bills], clause: str, said: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(Bills().example().model_dump_json())
    folder = tmp_path if issubclass(kind, Files) else None
    report = check_vertical(kind(), folder=folder)
    kind.__dict__.get("gate", threading.Event()).set()
    found = {outcome.name: outcome.message for outcome in report.failed}
    assert clause in found, report
    assert said in found[clause]
    with pytest.raises(AssertionError, match="failed"):
        report.raise_if_failed()
