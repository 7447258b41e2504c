"""The kit for authors: flows are fed by hand or run with models; sound verticals pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bills import Basket, Bill, Bills, Files, Loyal, model
from torch import Tensor, nn

from plinth.engine import Call, Flow, InputError, Model, Refused, Tiling
from plinth.verticals.testing import check_vertical, checks, devices_named, feed, run_with_models
from plinth.verticals.testing.flows import drive


# -- feed ------------------------------------------------------------------------------------
def test_feed_sends_tensors_and_returns_the_value() -> None:
    vertical = Bills()
    assert feed(vertical.infer([vertical.example()]), torch.tensor([[4.0]])) == [
        Bill(customer="ann-1", total=4.0)
    ]


def test_feed_takes_a_function_that_looks_at_the_rows() -> None:
    def doubled(call: Call) -> Tensor:
        assert call.model == "sum"
        assert isinstance(call.rows, Tensor)
        return call.rows.sum(1, keepdim=True) * 2

    vertical = Bills()
    (bill,) = feed(vertical.infer([vertical.example()]), doubled)
    assert bill.total == 8.0


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], r"call 1 is Call\('sum', rows \(1, 2\)\), but feed\(\) was given only 0 answers"),
        ([torch.zeros(1, 1)] * 2, "the flow returned after 1 call, .* given 2 answers: remove 1"),
        ([torch.zeros(3, 1)], "answer 1 has 3 rows, .* has 1"),
    ],
)
def test_feed_says_which_answer_is_wrong(answers: list[Tensor], said: str) -> None:
    vertical = Bills()
    with pytest.raises(AssertionError, match=said):
        feed(vertical.infer([vertical.example()]), *answers)


def test_feed_closes_a_flow_that_it_gives_up() -> None:
    closed = []

    def flow() -> Flow[None]:
        try:
            yield Call("sum", torch.zeros(1, 2))
        finally:
            closed.append(True)

    with pytest.raises(AssertionError):
        feed(flow())
    assert closed == [True]


# -- run_with_models -----------------------------------------------------------------------
def test_a_refusal_reaches_the_flow_as_an_engines_does() -> None:
    def flow() -> Flow[str]:
        try:
            yield Call("m", torch.zeros(1, 2))
        except Refused as refused:
            answer = yield Call("m", torch.zeros(2, 2))
            return f"{refused}, then {len(answer)} rows"
        return "answered"

    def answer(call: Call) -> Tensor:
        if len(call.rows) == 1:
            raise Refused("no time")
        return call.rows  # type: ignore[return-value]

    assert drive(flow(), answer) == "no time, then 2 rows"


def test_run_with_models_answers_without_an_engine() -> None:
    vertical = Bills()
    odd = Basket(customer="bob", prices=[1e7, 0])
    first, second = run_with_models(vertical, [vertical.example(), odd])
    assert first == Bill(customer="ann-1", total=4.0)
    assert isinstance(second, InputError)


@pytest.mark.parametrize("window", [(4, 4, 4), (2, 3, 4)])
def test_run_with_models_tiles_volumes(window: tuple[int, int, int]) -> None:
    volume = torch.randn(1, 5, 6, 7)

    class Volumes(Bills):
        def models(self) -> Sequence[Model]:
            return [model(nn.Identity(), shape=(1, *window))]

        def infer(self, requests: Sequence[Any]) -> Flow[list[Any]]:
            return [(yield Call("sum", volume, Tiling(window)))]

    (blended,) = run_with_models(Volumes(), [None])
    torch.testing.assert_close(blended, volume)


# -- the kit ---------------------------------------------------------------------------------
@pytest.mark.parametrize("check", checks(Bills()), ids=str)
def test_the_clauses_serve_as_test_cases(check: Any) -> None:
    check()


@pytest.mark.parametrize("kind", [Bills, Loyal, Files])
def test_a_sound_vertical_passes(kind: type[Bills], tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(kind().example().model_dump_json())
    folder = tmp_path if kind is Files else None
    report = check_vertical(kind(), [Basket(customer="bob", prices=[0, 9])], folder)
    report.raise_if_failed()
    assert report.ok
    assert str(report).startswith("bills: ")


def test_the_state_of_the_checked_vertical_is_as_before() -> None:
    vertical = Loyal()
    vertical.visits = {"ann-1": 41}
    assert check_vertical(vertical).ok
    assert vertical.visits == {"ann-1": 41}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x.to('cuda')", [(1, "'cuda'")]),
        ("y = 1\nd = 'npu:3'", [(2, "'npu:3'")]),
        ("torch.cuda.synchronize()", [(1, "torch.cuda")]),
        ("model.cuda()", [(1, ".cuda()")]),
        ("text = 'barracuda'; torch.zeros(3)", []),
    ],
)
def test_devices_are_found_in_source(source: str, found: list[tuple[int, str]]) -> None:
    assert devices_named(source) == found
