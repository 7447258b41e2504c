"""One rank of a gang: its share of each model, and its part in every batch.

It runs in whatever process it is made in, one to a process: a worker of a lane, or of a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from inspect import signature

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from plinth.engine.errors import ModelError
from plinth.engine.gang import tensor
from plinth.engine.gang.exchange import Exchange, GroupLost
from plinth.engine.gang.plan import Seat
from plinth.engine.gang.steps import shared_out, steps_of
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.store import Model

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def held_bytes(module: nn.Module) -> int:
    """Bytes of weights, those of a tied tensor once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values())


class Rank:
    """Holds its share of models, and runs batches together with the other ranks of its copy.

    All ranks are given the same models, and the same batches in the same order.

    Args:
        seat: which rank it is.

    Attributes:
        held: bytes of the weights of each model that this rank has.
        micro_batches: parts of a batch that take turns; may be set to fewer than it was made with.

    Raises:
        GroupLost: the others do not come.
    """

    def __init__(self, seat: Seat) -> None:
        self.held: dict[str, int] = {}
        self._seat = seat
        self._place = seat.plan.place(seat.rank)
        self._device = torch.device(seat.device)
        self.micro_batches = seat.micro_batches or 2 * (
            seat.plan.pipeline if seat.plan.pipeline > 1 else 1
        )
        self._models: dict[str, Run] = {}
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)
        try:
            dist.init_process_group(
                seat.backend,
                init_method=seat.meeting,
                rank=seat.rank % seat.plan.group,
                world_size=seat.plan.group,
                timeout=timedelta(seconds=seat.seconds),
            )
            sizes = (seat.plan.pipeline, seat.plan.tensor)
            self._mesh = init_device_mesh(
                self._device.type, sizes, mesh_dim_names=("pipeline", "tensor")
            )
        except RuntimeError as error:
            raise GroupLost(f"rank {seat.rank}: {error}") from error
        self._exchange = Exchange(self._mesh.get_group("tensor"), self._device, self.micro_batches)

    @property
    def blocked(self) -> float:
        """Seconds for which it computed nothing because a sum over shares was on its way."""
        return self._exchange.blocked

    def load(self, name: str, model: Model) -> int:
        """Keep this rank's share of a model; talks to nobody.

        Args:
            name: what batches call it by.
            model: whole, on the host; weights in a mapped file are read as far as they are kept.

        Returns:
            Bytes of the weights that are kept.

        Raises:
            ModelError: it cannot be cut as the plan says.
        """
        plan, module, told = self._seat.plan, model.module, model.spec.name
        if plan.tensor > 1:
            tensor.check(module, plan.tensor, told)
        kept = module
        if plan.pipeline > 1:
            steps = steps_of(module, plan.pipeline, told)
            kept = nn.ModuleList(shared_out(steps, plan.pipeline)[self._place.stage])
        if plan.tensor > 1:
            tensor.shard(kept, self._mesh["tensor"], self._exchange)
        kept.to(self._device)
        self.held[name] = held_bytes(kept)
        if isinstance(kept, nn.ModuleList):
            self._models[name] = self._staged(model, list(kept))
        else:
            self._models[name] = self._whole(model, kept)
        return self.held[name]

    def run(self, name: str, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a batch with the other ranks of this copy.

        Args:
            name: of the model.
            rows: (n, ...) by input name, on the host.

        Returns:
            Outputs (n, ...) on the host; what ranks give that do not answer is nobody's.

        Raises:
            GroupLost: the ranks are not together any more; none of them can go on.
            BaseException: whatever the model raises, on all ranks.
        """
        tensors = {key: each.to(self._device) for key, each in rows.items()}
        failed: BaseException | None = None
        found: dict[str, Tensor] = {}
        try:
            found = self._models[name](tensors)
        except GroupLost:
            raise
        except Exception as error:  # noqa: BLE001 - raised again once the others were heard
            failed = error
        if self._seat.plan.tensor > 1:
            self._exchange.agree(failed is not None)
        if failed is not None:
            raise failed
        return {key: each.cpu() for key, each in found.items()}

    def forget(self, name: str) -> None:
        """Let a model go."""
        self._models.pop(name, None)
        self.held.pop(name, None)

    def close(self) -> None:
        """Leave the group."""
        self._exchange.close()
        dist.destroy_process_group()

    def _whole(self, model: Model, module: nn.Module) -> Run:
        """Runs all steps on this rank's shares, in micro-batches that take turns."""
        binding, spec = Binding(model.spec, module), model.spec

        def part(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.inference_mode():
                found = outputs_by_name(spec, binding.call(module, rows))
            count = len(next(iter(rows.values())))
            if any(len(each) != count for each in found.values()):
                raise ModelError(f"model {spec.name} gave another number of rows than {count}")
            return found

        def run(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            count = len(next(iter(rows.values())))
            parts = min(self.micro_batches, count) if self._seat.plan.tensor > 1 else 1
            cut = {key: each.tensor_split(parts) for key, each in rows.items()}
            works = [
                partial(part, {key: each[n] for key, each in cut.items()}) for n in range(parts)
            ]
            made = self._exchange.in_turns(works)
            if parts == 1:
                return made[0]
            return {key: torch.cat([each[key] for each in made]) for key in made[0]}

        return run

    def _staged(self, model: Model, steps: list[nn.Module]) -> Run:
        """Runs the steps of this rank's stage, between those before and after."""
        from plinth.engine.gang.pipeline import Pipeline  # torch's takes a second to import

        spec = model.spec
        Binding(spec, model.module)  # its inputs have the names of forward's parameters
        names = [tensor.name for tensor in spec.inputs]
        taken = signature(model.module.forward).parameters
        order = [name for name in taken if name in names] or names
        stages = Pipeline(
            steps,
            self._place.stage,
            self._seat.plan.pipeline,
            self._mesh.get_group("pipeline"),
            self._device,
            lambda output: tuple(outputs_by_name(spec, output).values()),
        )

        def run(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.inference_mode():
                found = stages.run(tuple(rows[name] for name in order), self.micro_batches)
            return {each.name: made for each, made in zip(spec.outputs, found or (), strict=False)}

        return run
