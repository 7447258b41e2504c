"""Pipeline parallelism of models that are a sequence of steps, by torch's own schedule (GPipe).

A schedule of torch accepts exactly one compiled shape: what has another is received into buffers of
the first, and gives wrong rows without an error. So each shape has a schedule of its own here, rows
are padded to its shape and cut off again, and every tensor is held against it before it runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from plinth.engine.errors import ModelError
from plinth.engine.gang.exchange import GroupLost

SHAPES = 16
"""Schedules that a model keeps; the one that was used longest ago goes first."""
_MOST_TENSORS, _MOST_DIMENSIONS = 8, 8
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
Tensors = tuple[Tensor, ...]
Shape = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class Pipeline:
    """One stage of a model, and its schedules by shape.

    Args:
        steps: of this stage.
        stage: its number.
        stages: how many there are.
        group: the ranks of all stages, in their order.
        device: where it runs.
        finish: what the last step gives, as tensors (n, ...) in the order of the contract.
    """

    def __init__(
        self,
        steps: Sequence[nn.Module],
        stage: int,
        stages: int,
        group: dist.ProcessGroup,
        device: torch.device,
        finish: Callable[[Any], Tensors],
    ) -> None:
        self._part = _Part(steps, finish if stage == stages - 1 else _as_tuple)
        self._stage, self._stages = stage, stages
        self._group, self._device = group, device
        self._schedules: OrderedDict[tuple[Shape, int], Schedule] = OrderedDict()

    def run(self, rows: Tensors, micro_batches: int) -> Tensors | None:
        """Run rows through all stages; the outputs on the last one, ``None`` on others.

        Args:
            rows: tensors (n, ...) in the order in which the first step takes them; all ranks are
                given the same.
            micro_batches: parts that follow each other through the stages, at most.

        Raises:
            GroupLost: another rank does not answer.
            BaseException: what a step of this stage raised; the others have gone on.
        """
        count = len(rows[0])
        parts = min(micro_batches, count)
        size = 1 << (-(-count // parts) - 1).bit_length()
        padded = tuple(_padded(each, parts * size) for each in rows)
        key = (shape_of(padded), parts)
        if key not in self._schedules:
            self._schedules[key] = self._compiled(tuple(each[:size] for each in padded), parts)
            if len(self._schedules) > SHAPES:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        found = self._schedules[key].run(padded)
        self._part.raise_kept()
        if found is None:
            return None
        if any(len(each) != parts * size for each in found):
            raise ModelError(
                f"{parts * size} rows went into the pipeline, {[len(each) for each in found]} "
                "came out",
                hint="a step must keep the number of rows",
            )
        return tuple(each[:count] for each in found)

    def _compiled(self, rows: Tensors, parts: int) -> Schedule:
        """Run one micro-batch from stage to stage, to learn the shapes of what travels."""
        try:
            given = rows
            if self._stage > 0:
                received = _receive(self._stage - 1, self._group, self._device)
                if received is None:
                    self._pass_on(None)
                    raise ModelError("a stage before this one raised")
                given = received
            made = self._part.first(given)
            self._pass_on(made)
        except RuntimeError as error:
            raise GroupLost(f"stage {self._stage}: {error}") from error
        if made is None:
            self._part.raise_kept()
        assert made is not None
        stage = PipelineStage(
            self._part,
            self._stage,
            self._stages,
            self._device,
            input_args=given,
            output_args=made,
            group=self._group,
        )
        return Schedule(stage, shape_of(rows), parts)

    def _pass_on(self, made: Tensors | None) -> None:
        if self._stage < self._stages - 1:
            _send(made, self._stage + 1, self._group, self._device)


class Schedule:
    """A schedule of torch for one shape, which takes no other.

    Args:
        stage: this rank's.
        shape: of the tensors of one micro-batch that goes into the first stage.
        parts: micro-batches of a batch.
    """

    def __init__(self, stage: PipelineStage, shape: Shape, parts: int) -> None:
        self._stage = stage
        self._shape = tuple(((each[0] * parts, *each[1:]), dtype) for each, dtype in shape)
        self._schedule = ScheduleGPipe(stage, parts)

    def run(self, rows: Tensors) -> Tensors | None:
        """Run a batch; outputs on the last stage, ``None`` on others.

        Raises:
            ModelError: rows of another shape than it was made for.
            GroupLost: another rank does not answer.
        """
        if shape_of(rows) != self._shape:
            raise ModelError(
                f"a schedule for {_said(self._shape)} was given {_said(shape_of(rows))}"
            )
        try:
            found = self._schedule.eval(*(rows if self._stage.is_first else ()))
        except RuntimeError as error:
            raise GroupLost(f"stage {self._stage.stage_index}: {error}") from error
        finally:
            self._stage.clear_runtime_states()
        return None if found is None else _as_tuple(found)


class _Part(nn.Module):
    """The steps of a stage. What one raises is kept, and zeros travel on in its place."""

    def __init__(self, steps: Sequence[nn.Module], finish: Callable[[Any], Tensors]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self._finish = finish
        self._error: Exception | None = None
        self._outputs: dict[Shape, Shape] = {}

    def forward(self, *given: Tensor) -> Tensors:
        """What the first step takes, to what the last one gives."""
        try:
            return self._run(given)
        except GroupLost:
            raise
        except Exception as error:  # noqa: BLE001 - raised when the batch is over
            self._error = error
            shape = self._outputs[shape_of(given)]
            return tuple(
                torch.zeros(size, dtype=dtype, device=given[0].device) for size, dtype in shape
            )

    def first(self, given: Tensors) -> Tensors | None:
        """The same with rows of a new shape; ``None``: it raised, which is kept."""
        try:
            made = self._run(given)
        except GroupLost:
            raise
        except Exception as error:  # noqa: BLE001 - raised once the next stage was told
            self._error = error
            return None
        self._outputs[shape_of(given)] = shape_of(made)
        return made

    def raise_kept(self) -> None:
        """Raise what a step raised since the last time."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, given: Tensors) -> Tensors:
        state: Any = given
        for step in self.steps:
            state = step(*_as_tuple(state))
        return tuple(each.contiguous() for each in self._finish(state))


def shape_of(tensors: Tensors) -> Shape:
    """Sizes and dtypes."""
    return tuple((tuple(each.shape), each.dtype) for each in tensors)


def _said(shape: Shape) -> str:
    return ", ".join(f"{'x'.join(map(str, size))} {str(dtype)[6:]}" for size, dtype in shape)


def _as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _padded(rows: Tensor, count: int) -> Tensor:
    """So many rows: the last one again where there are fewer."""
    missing = count - len(rows)
    if missing == 0:
        return rows
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


# -- what travels before there is a schedule ---------------------------------------------------
_HEAD = 1 + _MOST_TENSORS * (2 + _MOST_DIMENSIONS)


def _send(
    tensors: Tensors | None, stage: int, group: dist.ProcessGroup, device: torch.device
) -> None:
    """Send tensors with their shapes, or that there are none; numbers alone, no pickles."""
    head = [-1] if tensors is None else [len(tensors)]
    for each in tensors or ():
        dims = [*each.shape] + [0] * (_MOST_DIMENSIONS - each.dim())
        head += [_DTYPES.index(each.dtype), each.dim(), *dims]
    if len(head) > _HEAD:
        raise RuntimeError(f"more than {_MOST_TENSORS} tensors go from stage to stage")
    packed = torch.tensor(head + [0] * (_HEAD - len(head)), device=device)
    dist.send(packed, group=group, group_dst=stage)
    for each in tensors or ():
        dist.send(each, group=group, group_dst=stage)


def _receive(stage: int, group: dist.ProcessGroup, device: torch.device) -> Tensors | None:
    packed = torch.zeros(_HEAD, dtype=torch.int64, device=device)
    dist.recv(packed, group=group, group_src=stage)
    head = packed.tolist()
    if head[0] < 0:
        return None
    found = []
    for n in range(head[0]):
        kind, dims, *sizes = head[1 + n * (2 + _MOST_DIMENSIONS) :][: 2 + _MOST_DIMENSIONS]
        found.append(torch.empty(sizes[:dims], dtype=_DTYPES[kind], device=device))
        dist.recv(found[-1], group=group, group_src=stage)
    return tuple(found)
