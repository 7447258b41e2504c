"""Commands as processes of their own that start in a blink: forked from one that has torch."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

PRELOADED = [
    *("torch", "plinth.pipelines.cli.main", "plinth.engine", "plinth.engine.benchmark"),
    *("plinth.verticals.finance", "plinth.verticals.medical", "plinth.pipelines.http.server"),
    *("plinth.pipelines.stream.worker", "plinth.pipelines.cli.runs"),
    *("torch._dynamo", "torch.onnx._internal.exporter._registration", "onnxruntime"),
    *("onnxscript.function_libs.torch_lib.ops", "highdicom", "SimpleITK"),
]


def context() -> ForkServerContext:
    """Where processes come from; the modules above are imported once for all of them."""
    found = get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


class Command:
    """A started ``plinth`` command, or a block of Python; what it says lands in one file.

    Args:
        words: of the command line, or one text of Python.
        folder: to run in.
        env: on top of the process's own environment.
        said: file for stdout and stderr.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, env: Mapping[str, str], said: Path
    ) -> None:
        self.words = list(words)
        self._said = said
        target = (list(words), str(folder), dict(env), str(said))
        self._process: BaseProcess = context().Process(target=_become, args=target, daemon=True)
        self._process.start()

    @property
    def said(self) -> str:
        """All it has said so far."""
        return self._said.read_text() if self._said.exists() else ""

    def wait(self, seconds: float) -> int | None:
        """Exit code; ``None`` while it runs on after so long."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.join()


def _become(words: list[str], folder: str, env: dict[str, str], said: str) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdin = io.StringIO()
    os.chdir(folder)
    os.environ.update(env)
    sys.path.insert(0, folder)
    if words[0] == "plinth":
        from plinth.pipelines.cli.main import main

        main(words[1:])
    else:
        main_module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[0], "<docs>", "exec"), vars(main_module))  # noqa: S102
