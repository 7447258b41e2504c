"""What the process of a lane does: it loads models, runs units and answers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from torch import Tensor

from plinth.engine.backends.base import cpu_threads
from plinth.engine.devices.device import pick
from plinth.engine.errors import ModelError, PlinthError
from plinth.engine.flow import Sla
from plinth.engine.gang.exchange import GroupLost
from plinth.engine.gang.plan import Seat
from plinth.engine.gang.rank import Rank
from plinth.engine.lanes import worker
from plinth.engine.memory.plan import Room
from plinth.engine.runtime.loaded_model import LoadedModel
from plinth.engine.runtime.recipe import Recipe, cook, read

_CPU = pick("cpu")
_LOOPBACK = "lo"
_log = logging.getLogger("plinth.engine.lanes")


def serve(descriptor: int, threads: int) -> None:
    """Answer what comes until the socket ends.

    Args:
        descriptor: of the socket.
        threads: CPU threads of a forward.
    """
    sock = socket.socket(fileno=os.dup(descriptor))
    with cpu_threads(threads):
        Server(sock, Models(threads)).run()


class Models:
    """The models of one lane in this process.

    Args:
        threads: CPU threads of a forward.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._loaded: dict[str, LoadedModel] = {}

    def run(self, name: str, rows: dict[str, Tensor]) -> tuple[Any, ...]:
        """Outputs for rows; rows of the largest batch; how often it was halved; the precision."""
        model = self._loaded[name]
        before = model.halvings
        outputs = model.run(rows)
        return outputs, model.most, model.halvings - before, model.precision

    def load(self, name: str, recipe: Recipe) -> dict[str, Tensor] | None:
        """Make a model, and answer its example rows.

        Raises:
            ModelError, ConfigError: it is not there, another one, or cannot run here.
        """
        model, executable = cook(recipe, _CPU, self.threads)
        outputs = None
        if recipe.example is not None:
            executable.probe(recipe.example)
            outputs = executable.run(recipe.example)
        self._loaded[name] = LoadedModel(model, Sla(), executable, recipe.most, Room(0))
        return outputs

    def forget(self, name: str) -> None:
        """Let a model go."""
        self._loaded.pop(name, None)


def reply(number: int, told: str, work: Callable[[], Any]) -> tuple[Any, ...]:
    """What came of a message, as it is sent back: number, value, error, where it was raised.

    Args:
        number: of the message.
        told: the name of a model, as the engine has it.
        work: what it asks for.
    """
    try:
        return number, work(), None, ""
    except PlinthError as raised:
        error = raised.with_traceback(None)
        error.__cause__ = error.__context__ = None
        return number, None, error, ""
    except BaseException as raised:  # noqa: BLE001 - whatever a model raises is its unit's alone
        frames = "".join(traceback.format_list(traceback.extract_tb(raised.__traceback__)))
        failed = ModelError(
            f"model {told.partition('@')[0]} failed in a worker process: {type(raised).__name__}",
            hint="the log says where; are the values in the range that the model takes?",
        )
        return number, None, failed, frames


class Runs(Protocol):
    """What a process does with what it is sent; see :class:`Models`."""

    threads: int

    def run(self, name: str, rows: dict[str, Tensor]) -> tuple[Any, ...]:
        """Outputs for rows; rows of the largest batch; how often it was halved; the precision."""
        ...

    def load(self, name: str, recipe: Recipe) -> Any:
        """Make a model; what is told of it."""
        ...

    def forget(self, name: str) -> None:
        """Let a model go."""
        ...


class Server:
    """One connection: units run one after the other, models are loaded beside them.

    Args:
        sock: whose other end asks.
        models: what answers.
    """

    def __init__(self, sock: socket.socket, models: Runs) -> None:
        self._socket = sock
        self._models = models
        self._sending = threading.Lock()

    def run(self) -> None:
        """Serve until the other end ends."""
        root = logging.getLogger()
        root.handlers[:] = [Forward(lambda record: self._send(worker.LOGGED, record))]
        self._send(worker.READY, None)
        while (message := worker.receive(self._socket, keep=False)) is not None:
            kind, read = message
            if kind == worker.UNIT:
                self._answer(self._models.run, *read())
            elif kind == worker.LOAD:
                threading.Thread(target=self._load_beside, args=read(), daemon=True).start()
            elif kind == worker.FORGET:
                self._models.forget(read())
            del message, read

    def _load_beside(self, number: int, name: str, recipe: Recipe) -> None:
        with cpu_threads(self._models.threads):
            self._answer(self._models.load, number, name, recipe)

    def _answer(
        self, work: Callable[[str, Any], Any], number: int, name: str, given: object
    ) -> None:
        self._send(worker.REPLY, reply(number, name, lambda: work(name, given)))

    def _send(self, kind: bytes, value: Any) -> None:
        with self._sending:
            worker.send(self._socket, kind, value)


class Forward(logging.Handler):
    """Gives what is logged here to the log of the engine's process.

    Args:
        give: takes the logger's name, the level and the text.
    """

    def __init__(self, give: Callable[[tuple[str, int, str]], None]) -> None:
        super().__init__()
        self._give = give

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        with contextlib.suppress(OSError):  # nobody reads it any more
            self._give((record.name, record.levelno, self.format(record)))


# -- one rank of a gang ------------------------------------------------------------------------
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
    os._exit(0)  # threads of the group would end after what they use


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
