"""Steps for worker processes: well-behaved ones, and every way in which one can go wrong."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


def pid(*_: Any) -> int:
    return os.getpid()


def same(*values: Any) -> tuple[Any, ...]:
    return values


def total(array: np.ndarray) -> float:
    return float(array.sum())


def overwrite(array: np.ndarray) -> np.ndarray:
    array[...] = 7
    return array


def refuse(name: str) -> None:
    from plinth.engine.errors import InputError  # brings torch, which the others do not need

    raise InputError(f"{name} is wrong", field=name, hint="mend it", reason="odd")


def talk(word: str) -> str:
    print(word)
    logging.getLogger("a.library").warning("it said %s", word)
    return word


def segfault() -> None:
    ctypes.string_at(0)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def system_exit() -> None:
    sys.exit("enough")


def wrong(value: str = "") -> None:
    raise ValueError(value)


class Peculiar(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one}, {two}")


def peculiar() -> None:
    raise Peculiar(1, 2)


def unpicklable() -> Any:
    return lambda: None


def hang(said: Path | None = None) -> None:
    """Hang for ever, and say in a file that it does."""
    if said is not None:
        written = said.with_suffix(".new")
        written.write_text(str(os.getpid()))
        written.rename(said)
    while True:
        signal.pause()


def hang_with_the_lock() -> None:
    """Hang in native code that keeps the interpreter's lock."""
    ctypes.PyDLL(None).pause()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@contextlib.contextmanager
def not_a_step() -> Any:
    yield
