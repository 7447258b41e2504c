"""How the ranks of a gang are laid out, and what checks that before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from plinth.engine.errors import ConfigError, nearest

GANG = "gang:"
"""Before the name of a lane of several worker processes that hold one model together."""
MAX_RANKS = 64
_FORM = "gang:DEVICE:FACTOR=NUMBER,..., such as gang:cpu:tensor=2 or gang:cuda:pipeline=2,tensor=2"
_NAME = re.compile(r"gang:(?P<kind>[a-z]+):(?P<factors>[a-z]+=[0-9]+(,[a-z]+=[0-9]+)*)")


class Place(NamedTuple):
    """Where a rank stands: which copy, which stage of it, which share of the stage."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """In how many parts a model is cut, each a process: ``replicas * pipeline * tensor`` ranks.

    Args:
        replicas: whole copies, each of which takes a share of the rows.
        pipeline: stages of layers, one after the other.
        tensor: shares of each wide layer, side by side.

    Raises:
        ConfigError: a factor is no whole number of 1 or more, or there are too many ranks; names
            every factor.
    """

    replicas: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        factors = (self.replicas, self.pipeline, self.tensor)
        if any(type(each) is not int or each < 1 for each in factors):
            raise ConfigError(
                f"plan {self}: every factor is a whole number of 1 or more",
                hint="leave a factor out where it is 1",
            )
        if self.ranks > MAX_RANKS:
            raise ConfigError(f"plan {self} makes {self.ranks} ranks, at most {MAX_RANKS}")

    def __str__(self) -> str:
        return f"replicas={self.replicas} x pipeline={self.pipeline} x tensor={self.tensor}"

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.replicas * self.pipeline * self.tensor

    @property
    def group(self) -> int:
        """Processes of one copy, which talk to each other."""
        return self.pipeline * self.tensor

    def place(self, rank: int) -> Place:
        """Where a rank stands; the shares of a stage lie beside each other."""
        rest, shard = divmod(rank, self.tensor)
        replica, stage = divmod(rest, self.pipeline)
        return Place(replica, stage, shard)

    def answers(self, rank: int) -> bool:
        """Whether a rank has the outputs of its copy: the first share of the last stage."""
        place = self.place(rank)
        return place.stage == self.pipeline - 1 and place.shard == 0

    def fit_devices(self, kind: str, count: int) -> None:
        """Hold the plan against the devices that are there.

        Raises:
            ConfigError: there are fewer than ranks.
        """
        if self.ranks > count:
            raise ConfigError(
                f"plan {self} needs {self.ranks} devices of kind {kind}, there are {count}",
                hint="each rank has a device of its own; use smaller factors",
            )


@dataclass(frozen=True, slots=True)
class Seat:
    """What a process is told to be one rank.

    Args:
        plan: of the gang.
        rank: which of its ranks, from 0.
        meeting: where the ranks of one copy find each other, as ``init_process_group`` of torch
            takes it: ``file:///...`` on one machine, ``tcp://host:port`` across several.
        device: where it runs, as torch spells it.
        backend: of torch.distributed.
        seconds: in which any exchange between ranks has to be done.
        micro_batches: parts of a batch that take turns; ``None``: 2 for each stage or share.
    """

    plan: ParallelPlan
    rank: int
    meeting: str
    device: str
    backend: str
    seconds: float
    micro_batches: int | None = None


def parse(name: str) -> tuple[str, ParallelPlan]:
    """The kind of device and the plan that the name of a lane says.

    Raises:
        ConfigError: another form, an unknown factor or one that comes twice, or a plan that is
            none.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(f"{name!r} is no gang, expected {_FORM}")
    known = [each.name for each in fields(ParallelPlan)]
    factors: dict[str, int] = {}
    for part in found["factors"].split(","):
        factor, _, number = part.partition("=")
        if factor not in known:
            raise ConfigError(f"{name}: {factor} is no factor", hint=nearest(factor, known))
        if factor in factors:
            raise ConfigError(f"{name}: {factor} comes twice")
        factors[factor] = int(number[:6])
    return found["kind"], ParallelPlan(**factors)
