"""What the process of a lane does: it loads models, runs units and answers."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor

from plinth.engine.backends.base import cpu_threads
from plinth.engine.devices.device import pick
from plinth.engine.errors import ModelError, PlinthError
from plinth.engine.flow import Sla
from plinth.engine.lanes import process, worker
from plinth.engine.memory.plan import Room
from plinth.engine.runtime.loaded_model import LoadedModel
from plinth.engine.runtime.recipe import Recipe, cook

_CPU = pick("cpu")


def serve(descriptor: int, threads: int) -> None:
    """Answer what comes until the socket ends.

    Args:
        descriptor: of the socket.
        threads: CPU threads of a forward.
    """
    sock = socket.socket(fileno=os.dup(descriptor))
    with cpu_threads(threads):
        _Server(sock, threads).run()


class _Server:
    """One connection: units run one after the other, models are loaded beside them."""

    def __init__(self, sock: socket.socket, threads: int) -> None:
        self._socket = sock
        self._threads = threads
        self._models: dict[str, LoadedModel] = {}
        self._sending = threading.Lock()

    def run(self) -> None:
        """Serve until the other end ends."""
        root = logging.getLogger()
        root.handlers[:] = [_Forward(self._send)]
        self._send(process.READY, None)
        while (message := worker.receive(self._socket, keep=False)) is not None:
            kind, read = message
            if kind == process.UNIT:
                self._answer(self._run, *read())
            elif kind == process.LOAD:
                threading.Thread(target=self._load_beside, args=read(), daemon=True).start()
            elif kind == process.FORGET:
                self._models.pop(read(), None)
            del message, read

    def _load_beside(self, number: int, name: str, recipe: Recipe) -> None:
        with cpu_threads(self._threads):
            self._answer(self._load, number, name, recipe)

    def _run(self, name: str, rows: dict[str, Tensor]) -> tuple[Any, ...]:
        model = self._models[name]
        before = model.halvings
        outputs = model.run(rows)
        return outputs, model.most, model.halvings - before, model.precision

    def _load(self, name: str, recipe: Recipe) -> dict[str, Tensor] | None:
        model, executable = cook(recipe, _CPU, self._threads)
        outputs = None
        if recipe.example is not None:
            executable.probe(recipe.example)
            outputs = executable.run(recipe.example)
        self._models[name] = LoadedModel(model, Sla(), executable, recipe.most, Room(0))
        return outputs

    def _answer(
        self, work: Callable[[str, Any], Any], number: int, name: str, given: object
    ) -> None:
        value: Any = None
        error: PlinthError | None = None
        frames = ""
        try:
            value = work(name, given)
        except PlinthError as raised:
            error = raised.with_traceback(None)
            error.__cause__ = error.__context__ = None
        except BaseException as raised:  # noqa: BLE001 - whatever a model raises is its unit's alone
            frames = "".join(traceback.format_list(traceback.extract_tb(raised.__traceback__)))
            told = name.partition("@")[0]
            error = ModelError(
                f"model {told} failed in a worker process: {type(raised).__name__}",
                hint="the log says where; are the values in the range that the model takes?",
            )
        self._send(process.REPLY, (number, value, error, frames))

    def _send(self, kind: bytes, value: Any) -> None:
        with self._sending:
            worker.send(self._socket, kind, value)


class _Forward(logging.Handler):
    """Gives what is logged here to the log of the engine's process."""

    def __init__(self, send: Callable[[bytes, Any], None]) -> None:
        super().__init__()
        self._give = send

    def emit(self, record: logging.LogRecord) -> None:
        """See :class:`logging.Handler`."""
        with contextlib.suppress(OSError):  # nobody reads it any more
            self._give(process.LOGGED, (record.name, record.levelno, self.format(record)))
