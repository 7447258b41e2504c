"""What the process of one rank of a gang does: it loads its share of models and runs batches."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, NoReturn

from torch import Tensor

from plinth.engine.backends.base import cpu_threads
from plinth.engine.errors import ModelError
from plinth.engine.gang.exchange import GroupLost
from plinth.engine.gang.plan import Seat
from plinth.engine.gang.rank import Rank
from plinth.engine.runtime.lane_worker import Server
from plinth.engine.runtime.recipe import Recipe, read

_LOOPBACK = "lo"
_log = logging.getLogger("plinth.engine.lanes")


def serve_rank(descriptor: int, threads: int, seat: Seat) -> None:
    """Join the other ranks, and answer what comes until the socket ends.

    Args:
        descriptor: of the socket.
        threads: CPU threads of a forward.
        seat: which rank it is.
    """
    sock = socket.socket(fileno=os.dup(descriptor))
    if seat.meeting.startswith("file:"):  # all are on this machine: nobody else may connect
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    with cpu_threads(threads):
        try:
            rank = Rank(seat)
        except GroupLost as error:
            _leave(error)
        Server(sock, Shares(threads, seat, rank)).run()


def _leave(error: GroupLost) -> NoReturn:
    """End the process: threads of the group may wait in native code."""
    _log.error("a rank of a gang lost its group: %s", error)
    os._exit(1)


def share_of(rank: Rank, name: str, recipe: Recipe) -> int:
    """Load a rank's share of the model that a recipe is of; talks to no other rank.

    Returns:
        Bytes of the weights that the rank holds.

    Raises:
        ModelError: it cannot be cut as the plan says, or runs otherwise than a gang can.
    """
    spec = recipe.spec
    runs = {f"{backend}/{policy.name}" for _, backend, policy in recipe.parts}
    if recipe.variant is not None or runs != {"eager/fp32"}:
        raise ModelError(
            f"model {spec.name} runs in {recipe.variant or '+'.join(sorted(runs))}; a gang runs "
            "eager torch in fp32",
            hint='set backend = "eager" and precision = "fp32"',
        )
    if spec.block is not None:
        raise ModelError(
            f"model {spec.name} runs in blocks of {spec.block} rows, which a gang does not",
            hint="run it on other lanes",
        )
    return rank.load(name, read(recipe))


class Shares:
    """A rank's shares of the models of a gang.

    Args:
        threads: CPU threads of a forward.
        seat: which rank it is.
        rank: what runs them.
    """

    def __init__(self, threads: int, seat: Seat, rank: Rank) -> None:
        self.threads = threads
        self._rank = rank
        self._answers = seat.plan.answers(seat.rank)
        self._most: dict[str, int] = {}

    def load(self, name: str, recipe: Recipe) -> int:
        """Keep a share; bytes of its weights. See :func:`share_of`."""
        self._most[name] = recipe.most
        return share_of(self._rank, name, recipe)

    def run(self, name: str, rows: dict[str, Tensor]) -> tuple[Any, ...]:
        """Outputs where this rank answers; ends the process when its group is lost."""
        try:
            found = self._rank.run(name, rows)
        except GroupLost as error:
            _leave(error)
        return found if self._answers else {}, self._most[name], 0, "eager/fp32"

    def forget(self, name: str) -> None:
        """Let a model go."""
        self._rank.forget(name)
        self._most.pop(name, None)
