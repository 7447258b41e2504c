"""Drive a flow without an engine: by hand, or with the vertical's own models on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from plinth.engine import Call, Compute, Flow, Model, Pause, PlinthError, Refused
from plinth.engine.flow import Tensors, Told
from plinth.engine.rows import as_mapping, row_count
from plinth.engine.tiling import WindowGrid, WindowMerger
from plinth.verticals.contract import Vertical

T = TypeVar("T")

WINDOWS = 4
"""Windows of a volume in one forward pass."""


def feed(flow: Flow[T], *answers: Tensors | Callable[[Call], Tensors]) -> T:
    """Drive a flow by hand and return its value.

    Args:
        flow: what ``vertical.infer(requests)`` gave.
        answers: one for each Call, in order: the tensor (or mapping of tensors) the flow is
            sent, or a function of the Call that makes it, in which a test may look at the rows.

    Raises:
        AssertionError: too few or too many answers, an answer whose rows are not those of the
            Call, or a flow that is no generator or yields something else than a Call.
    """
    left = list(answers)
    used = 0

    def answer(call: Call) -> Tensors:
        nonlocal used
        used += 1
        if not left:
            raise AssertionError(
                f"call {used} is {_said(call)}, but feed() was given only {len(answers)} "
                f"answer{'s' * (len(answers) != 1)}: add one for this call"
            )
        given = left.pop(0)
        sent = given(call) if callable(given) else given
        _same_rows(call, sent, used)
        return sent

    value = drive(flow, answer)
    if left:
        raise AssertionError(
            f"the flow returned after {used} call{'s' * (used != 1)}, but feed() was given "
            f"{len(answers)} answers: remove {len(left)}, or find out why the flow stopped early"
        )
    return value


def drive(
    flow: Flow[T],
    answer: Callable[[Call], Any],
    around_steps: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> T:
    """Run a flow to its end, each Call answered by a function, each Compute run here.

    Args:
        flow: a generator of Calls.
        answer: gives what the flow is sent for a Call; a refusal it raises is thrown into the flow,
            as an engine's would be.
        around_steps: makes a context in which each of the flow's own steps runs.

    Raises:
        AssertionError: the flow is no generator, or yields something else than a Call.
    """
    if not isinstance(flow, Generator):
        raise AssertionError(
            f"infer() returned {type(flow).__name__}, not a generator: "
            "write `result = yield Call(model, rows)` in its body"
        )
    advance: Callable[[Any], Any] = flow.send
    sent: Any = None
    try:
        while True:
            with around_steps():
                call = advance(sent)
                advance = flow.send
                if isinstance(call, Compute):
                    try:
                        sent = call.run()
                    except Exception as error:  # noqa: BLE001 - the flow's own to handle
                        advance, sent = flow.throw, error
                    continue
            if isinstance(call, Pause):
                sent = None
                continue
            if not isinstance(call, Call):
                raise AssertionError(
                    f"the flow yielded {type(call).__name__}: yield engine.Call or engine.Compute"
                )
            try:
                sent = answer(call)
            except Refused as refused:
                advance, sent = flow.throw, refused
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        flow.close()


def run_with_models(
    vertical: Vertical[Any, Any],
    requests: Sequence[Any],
    *,
    on_call: Callable[[Call], None] = lambda call: None,
    around_steps: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Any]:
    """Answer requests with the vertical's own models, in this thread and without an engine.

    Args:
        vertical: the vertical.
        requests: what its ``parse`` or ``load`` gave.
        on_call: told every Call before it runs.
        around_steps: makes a context in which each of the flow's own steps runs.

    Returns:
        What the flow returned: one result or InputError for each request.

    Raises:
        AssertionError: a Call names a model the vertical does not bring, or its rows are not
            what the model's spec says.
    """
    models = {model.spec.name: model for model in vertical.models()}

    def answer(call: Call) -> Tensors | Told:
        on_call(call)
        if call.model not in models:
            raise AssertionError(
                f"the flow calls the model {call.model!r}, but models() brings only "
                f"{', '.join(sorted(models)) or 'none'}: add it there, or call one of these"
            )
        value = _run(models[call.model], call)
        return Told(value, "eager/fp32", exact=True) if call.told else value

    return drive(vertical.infer(requests), answer, around_steps)


def _said(call: Call) -> str:
    if isinstance(call.rows, Mapping):
        shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in call.rows.items())
    else:
        shapes = str(tuple(call.rows.shape))
    return f"Call({call.model!r}, rows {shapes})"


def _same_rows(call: Call, sent: Tensors, number: int) -> None:
    if call.tiling is not None:
        return
    for tensor in [sent] if isinstance(sent, Tensor) else sent.values():
        if tensor.shape[0] != row_count(call.rows):
            raise AssertionError(
                f"answer {number} has {tensor.shape[0]} rows, {_said(call)} has "
                f"{row_count(call.rows)}: a model gives one row of output for each row of input"
            )


def _run(model: Model, call: Call) -> Tensors:
    names = tuple(spec.name for spec in model.spec.inputs)
    if call.tiling is None:
        return _forward(model, as_mapping(call.rows, names), _said(call))
    if not isinstance(call.rows, Tensor) or call.rows.ndim != 4:
        raise AssertionError(f"{_said(call)} has a tiling: its rows are one volume (c, z, y, x)")
    grid = WindowGrid(call.tiling, tuple(call.rows.shape[1:]))  # type: ignore[arg-type]
    merger = WindowMerger(grid)
    for first in range(0, len(grid), WINDOWS):
        window = grid.cut(call.rows, first, min(first + WINDOWS, len(grid)))
        output = _forward(model, {names[0]: window}, _said(call))
        merger.put(output if isinstance(output, Tensor) else next(iter(output.values())))
    return merger.result()


def _forward(model: Model, rows: dict[str, Tensor], said: str) -> Tensors:
    _check_inputs(model, rows, said)
    if model.module is None:
        raise AssertionError(
            f"the model {model.spec.name!r} is ONNX only and cannot run in plain torch: "
            "feed() its answers by hand, or test through an Engine"
        )
    outputs = model.run(rows)
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def _check_inputs(model: Model, rows: dict[str, Tensor], said: str) -> None:
    wanted = [spec.name for spec in model.spec.inputs]
    if sorted(wanted) != sorted(rows):
        raise AssertionError(f"{said} has the inputs {sorted(rows)}, the model takes {wanted}")
    for tensor in rows.values():
        if tensor.device.type != "cpu":
            raise AssertionError(f"{said} is on {tensor.device}: rows stay in host memory")
    try:
        model.spec.check(rows)
    except PlinthError as error:
        raise AssertionError(
            f"{said} does not fit the model's spec: {error}. Change the rows in infer(), "
            "or the inputs in the model's manifest"
        ) from error
